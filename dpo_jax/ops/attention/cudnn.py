"""NVIDIA's fused attention on each example's own tile."""

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
