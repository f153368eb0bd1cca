"""The product of a linear layer, with its gradients written out."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def product(x, kernel, inputs=1):
  """x[..., inputs] · kernel[inputs, outputs] over `inputs` axes.

  The kernel's gradient is a product in which one side must be transposed. JAX's
  own rule transposes g, the gradient of the result, and XLA's CPU backend then
  computes all that led to g once more, column by column, at twice the cost of
  the product itself. Here the smaller side is transposed: x where a layer
  expands, g where it contracts. What is frozen keeps nothing for a gradient.

  Args:
    x: [..., i₁ … iₙ], f32 or bf16.
    kernel: [i₁ … iₙ, o₁ …] of the same dtype.
    inputs: n.
  Returns: [..., o₁ …].
  """
  return _product(inputs, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(inputs, x, kernel):
  return jnp.tensordot(x, kernel, inputs)


def _fwd(inputs, x, kernel):
  out = jnp.tensordot(x.value, kernel.value, inputs)
  return out, (
    x.value if kernel.perturbed else None,
    kernel.value if x.perturbed else None,
  )


def _bwd(inputs, residual, g):
  x, kernel = residual
  if isinstance(g, SymbolicZero):
    return None, None
  d_x = d_kernel = None
  if kernel is not None:
    outputs = kernel.ndim - inputs
    last = [tuple(range(a.ndim - outputs, a.ndim)) for a in (g, kernel)]
    d_x = jnp.tensordot(g, kernel, last)
  if x is not None:
    leading = x.ndim - inputs
    rows = [tuple(range(leading))] * 2
    if x.size <= g.size:
      d_kernel = jnp.tensordot(x, g, rows)
    else:
      d_kernel = jnp.moveaxis(
        jnp.tensordot(g, x, rows), range(-inputs, 0), range(inputs)
      )
  return d_x, d_kernel


_product.defvjp(_fwd, _bwd, symbolic_zeros=True)
