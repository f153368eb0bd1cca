"""The device mesh: axes data, fsdp, tensor (and context), always all there."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import compat, tree
from dpo_jax.ops import reduce

AXES = ("data", "fsdp", "tensor", "context")


def make(options):
  """The mesh of `config.mesh`.

  Args:
    options: fields data, fsdp, tensor, context; data = None takes all devices
      that the others leave.
  Raises: ValueError if the sizes do not make up the devices.
  """
  if options.context != 1:
    raise ValueError(
      f"mesh.context = {options.context}: splitting sequences over devices is "
      "not built; set it to 1"
    )
  devices = jax.devices()
  inner = options.fsdp * options.tensor
  data = options.data
  if data is None:
    data = max(1, len(devices) // inner)
  if data * inner != len(devices):
    raise ValueError(
      f"mesh: data × fsdp × tensor = {data} × {options.fsdp} × "
      f"{options.tensor} = {data * inner}, but there are {len(devices)} "
      "devices; set mesh.data, mesh.fsdp and mesh.tensor to make up that number"
    )
  return compat.make_mesh(
    devices, (data, options.fsdp, options.tensor, 1), AXES
  )


def of_devices(devices):
  """A mesh that splits rows alone over some devices."""
  return compat.make_mesh(devices, (len(devices), 1, 1, 1), AXES)


def sizes(mesh):
  """{axis: size}."""
  return dict(mesh.shape)


def row_parallelism(mesh):
  """data × fsdp: the rows of a batch are split this many ways."""
  return sizes(mesh)["data"] * sizes(mesh)["fsdp"]


def shardings(mesh, values, spec):
  """NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs.

  `spec` is a function (path, shape, {axis: size}) -> PartitionSpec.
  """
  axis_sizes = sizes(mesh)
  return tree.map_named(
    lambda path, x: NamedSharding(mesh, spec(path, x.shape, axis_sizes)), values
  )


def local_rows(mesh, count):
  """The slice of `count` global rows that this process's devices hold."""
  sharding = NamedSharding(mesh, P(reduce.ROWS))
  spans = sharding.addressable_devices_indices_map((count,)).values()
  starts = [span[0].indices(count) for span in spans]
  return slice(min(s[0] for s in starts), max(s[1] for s in starts))
