"""The one attention rule, and what its implementations share.

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
from jax.sharding import PartitionSpec as P

from dpo_jax import compat
from dpo_jax.ops import reduce

# What a checkpoint policy may keep of an implementation: its result and the
# log-sum-exp, with which the backward pass needs no forward pass.
KEPT = "attended"
# Large and finite: a row that sees nothing (padding) gets a uniform softmax,
# not 0/0.
HIDDEN = -1e30


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
  length = positions.shape[-1]
  i = jnp.arange(length)
  ids = positions, segment_ids, branch_ids
  return between(ids, ids, i[:, None] >= i, window)


def between(queries, keys, causal, window):
  """The rule between some positions of a row and others: bool[..., i, j].

  Args:
    queries, keys: (positions, segment_ids, branch_ids), i32[..., n].
    causal: bool[i, j], whether j ≤ i in the row.
    window: or None.
  """
  position_i, segment_i, branch_i = (x[..., :, None] for x in queries)
  position_j, segment_j, branch_j = (x[..., None, :] for x in keys)
  mask = causal & (segment_i == segment_j) & (segment_i != 0)
  mask &= (branch_j == 0) | (branch_i == branch_j)
  if window is not None:
    mask &= position_i - position_j < window
  return mask


def capped(scores, softcap):
  """softcap · tanh(scores / softcap), or the scores without one."""
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


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
  scores = capped(scores * scale, softcap)
  scores = jnp.where(mask[..., None, None, :, :], scores, HIDDEN)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("...kgts,...skh->...tkgh", probs, v)
  return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def xla(q, k, v, layout, *, window, scale, softcap=None):
  """Dense T×T attention: the oracle for every other implementation.

  Args:
    q: [R, T, N, H] queries.
    k, v: [R, T, K, H] keys and values.
    layout: Layout.
    window: positions that a query sees back, itself among them, or None.
    scale, softcap: see `masked`.
  Returns: [R, T, N, H]; what padding gets is without meaning.
  """
  return masked(q, k, v, visible(*layout[:3], window), scale, softcap)


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
  batch, length, heads, width = q.shape
  slots = jnp.arange(k.shape[2])
  mask = slots <= positions[..., None]
  if window is not None:
    mask &= positions[..., None] - slots < window
  # A key serves G queries of each token: rows of one product with the cache as
  # it lies, where any other order of the axes copies it.
  rows = batch, k.shape[1], -1, width
  q = jnp.moveaxis(q.reshape(batch, length, k.shape[1], -1, width), 1, 2)
  scores = jnp.einsum(
    "bkqh,bksh->bkqs", q.reshape(rows), k, preferred_element_type=jnp.float32
  )
  scores = capped(scores * scale, softcap)
  scores = scores.reshape(*q.shape[:-1], len(slots))
  scores = jnp.where(mask[:, None, :, None], scores, HIDDEN)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  probs = probs.reshape(*rows[:3], len(slots))
  out = jnp.einsum("bkqs,bksh->bkqh", probs, v).reshape(q.shape)
  return jnp.moveaxis(out, 1, 2).reshape(batch, length, heads, width)


def take_rows(x, index):
  """x[r, index[r]] for x [R, T, ...], index [R, M]; zero where out of range."""
  return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)


def sharded(fn):
  """`fn(q, k, v, layout)` over the mesh: rows over ("data", "fsdp"), heads over
  "tensor". As it is where there is no mesh.

  For kernels and loops, which the partitioner cannot split by itself.
  """
  mesh = compat.ambient_mesh()
  if mesh is None:
    return fn
  # Axes left out would be summed over in the backward pass; the one there is,
  # of contexts, has one device.
  rest = set(mesh.axis_names) - {*reduce.ROWS, reduce.TENSOR}
  heads = P(reduce.ROWS, tuple(rest), reduce.TENSOR, None)
  specs = heads, heads, heads, P(reduce.ROWS)
  return compat.shard_map(fn, mesh, specs, heads)
