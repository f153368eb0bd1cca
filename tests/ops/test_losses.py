"""Losses against oracles written from the formulas, in float64 numpy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dpo_jax.ops import losses


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def h_of(policy, ref):
  delta = policy - ref
  return delta[..., 0] - delta[..., 1]


def dpo_oracle(policy, ref, beta, label_smoothing):
  z = beta * h_of(policy, ref)
  return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * (
    log_sigmoid(-z)
  )


def ipo_oracle(policy, ref, beta, lengths, dialect):
  n = lengths if dialect == "paper" else np.ones_like(lengths)
  return (h_of(policy / n, ref / n) - 0.5 / beta) ** 2


def hinge_oracle(policy, ref, beta):
  return np.maximum(0.0, 1 - beta * h_of(policy, ref))


def sft_oracle(policy, ref):
  del ref
  return -policy[..., 0]


LENGTHS = np.array([[3.0, 5.0], [1.0, 9.0], [20.0, 2.0]])
CASES = [
  ("dpo", dpo_oracle, {"beta": 0.1, "label_smoothing": 0.0}),
  ("dpo", dpo_oracle, {"beta": 0.5, "label_smoothing": 0.2}),
  ("ipo", ipo_oracle, {"beta": 0.1, "lengths": LENGTHS, "dialect": "paper"}),
  ("ipo", ipo_oracle, {"beta": 0.3, "lengths": LENGTHS, "dialect": "original"}),
  ("hinge", hinge_oracle, {"beta": 0.1}),
  ("sft", sft_oracle, {}),
]


def random_logps(scale=10.0, seed=0):
  rng = np.random.default_rng(seed)
  return -scale * rng.random((2, 3, 2))


@pytest.mark.parametrize(("name", "oracle", "kwargs"), CASES)
def test_value_and_gradient_equal_the_oracle(name, oracle, kwargs):
  policy, ref = random_logps()
  fn = losses.LOSSES[name].fn

  def total(policy, ref):
    return jnp.sum(fn(policy, ref, **kwargs)["loss"])

  args = jnp.float32(policy), jnp.float32(ref)
  # f32 arithmetic on numbers of order 10 to 1000.
  np.testing.assert_allclose(
    fn(*args, **kwargs)["loss"], oracle(policy, ref, **kwargs), rtol=2e-5
  )
  gradient = jax.grad(total)(*args)
  step = 1e-6
  for index in np.ndindex(policy.shape):
    up, down = policy.copy(), policy.copy()
    up[index] += step
    down[index] -= step
    slope = np.sum(oracle(up, ref, **kwargs) - oracle(down, ref, **kwargs))
    want = slope / (2 * step)
    # Central differences in f64: 1e-6; f32 gradients: 2e-5 relative.
    np.testing.assert_allclose(gradient[index], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "oracle", "kwargs"), CASES)
def test_the_reference_gets_no_gradient(name, oracle, kwargs):
  del oracle
  policy, ref = map(jnp.float32, random_logps())

  def total(ref):
    return jnp.sum(losses.LOSSES[name].fn(policy, ref, **kwargs)["loss"])

  np.testing.assert_array_equal(jax.grad(total)(ref), 0.0)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
def test_policy_equal_to_reference_costs_log_two_with_gradient_half_beta(beta):
  logps = jnp.float32(random_logps()[0])

  def total(policy):
    out = losses.dpo(policy, logps, beta=beta, label_smoothing=0.0)
    return jnp.sum(out["loss"]), out

  gradient, out = jax.grad(total, has_aux=True)(logps)
  np.testing.assert_allclose(out["loss"], np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient[:, 0], -beta / 2, rtol=1e-6)
  np.testing.assert_allclose(gradient[:, 1], beta / 2, rtol=1e-6)
  np.testing.assert_array_equal(out["rewards/accuracies"], 0.5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_swapping_a_pair_negates_the_margin(name):
  policy, ref = map(jnp.float32, random_logps())
  kwargs = {
    "dpo": {"label_smoothing": 0.0},
    "ipo": {"lengths": LENGTHS, "dialect": "original"},
    "hinge": {},
  }[name]
  fn = losses.LOSSES[name].fn
  out = fn(policy, ref, beta=0.3, **kwargs)
  swapped = fn(policy[:, ::-1], ref[:, ::-1], beta=0.3, **kwargs)
  margins = "rewards/margins"
  np.testing.assert_array_equal(out[margins], -swapped[margins])
  total = out["rewards/accuracies"] + swapped["rewards/accuracies"]
  np.testing.assert_array_equal(total, 1.0)


def test_dpo_depends_on_beta_times_h_only():
  policy, ref = map(jnp.float32, random_logps())
  one = losses.dpo(policy, ref, beta=0.4, label_smoothing=0.1)
  other = losses.dpo(4 * policy, 4 * ref, beta=0.1, label_smoothing=0.1)
  np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)


@pytest.mark.parametrize(("name", "oracle", "kwargs"), CASES)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_margins_stay_finite(name, oracle, kwargs, size):
  del oracle
  policy = size * jnp.float32([[0, -1], [-1, 0], [0, 0]])
  fn = losses.LOSSES[name].fn

  def total(policy):
    return jnp.sum(fn(policy, jnp.zeros_like(policy), **kwargs)["loss"])

  value, gradient = jax.value_and_grad(total)(policy)
  assert bool(jnp.isfinite(value))
  assert bool(jnp.all(jnp.isfinite(gradient)))


def test_label_smoothing_is_stationary_where_it_should_be():
  """At β h = log((1 − ε) / ε) the gradient vanishes."""
  epsilon, beta = 0.2, 0.5
  h = np.log((1 - epsilon) / epsilon) / beta

  def loss(h):
    pair = jnp.stack([h, jnp.zeros_like(h)])
    return losses.dpo(pair, jnp.zeros(2), beta=beta, label_smoothing=epsilon)[
      "loss"
    ]

  assert abs(jax.grad(loss)(jnp.float32(h))) < 1e-6


def test_every_loss_takes_its_config_fields_and_no_others():
  assert set(common.LOSSES) == set(losses.LOSSES)
  for name, loss in losses.LOSSES.items():
    keywords = set(inspect.signature(loss.fn).parameters)
    keywords -= {"policy_logps", "ref_logps", *loss.needs}
    assert keywords == set(common.LOSSES[name]), name


def test_an_unknown_dialect_is_refused():
  policy, ref = map(jnp.float32, random_logps())
  with pytest.raises(ValueError, match=r"loss.dialect.*did you mean 'paper'"):
    losses.ipo(policy, ref, beta=0.1, lengths=LENGTHS, dialect="papr")
