"""Attention in blocks of a row, with online softmax: O(T) memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from dpo_jax import compat
from dpo_jax.ops.attention import rule

# Positions of a block. On CPU the scores of a pair of blocks should stay in the
# cache, and small blocks follow the visible more closely; measured, 48 and 64
# are equal for 8 heads of 64, and 48 takes 4/5 of the time where 9 heads share
# 3 keys. Other devices need larger products.
BLOCKS = {"cpu": 48}
BLOCK = 256
_GRAINS = 8  # a block is a multiple of so many positions, or smaller
_LAST = jnp.iinfo(jnp.int32).max


class _Static(NamedTuple):
  window: int | None
  scale: float
  softcap: float | None
  block: int


def blockwise(q, k, v, layout, *, window, scale, softcap=None, block=None):
  """Runs over the pairs of a query and a key block that see each other.

  Every loop over blocks is as long as the list of pairs, which depends on the
  data, so what is not visible is never touched: in the forward pass, in the
  backward pass, which is written out, and under vmap over anything but the
  layout. Equal to `xla`, whose arguments it has.

  Args:
    block: positions of a block, None for that of the platform.
  Source: arXiv:2205.14135, algorithms 1 and 4.
  """
  if block is None:
    block = BLOCKS.get(jax.default_backend(), BLOCK)
  row = functools.partial(_row, _Static(window, scale, softcap, block))

  def rows(q, k, v, layout):
    # One row after the other, each as long as its own list.
    return jax.lax.map(lambda x: row(*x), (q, k, v, *layout[:3]))

  return rule.sharded(rows)(q, k, v, layout)


def visible_blocks(positions, segment_ids, branch_ids, *, window, block):
  """Which blocks may see which: bool[i, j] of one row, i32[T] each.

  False only where no position of block i sees one of block j. Found from the
  extents of segments, branches and positions in grains of an eighth of a block,
  so that few blocks are in vain where one example ends and the next begins.
  """
  grain = max(1, block // _GRAINS)
  ids = (positions, segment_ids, branch_ids)
  position, segment, branch = (_pad(x, block).reshape(-1, grain) for x in ids)
  real = segment != 0

  def extent(x):
    low = jnp.min(jnp.where(real, x, _LAST), axis=1)
    return low, jnp.max(jnp.where(real, x, -1), axis=1)

  def overlap(x):
    low, high = extent(x)
    return (low[:, None] <= high) & (low <= high[:, None])

  prompt = jnp.any(real & (branch == 0), axis=1)
  seen = jnp.tril(overlap(segment)) & (prompt | overlap(branch))
  if window is not None:
    low, high = extent(position)
    seen &= low[:, None] - high < window
  per_block = block // grain
  count = seen.shape[0] // per_block
  return jnp.any(seen.reshape(count, per_block, count, per_block), axis=(1, 3))


def _pad(x, block):
  """x [T, ...] up to whole blocks."""
  after = -x.shape[0] % block
  return jnp.pad(x, ((0, after), *((0, 0),) * (x.ndim - 1)))


def _row(static, q, k, v, *ids):
  """One row: q [T, N, H], k and v [T, K, H], three i32[T]."""
  length, heads, width = q.shape
  q, k, v, *ids = (_pad(x, static.block) for x in (q, k, v, *ids))
  q = q.reshape(q.shape[0], k.shape[1], -1, width).swapaxes(0, 1)
  q = (q * static.scale).astype(q.dtype)
  k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
  out = _attend(static, q, k, v, *ids)
  return out.swapaxes(0, 1).reshape(-1, heads, width)[:length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, *ids):
  """[K, T, G, H] from q [K, T, G, H] (scaled), k and v [K, T, H]."""
  return _fwd(static, q, k, v, *ids)[0]


def _each(seen, body, carry):
  """carry = body(n, carry) for the n of bool[n] that are seen, and only those.

  Not a branch inside a loop over all: under vmap that would compute both sides.
  """
  order = jnp.argsort(~seen, stable=True)
  return jax.lax.fori_loop(
    0, jnp.sum(seen), lambda n, carry: body(order[n], carry), carry
  )


def _take(static, n, *arrays):
  """Block n along axis 1 of each."""
  start, size = n * static.block, static.block
  return tuple(
    jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in arrays
  )


def _scores(static, ids, i, j, q, k):
  """(scores [K, t, G, s] of block i on block j, hidden or not, mask)."""
  scores = compat.einsum_f32("ktgh,ksh->ktgs", q, k)
  scores = rule.capped(scores, static.softcap)
  ids = tuple(x[None] for x in ids)
  queries, keys = _take(static, i, *ids), _take(static, j, *ids)
  at = jnp.arange(static.block)
  causal = (i * static.block + at)[:, None] >= j * static.block + at
  mask = rule.between(queries, keys, causal, static.window)
  return scores, mask[:, :, None]


def _fwd(static, q, k, v, *ids):
  seen = visible_blocks(*ids, window=static.window, block=static.block)

  def queries(i):
    (q_i,) = _take(static, i, q)

    def body(j, carry):
      top, total, out = carry
      k_j, v_j = _take(static, j, k, v)
      scores, mask = _scores(static, ids, i, j, q_i, k_j)
      highest = jnp.maximum(
        top, jnp.max(jnp.where(mask, scores, rule.HIDDEN), axis=-1)
      )
      probs = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0.0)
      shrink = jnp.exp(top - highest)
      total = total * shrink + jnp.sum(probs, axis=-1)
      more = compat.einsum_f32("ktgs,ksh->ktgh", probs.astype(v.dtype), v_j)
      return highest, total, out * shrink[..., None] + more

    shape = q_i.shape[:-1]
    start = jnp.full(shape, rule.HIDDEN), jnp.zeros(shape), jnp.zeros(q_i.shape)
    top, total, out = _each(seen[i], body, start)
    # A query that sees nothing gets 0, and probabilities of 0 from its lse.
    blind = total == 0
    out = out / jnp.where(blind, 1.0, total)[..., None]
    lse = jnp.where(blind, jnp.inf, top + jnp.log(total))
    return out.astype(q.dtype), lse

  out, lse = jax.lax.map(queries, jnp.arange(len(seen)))
  out, lse = (jnp.moveaxis(x, 0, 1) for x in (out, lse))
  out, lse = (
    ad_checkpoint.checkpoint_name(x, rule.KEPT)
    for x in (out.reshape(q.shape), lse.reshape(q.shape[:-1]))
  )
  return out, (q, k, v, ids, out, lse)


def _bwd(static, residual, grad):
  q, k, v, ids, out, lse = residual
  seen = visible_blocks(*ids, window=static.window, block=static.block)
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  # Σ probs · d probs of a query, which the softmax takes off.
  mean = jnp.sum(product, axis=-1)

  def keys(d_q, j):
    k_j, v_j = _take(static, j, k, v)

    def body(i, carry):
      d_q, d_k, d_v = carry
      q_i, grad_i, lse_i, mean_i = _take(static, i, q, grad, lse, mean)
      scores, mask = _scores(static, ids, i, j, q_i, k_j)
      probs = jnp.where(mask, jnp.exp(scores - lse_i[..., None]), 0.0)
      d_probs = compat.einsum_f32("ktgh,ksh->ktgs", grad_i, v_j)
      d_scores = probs * (d_probs - mean_i[..., None])
      if static.softcap is not None:
        d_scores *= 1 - jnp.square(scores / static.softcap)
      d_scores, probs = d_scores.astype(q.dtype), probs.astype(v.dtype)
      (d_q_i,) = _take(static, i, d_q)
      d_q_i += compat.einsum_f32("ktgs,ksh->ktgh", d_scores, k_j)
      d_q = jax.lax.dynamic_update_slice_in_dim(
        d_q, d_q_i, i * static.block, axis=1
      )
      d_k += compat.einsum_f32("ktgs,ktgh->ksh", d_scores, q_i)
      d_v += compat.einsum_f32("ktgs,ktgh->ksh", probs, grad_i)
      return d_q, d_k, d_v

    start = d_q, jnp.zeros(k_j.shape), jnp.zeros(v_j.shape)
    d_q, d_k, d_v = _each(seen[:, j], body, start)
    return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

  start = jnp.zeros(q.shape)
  d_q, (d_k, d_v) = jax.lax.scan(keys, start, jnp.arange(len(seen)))
  d_k, d_v = (jnp.moveaxis(x, 0, 1).reshape(k.shape) for x in (d_k, d_v))
  return d_q.astype(q.dtype), d_k, d_v, None, None, None


_attend.defvjp(_fwd, _bwd)
