"""Which implementation runs where: by platform, model, layout and size."""

import math

import jax

from dpo_jax import compat
from dpo_jax.ops import reduce
from dpo_jax.ops.attention import blockwise, cudnn, tiled

# Scores of a layer that `tiled` may hold on a device, in bytes.
SCORES = 4 * 2**30
# Positions of an example beyond which `blockwise` is faster on a CPU: it takes
# 3/4 of the time at 224, less than half at 576. It takes longer to compile.
TILE = 128


def platform(device):
  """cpu, tpu, cuda, or what else a device is of."""
  if device.platform == "gpu":
    version = getattr(device.client, "platform_version", "")
    return "cuda" if "cuda" in version.lower() else "gpu"
  return device.platform


def why_not(name, where, *, shared, dtype, head_dim, softcap):
  """Why a kernel cannot be had, with what to change; None if it can.

  Args:
    name: in ATTENTION; what is no kernel runs everywhere.
    where: of `platform`.
    shared: whether completions share one copy of the prompt.
    dtype: of queries, keys and values, by name.
    head_dim: H.
    softcap: c, or None.
  """
  needs = {"cudnn": "cuda", "splash": "tpu"}.get(name, where)
  if where != needs:
    return f"it is for {needs}, and this is {where}: set 'auto'"
  if name == "cudnn":
    return cudnn.why_not(dtype, head_dim, softcap)
  if name == "splash" and shared:
    return "it has no mask for shared prompts: set data.shared = False"
  return None


def resolve(name, where, **facts):
  """`name`, or the platform's kernel if that is "auto" and the kernel fits.

  Args: see `why_not`.
  Returns: (name, why). "auto" if there is none: `auto` then takes `plain`.
  Raises: ValueError if a kernel that was asked for does not fit.
  """
  if name == "auto":
    kernel = {"cuda": "cudnn", "tpu": "splash"}.get(where)
    if kernel is None:
      return name, f"no kernel for {where}"
    problem = why_not(kernel, where, **facts)
    if problem is None:
      return kernel, f"the kernel for {where}"
    return name, f"not {kernel}, {problem}"
  problem = why_not(name, where, **facts)
  if problem is not None:
    raise ValueError(f"model.attention = {name!r}: {problem}")
  return name, "as configured"


def plain(where, rows, per_row, tile, heads):
  """(name, why) of the implementation in plain XLA.

  Args:
    where: of `platform`.
    rows, per_row, tile, heads: R, P, E, N on one device.
  """
  if where == "cpu":
    if tile <= TILE:
      return "tiled", f"examples of at most {TILE} tokens"
    return "blockwise", f"examples of more than {TILE} tokens"
  size = 4 * rows * per_row * heads * tile**2
  about = f"scores of {size / 2**20:,.0f} MiB"
  if size <= SCORES:
    return "tiled", about
  return "blockwise", f"{about} are more than {SCORES / 2**20:,.0f}"


def describe(name, where, shapes, heads, splits, **facts):
  """What a run attends with and why, in a line for its log.

  Args:
    name: model.attention of the config.
    where: of `platform`.
    shapes: data.batch.rows.Shape of each kind of batch.
    heads: N.
    splits: devices and microbatches that share the rows, and the heads.
    **facts: see `why_not`.
  """
  chosen, why = resolve(name, where, **facts)
  if chosen != "auto":
    return f"attention {chosen} ({why})"
  rows, heads = splits[0], heads // splits[1]
  found = [
    plain(where, s.rows // rows, s.per_row, s.tile, heads) for s in shapes
  ]
  names = " or ".join(sorted({name for name, _ in found}))
  return f"attention {names} ({why}; {found[-1][1]})"


def auto(q, k, v, layout, *, window, scale, softcap=None):
  """The implementation for the platform and these shapes.

  Never splash, because whether prompts are shared cannot be seen here; a run's
  config says it, see models.decoder.with_kernel. Arguments as of rule.xla.
  """
  where = platform(jax.devices()[0])
  name, _ = resolve(
    "auto",
    where,
    shared=True,
    dtype=q.dtype.name,
    head_dim=q.shape[-1],
    softcap=softcap,
  )
  if name == "auto":
    mesh = compat.ambient_mesh()
    sizes = {} if mesh is None else mesh.shape
    rows = math.prod(sizes.get(axis, 1) for axis in reduce.ROWS)
    name, _ = plain(
      where,
      q.shape[0] // rows,
      *layout.example_index.shape[1:],
      q.shape[2] // sizes.get(reduce.TENSOR, 1),
    )
  fn = {
    "cudnn": cudnn.cudnn,
    "tiled": tiled.tiled,
    "blockwise": blockwise.blockwise,
  }[name]
  return fn(q, k, v, layout, window=window, scale=scale, softcap=softcap)
