import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import reduce


def test_the_mean_of_a_cut_batch_is_the_mean_of_the_batch():
  """Parts of unequal weight: a mean of means would differ."""
  values, weights = jnp.arange(6.0), jnp.float32([1, 0, 2, 1, 0, 3])
  whole = reduce.means({"x": (values, weights)})["x"]
  nums = dens = 0.0
  for part in (slice(0, 2), slice(2, 6)):
    terms = {"x": (values[part], weights[part])}
    nums += reduce.numerators(terms)["x"]
    dens += reduce.denominators(terms)["x"]
  np.testing.assert_allclose(
    reduce.divide({"x": nums}, {"x": dens})["x"], whole
  )


def test_a_weight_of_zero_hides_a_nan():
  terms = {"x": (jnp.float32([jnp.nan, 2.0]), jnp.float32([0.0, 1.0]))}
  assert reduce.means(terms)["x"] == 2.0


def test_nothing_with_weight_is_zero_not_nan():
  assert reduce.means({"x": (jnp.ones(2), jnp.zeros(2))})["x"] == 0.0
