"""Means over the global batch: weighted sums, the psum hook, the division.

A term is (values, weights). Its mean is Σ w·v / Σ w with both sums taken over
the whole global batch before the one division, so the result does not depend
on how the batch is cut into rows, microbatches or devices.
"""

import jax
import jax.numpy as jnp

# Mesh axes the rows of a batch are spread over, and the one that splits heads,
# mlp and vocabulary.
ROWS = ("data", "fsdp")
TENSOR = "tensor"


def weighted_sum(values, weights):
  """Σ w·v in f32; a weight of 0 hides its value, even a NaN."""
  values = jnp.where(weights != 0, values.astype(jnp.float32), 0.0)
  return jnp.sum(values * weights.astype(jnp.float32))


def numerators(terms):
  """{name: Σ w·v} of {name: (values, weights)}.

  Terms that share the very array of weights are summed in one operation: there
  are dozens of metrics of the same comparisons.
  """
  sums = {}
  for names in _alike(terms).values():
    values, weights = terms[names[0]]
    if len(names) > 1 and values.shape == weights.shape:
      values = jnp.stack([terms[name][0] for name in names])
      each = jax.vmap(weighted_sum, in_axes=(0, None))(values, weights)
      sums |= {name: each[i] for i, name in enumerate(names)}
    else:
      sums |= {name: weighted_sum(*terms[name]) for name in names}
  return {name: sums[name] for name in terms}


def denominators(terms):
  """{name: Σ w} of {name: (values, weights)}."""
  sums = {}
  for names in _alike(terms).values():
    total = jnp.sum(terms[names[0]][1].astype(jnp.float32))
    sums |= dict.fromkeys(names, total)
  return {name: sums[name] for name in terms}


def _alike(terms):
  """Names of terms by their array of weights and the shape of their values."""
  groups = {}
  for name, (values, weights) in terms.items():
    groups.setdefault((id(weights), values.shape), []).append(name)
  return groups


def divide(nums, dens):
  """{name: num / den}, and 0 where nothing has weight."""
  return {
    name: jnp.where(dens[name] > 0, num / jnp.maximum(dens[name], 1e-30), 0.0)
    for name, num in nums.items()
  }


def means(terms):
  """{name: Σ w·v / Σ w} of {name: (values, weights)}."""
  return divide(numerators(terms), denominators(terms))


def peaks(terms):
  """{name: largest value that has weight} of {name: (values, weights)}."""
  return {
    name: jnp.max(jnp.where(w > 0, v.astype(jnp.float32), -jnp.inf))
    for name, (v, w) in terms.items()
  }


def pmax(tree, axis_name):
  """Maximum over a pmap axis; the identity where `axis_name` is None."""
  return tree if axis_name is None else jax.lax.pmax(tree, axis_name)


def gather_rows(tree, axis_name):
  """Rows of all devices of a pmap axis; the identity where there is none."""
  if axis_name is None:
    return tree
  return jax.lax.all_gather(tree, axis_name, axis=0, tiled=True)


def psum(tree, axis_name):
  """Sum over a pmap axis; the identity where `axis_name` is None."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)
