"""The one attention rule, and its implementations.

Position i sees position j of its row iff

    segment_i = segment_j ≠ 0,  j ≤ i,  branch_j ∈ {0, branch_i},
    and position_i − position_j < window where the layer has one.

Branch 0 is the prompt, so a prompt is computed once for all its completions,
completions do not see each other, and examples packed into one row do not
either. The window counts positions, never row indices: shared rows make them
differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Large and finite: a row that sees nothing (padding) gets a uniform softmax,
# not 0/0.
_HIDDEN = -1e30


class Layout(NamedTuple):
  """What the rule needs to know of a batch of rows.

  Attributes:
    positions: i32[R, T], position inside the sequence.
    segment_ids: i32[R, T], example in the row from 1; 0 is padding.
    branch_ids: i32[R, T], 0 prompt, 1..C completion.
    example_index: i32[R, P, E], row positions of example p; T is padding.
  """

  positions: jax.Array
  segment_ids: jax.Array
  branch_ids: jax.Array
  example_index: jax.Array


def visible(positions, segment_ids, branch_ids, window):
  """The rule as bool[..., i, j] from three i32[..., T]."""
  i, j = (..., slice(None), None), (..., None, slice(None))
  length = positions.shape[-1]
  mask = jnp.tril(jnp.ones((length, length), bool))
  mask &= (segment_ids[i] == segment_ids[j]) & (segment_ids[i] != 0)
  mask &= (branch_ids[j] == 0) | (branch_ids[i] == branch_ids[j])
  if window is not None:
    mask &= positions[i] - positions[j] < window
  return mask


def masked(q, k, v, mask, scale, softcap):
  """Softmax attention under a mask, scores and softmax in f32.

      scores = softcap(scale · q·k), softcap(x) = c·tanh(x / c)

  Args:
    q: [..., T, N, H] queries.
    k, v: [..., S, K, H] keys and values; each serves N / K query heads.
    mask: bool[..., T, S].
    scale: factor on q·k.
    softcap: c, or None.
  Returns: [..., T, N, H] in the dtype of v.
  """
  groups = q.shape[-2] // k.shape[-2]
  q = q.reshape(*q.shape[:-2], k.shape[-2], groups, q.shape[-1])
  scores = jnp.einsum(
    "...tkgh,...skh->...kgts", q, k, preferred_element_type=jnp.float32
  )
  scores *= scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[..., None, None, :, :], scores, _HIDDEN)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("...kgts,...skh->...tkgh", probs, v)
  return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def xla(q, k, v, layout, *, window, scale, softcap=None):
  """Dense T×T attention: the oracle for every other implementation."""
  mask = visible(
    layout.positions, layout.segment_ids, layout.branch_ids, window
  )
  return masked(q, k, v, mask, scale, softcap)


def take_rows(x, index):
  """x[r, index[r]] for x [R, T, ...], index [R, M]; zero where out of range."""
  return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def _move(x, index, inverse):
  """`take_rows(x, index)` where `inverse` is the index of the way back.

  Every in-range position is taken once, so the gradient is the gather by
  `inverse`: no scatter in either direction.
  """
  del inverse
  return take_rows(x, index)


def _move_fwd(x, index, inverse):
  return _move(x, index, inverse), (index, inverse)


def _move_bwd(residual, grad):
  index, inverse = residual
  return _move(grad, inverse, index), None, None


_move.defvjp(_move_fwd, _move_bwd)


def tiled(q, k, v, layout, *, window, scale, softcap=None):
  """Gathers each example to its own [E] tile, attends inside, puts it back.

  Costs Σ E² per row, never T². The values equal `xla`.
  """
  rows, length = layout.segment_ids.shape
  per_row, tile = layout.example_index.shape[1:]
  index = layout.example_index.reshape(rows, per_row * tile)
  inverse = jax.vmap(
    lambda i: (
      jnp.full(length, per_row * tile, jnp.int32)
      .at[i]
      .set(jnp.arange(per_row * tile, dtype=jnp.int32), mode="drop")
    )
  )(index)

  def to_tiles(x):
    x = _move(x, index, inverse)
    return x.reshape(rows, per_row, tile, *x.shape[2:])

  positions, segments, branches = (
    take_rows(x, index).reshape(rows, per_row, tile) for x in layout[:3]
  )
  mask = visible(positions, segments, branches, window)
  out = masked(to_tiles(q), to_tiles(k), to_tiles(v), mask, scale, softcap)
  out = out.reshape(rows, per_row * tile, *out.shape[3:])
  return _move(out, inverse, index)


def cached(q, k, v, positions, *, window, scale, softcap=None):
  """Attention of new tokens over a key-value cache.

  Slot s of the cache holds the key of position s, so a slot is visible iff
  s ≤ position of the query (and inside the window); slots not written yet lie
  after every query.

  Args:
    q: [B, T, N, H] queries of the new tokens.
    k, v: [B, K, S, H] cache, the new tokens already in it.
    positions: i32[B, T] of the new tokens.
  """
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  slots = jnp.arange(k.shape[1])
  mask = slots <= positions[..., None]
  if window is not None:
    mask &= positions[..., None] - slots < window
  return masked(q, k, v, mask, scale, softcap)


ATTENTION = {"tiled": tiled, "xla": xla}
