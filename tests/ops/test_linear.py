import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import linear

# (rows, inputs, outputs): expanding, contracting, several axes on either side.
SHAPES = [((2, 5), (4,), (8,)), ((7,), (8,), (4,)), ((2, 3), (2, 4), (3, 2))]


def arrays(shape, dtype=jnp.float32):
  rows, inputs, outputs = shape
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = rows + inputs, inputs + outputs, rows + outputs
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_equal_jaxs_own(shape, dtype):
  x, kernel, g = arrays(shape, dtype)
  inputs = len(shape[1])

  def both(fn, x, kernel, g):
    out, vjp = jax.vjp(lambda x, k: fn(x, k, inputs), x, kernel)
    return out, *vjp(g)

  ours, jaxs = (
    jax.jit(both, static_argnums=0)(fn, x, kernel, g)
    for fn in (linear.product, jnp.tensordot)
  )
  for got, want in zip(ours, jaxs, strict=True):
    assert got.dtype == want.dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    np.testing.assert_allclose(got, want, tolerance, tolerance)


def test_points_of_a_sweep_go_through_it_together():
  x, kernel, _ = arrays(SHAPES[0])
  kernels = jnp.stack([kernel, 2 * kernel])

  def loss(kernel):
    return jnp.sum(jnp.sin(linear.product(x, kernel)))

  together = jax.vmap(jax.grad(loss))(kernels)
  alone = [jax.grad(loss)(kernel) for kernel in kernels]
  np.testing.assert_allclose(together, jnp.stack(alone), 1e-6, 1e-6)


def test_the_smaller_side_is_transposed_for_the_kernels_gradient():
  """XLA's CPU backend is slow at the other, see the docstring."""
  for shape in SHAPES[:2]:
    x, kernel, g = arrays(shape)
    products = [
      equation.invars[0].aval.shape
      for equation in jax.make_jaxpr(
        lambda x, k, g: jax.vjp(linear.product, x, k)[1](g)[1]
      )(x, kernel, g).eqns
      if equation.primitive.name == "dot_general"
    ]
    assert products[-1] == min(x, g, key=lambda a: a.size).shape


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_keeps_nothing_for_its_gradient(frozen):
  x, kernel, _ = arrays(SHAPES[0])
  args = [x, kernel]

  def of(moving):
    args[1 - frozen] = moving
    return linear.product(*args)

  _, vjp = jax.vjp(of, args[1 - frozen])
  kept = [leaf.shape for leaf in jax.tree.leaves(vjp)]
  assert kept == [(x, kernel)[frozen].shape]
