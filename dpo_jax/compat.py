"""Every difference between JAX versions, in one place.

Supported: Python 3.11 with jax 0.10, Python 3.12+ with jax 0.11 and 0.12. What
differs between them, or has changed its default before, is spelled out here
and nowhere else.
"""

import jax
import jax.numpy as jnp
import numpy as np

AxisType = jax.sharding.AxisType


def make_mesh(devices, axis_sizes, axis_names):
  """A mesh whose axes are all Auto.

  `jax.make_mesh` defaults to Explicit axes and `jax.sharding.Mesh` to Auto, so
  the type is always said.
  """
  devices = np.asarray(devices).reshape(axis_sizes)
  auto = (AxisType.Auto,) * len(axis_names)
  return jax.sharding.Mesh(devices, axis_names, axis_types=auto)


def abstract_mesh(axis_sizes, axis_names):
  """A mesh of no devices, its axes as those of `make_mesh`."""
  auto = (AxisType.Auto,) * len(axis_names)
  return jax.sharding.AbstractMesh(axis_sizes, axis_names, axis_types=auto)


def ambient_mesh():
  """The mesh of `jax.set_mesh` if code here may still be partitioned.

  Returns: an `AbstractMesh`, or None on one device, without a mesh, or inside
    pmap and shard_map, where the axes are already manual.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return None
  return mesh


def einsum_f32(spec, a, b):
  """An einsum of bf16 or f32 arrays with products and sums in f32.

  XLA's CPU backend has no kernel for some bf16 products with f32 results (jax
  0.10: "Unsupported element type for DotThunk"), so there the operands are cast
  first: the products are the same, since those of bf16 are exact in f32.
  """
  if jax.default_backend() == "cpu":
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def shard_map(fn, mesh, in_specs, out_specs):
  """`jax.shard_map` without the check that outputs vary as they are declared.

  The functions wrapped here are hand-differentiated: their collectives are
  written out, so the check has nothing to add and would insert casts.
  """
  return jax.shard_map(
    fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
