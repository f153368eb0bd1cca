"""The TPU's flash attention with segments, for rows without shared prompts."""

import jax
import jax.numpy as jnp

from dpo_jax.ops.attention import rule

_LANES = 128  # T is padded to a multiple
_BLOCK = 512  # positions of a block, or fewer: it must divide T


def splash(q, k, v, layout, *, window, scale, softcap=None, interpret=False):
  """The rule as a causal mask by segments, where no branch has a 0.

  Without sharing a branch is a segment of its own, segment · (E + 1) + branch,
  and a distance in positions is one in row indices. A branch 0 counts as 1, so
  a prompt with one completion is right as well; a row where several share one
  comes out as NaN, not as something near. Equal to `xla`, whose arguments it
  has.

  Args:
    interpret: run the kernel's Python, on any platform.
  """

  def local(q, k, v, layout):
    length = q.shape[1]
    pad = -length % _LANES
    q = (q * scale).astype(q.dtype)
    q, k, v = (
      jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)
      for x in (q, k, v)
    )
    segment, branch = layout.segment_ids, layout.branch_ids
    most = layout.example_index.shape[2]  # branches of an example, at least
    real = segment > 0
    ids = segment * (most + 1) + jnp.where(real, jnp.maximum(branch, 1), 0)
    ids = jnp.pad(ids, ((0, 0), (0, pad)))
    kernel = _kernel(window, softcap, interpret, q.shape[1], length + pad)
    out = jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)[:, :length]
    shared = jnp.any(real & (branch == 0), axis=1)
    shared &= jnp.any(real & (branch > 1), axis=1)
    return jnp.where(shared[:, None, None, None], jnp.nan, out)

  return rule.sharded(local)(q, k, v, layout)


def _kernel(window, softcap, interpret, heads, length):
  """Function of q [N, T, H], k and v [K, T, H], and segments i32[T]."""
  # Here, because the import is slow and most runs are without it.
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  shape = length, length
  if window is None:
    mask = lib.CausalMask(shape)
  else:
    mask = lib.LocalMask(shape, (window - 1, 0), 0)
  size = max(n for n in range(_LANES, _BLOCK + 1, _LANES) if length % n == 0)
  sizes = lib.BlockSizes(*(size,) * 8)
  attend = lib.make_splash_mha(
    lib.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  return lambda q, k, v, ids: attend(q, k, v, lib.SegmentIds(ids, ids))
