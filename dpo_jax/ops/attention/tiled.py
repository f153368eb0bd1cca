"""Attention inside each example's own tile, in plain XLA."""

import functools

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from dpo_jax import compat
from dpo_jax.ops.attention import rule

# A tile's queries are cut into at most so many chunks, of at least so many
# positions; a chunk's scores end with its last key: 5/8 of the square for 4.
_CHUNKS = 4
_CHUNK = 64


def tiled(q, k, v, layout, *, window, scale, softcap=None):
  """Gathers each example to its own [E] tile, attends inside, puts it back.

  Costs Σ E² per row, never T². The values equal `xla`, whose arguments it has.
  """
  into, back, mask = tiles(layout, window)
  out = _attend(scale, softcap, into(q), into(k), into(v), mask)
  return back(out)


def tiles(layout, window, multiple=1):
  """The way to the tiles and back.

  Args:
    layout: rule.Layout.
    window: of the layer.
    multiple: E is padded to this.
  Returns: (function [R, T, ...] -> [R·P, E, ...], function back, the rule as
    bool[R·P, E, E]).
  """
  rows, length = layout.segment_ids.shape
  index = layout.example_index
  pad = -index.shape[2] % multiple
  index = jnp.pad(index, ((0, 0), (0, 0), (0, pad)), constant_values=length)
  tile = index.shape[2]
  index = index.reshape(rows, -1)
  places = jnp.arange(index.shape[1], dtype=jnp.int32)
  inverse = jax.vmap(
    lambda i: (
      jnp.full(length, places.size, jnp.int32).at[i].set(places, mode="drop")
    )
  )(index)

  def into(x):
    return _move(x, index, inverse).reshape(-1, tile, *x.shape[2:])

  def back(x):
    return _move(x.reshape(rows, -1, *x.shape[2:]), inverse, index)

  ids = (rule.take_rows(x, index).reshape(-1, tile) for x in layout[:3])
  return into, back, rule.visible(*ids, window)


@jax.custom_vjp
def _move(x, index, inverse):
  """`take_rows(x, index)` where `inverse` is the index of the way back.

  Every in-range position is taken once, so the gradient is the gather by
  `inverse`: no scatter in either direction.
  """
  del inverse
  return rule.take_rows(x, index)


def _move_fwd(x, index, inverse):
  return _move(x, index, inverse), (index, inverse)


def _move_bwd(residual, grad):
  index, inverse = residual
  return _move(grad, inverse, index), None, None


_move.defvjp(_move_fwd, _move_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, softcap, q, k, v, mask):
  """`rule.masked` under a causal mask, without the scores above the diagonal.

  The backward pass computes the probabilities again from the scores and their
  log-sum-exp: no [E, E] array is kept from the forward pass. Source:
  arXiv:2205.14135, algorithms 1 and 4, with a few large blocks.

  Args:
    q: [B, E, N, H] queries.
    k, v: [B, E, K, H] keys and values.
    mask: bool[B, E, E], False above the diagonal.
  """
  return _attend_fwd(scale, softcap, q, k, v, mask)[0]


def _chunks(length):
  """[(start, end)] of the chunks of queries; a chunk sees no key from end."""
  step = max(_CHUNK, -(-length // _CHUNKS))
  return [(at, min(at + step, length)) for at in range(0, length, step)]


def _scores(softcap, q, k, mask):
  """Scores [B, K, G, t, s], hidden where the mask says so."""
  scores = rule.capped(compat.einsum_f32("bkgth,bksh->bkgts", q, k), softcap)
  return jnp.where(mask[:, None, None], scores, rule.HIDDEN)


def _attend_fwd(scale, softcap, q, k, v, mask):
  batch, length, heads, width = q.shape
  groups = heads // k.shape[2]
  # The positions last but one: products then need no copy of their operands.
  q = jnp.moveaxis(q.reshape(batch, length, -1, groups, width), 1, 3)
  q = (q * scale).astype(q.dtype)
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  outs, lses = [], []
  for start, end in _chunks(length):
    part = mask[:, start:end, :end]
    scores = _scores(softcap, q[..., start:end, :], k[..., :end, :], part)
    top = jnp.max(scores, axis=-1, keepdims=True)
    probs = jnp.exp(scores - top)
    total = jnp.sum(probs, axis=-1, keepdims=True)
    out = compat.einsum_f32(
      "bkgts,bksh->bkgth", probs.astype(v.dtype), v[..., :end, :]
    )
    outs.append((out / total).astype(v.dtype))
    lses.append(top + jnp.log(total))
  out, lse = (
    ad_checkpoint.checkpoint_name(jnp.concatenate(x, axis=3), rule.KEPT)
    for x in (outs, lses)
  )
  residual = q, k, v, mask, out, lse
  out = jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width)
  return out, residual


def _attend_bwd(scale, softcap, residual, grad):
  q, k, v, mask, out, lse = residual
  batch, length, heads, width = grad.shape
  grad = grad.reshape(batch, length, k.shape[1], -1, width)
  grad = jnp.moveaxis(grad, 1, 3)
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  # Σ probs · d probs of a query, which the softmax takes off.
  mean = jnp.sum(product, axis=-1, keepdims=True)
  d_q, d_k, d_v = [], 0.0, 0.0
  for start, end in _chunks(length):
    at = (..., slice(start, end), slice(None))
    keys, values = k[..., :end, :], v[..., :end, :]
    part = mask[:, start:end, :end]
    scores = _scores(softcap, q[at], keys, part)
    probs = jnp.exp(scores - lse[at])
    d_probs = compat.einsum_f32("bkgth,bksh->bkgts", grad[at], values)
    d_scores = probs * (d_probs - mean[at])
    if softcap is not None:
      d_scores *= 1 - jnp.square(scores / softcap)
    # A query that sees nothing has a uniform softmax of no meaning.
    d_scores = jnp.where(part[:, None, None], d_scores, 0.0).astype(q.dtype)
    probs = probs.astype(v.dtype)
    d_q.append(compat.einsum_f32("bkgts,bksh->bkgth", d_scores, keys))
    to_end = ((0, 0), (0, 0), (0, length - end), (0, 0))
    products = (
      compat.einsum_f32("bkgts,bkgth->bksh", d_scores, q[at]),
      compat.einsum_f32("bkgts,bkgth->bksh", probs, grad[at]),
    )
    more_k, more_v = (jnp.pad(x, to_end) for x in products)
    d_k, d_v = d_k + more_k, d_v + more_v
  d_q = jnp.moveaxis(jnp.concatenate(d_q, axis=3) * scale, 3, 1)
  d_q = d_q.reshape(batch, length, heads, width).astype(q.dtype)
  d_k, d_v = (jnp.swapaxes(x, 1, 2) for x in (d_k, d_v))
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
