"""NVIDIA's fused attention on each example's own tile."""

import functools

import jax
import jax.numpy as jnp

from dpo_jax.ops.attention import rule, tiled

_MULTIPLE = 64  # positions of a tile; with a bias an odd number is refused
HEAD_DIM = 128  # largest; 256 from Hopper on, which `why_not` does not tell


def why_not(dtype, head_dim, softcap):
  """Why cuDNN cannot compute this, with what to change; None if it can."""
  if dtype not in ("bfloat16", "float16"):
    return f"it has no {dtype}: set model.dtype = 'bfloat16'"
  if head_dim % 8 or head_dim > HEAD_DIM:
    return (
      f"model.head_dim = {head_dim} is not a multiple of 8 up to {HEAD_DIM}"
    )
  if softcap is not None:
    return f"it has no model.attention_softcap ({softcap})"
  return None


@functools.cache
def broken(head_dim, implementation="cudnn"):
  """What goes wrong with a small problem on this device; None if nothing does.

  Drivers and cards differ in what they take, so the kernel is tried, value and
  gradient, before it is chosen.
  """
  length, per_row = 128, 2
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(key, (2, length, heads, head_dim), jnp.bfloat16)
    for key, heads in zip(keys, (4, 2, 2), strict=True)
  )
  at = jnp.arange(length)
  segments = jnp.where(at < 100, 1 + (at >= 60), 0)
  tiles = jnp.stack([jnp.where(at < 60, at, length), 60 + at])
  tiles = jnp.where(tiles < 100, tiles, length)
  layout = rule.Layout(
    *(
      jnp.broadcast_to(x, (2, *x.shape))
      for x in (at % 60, segments, (at % 60) // 20, tiles[:per_row])
    )
  )
  scale = head_dim**-0.5

  def compute(fn):
    def total(args):
      out = fn(*args, layout, window=None, scale=scale)
      return jnp.sum(jnp.where(segments[:, None, None] > 0, out, 0) ** 2)

    return jax.jit(jax.value_and_grad(total))((q, k, v))

  try:
    with jax.ensure_compile_time_eval():
      kernel = functools.partial(cudnn, implementation=implementation)
      got, want = compute(kernel), compute(rule.xla)
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        # bf16 keeps 8 bits.
        if not jnp.linalg.norm(a - b) <= 0.03 * jnp.linalg.norm(b):
          return "its results differ from plain attention"
  except Exception as error:  # whatever the driver, cuDNN or XLA raise
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
  return None


def cudnn(
  q, k, v, layout, *, window, scale, softcap=None, implementation="cudnn"
):
  """The rule as a bias of cuDNN's flash attention, on `tiled`'s tiles.

  No array of scores; the bias is one number for all heads of an example. Equal
  to `xla`, whose arguments it has.

  Args:
    implementation: of jax.nn.dot_product_attention.
  Raises: ValueError for what cuDNN does not have.
  """
  problem = why_not(q.dtype.name, q.shape[-1], softcap)
  if implementation == "cudnn" and problem is not None:
    raise ValueError(f"model.attention = 'cudnn': {problem}")
  if softcap is not None:
    raise ValueError(f"attention_softcap = {softcap}: there is none here")

  def local(q, k, v, layout):
    into, back, mask = tiled.tiles(layout, window, _MULTIPLE)
    # Padding sees itself, or its softmax would be 0 / 0.
    mask |= jnp.eye(mask.shape[-1], dtype=bool)
    out = jax.nn.dot_product_attention(
      into(q),
      into(k),
      into(v),
      mask=mask[:, None],
      scale=scale,
      is_causal=True,  # in the mask too; so no block above is computed
      implementation=implementation,
    )
    return back(out)

  return rule.sharded(local)(q, k, v, layout)
