"""Log-probabilities of the scored tokens, and their sums per completion.

The head runs on scored positions only, in chunks along S per row, so no array
of size T·V exists. With a mesh the whole op is one shard_map: rows over
("data", "fsdp"), vocabulary over "tensor", the head gathered once before the
loop, its gradient accumulated locally and summed once after it.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax import compat
from dpo_jax.ops import attention, reduce

_HIDDEN = -1e30  # logit of a column that pads the vocabulary

# How the arrays of the op lie on a mesh.
_ROWS = P(reduce.ROWS)
_LOGITS = P(reduce.ROWS, None, reduce.TENSOR)


@flax.struct.dataclass
class Head:
  """The output layer: softcap(scale · (h @ kernel + bias)) / temperature.

  Attributes:
    kernel: [D, V].
    bias: [V] or None.
    vocab_size: real tokens; columns from here on only pad V.
    softcap: c in c·tanh(logits / c), or None.
    scale: factor on the logits, or None.
    temperature: of the distribution that log-probs are of, or None for 1.
    chunk: scored positions of a row per step of the loop over them, whose
      logits are computed again in the backward pass; None does all at once and
      stores them.
  """

  kernel: jax.Array
  bias: jax.Array | None
  vocab_size: int = flax.struct.field(pytree_node=False)
  softcap: float | None = flax.struct.field(pytree_node=False, default=None)
  scale: float | None = flax.struct.field(pytree_node=False, default=None)
  temperature: float | None = flax.struct.field(pytree_node=False, default=None)
  chunk: int | None = flax.struct.field(pytree_node=False, default=None)


class Scores(NamedTuple):
  """What the head says of the scored tokens, each f32[R, S]; 0 where masked.

  Attributes:
    logps: log p(target) in nats; differentiable.
    entropy: −Σ_v p(v) log p(v) in nats.
    top1: whether no token is more likely than the target.
  """

  logps: jax.Array
  entropy: jax.Array
  top1: jax.Array


def logits(hidden, head):
  """f32[..., V] logits of hidden [..., D]; padded columns are −1e30."""
  out = _logits(hidden, head)
  return jnp.where(jnp.arange(out.shape[-1]) < head.vocab_size, out, _HIDDEN)


def token_logps(hidden, head, source_index, targets, mask):
  """log p(target) from the hidden state that predicts it.

      logps[r, s] = log softmax(logits(hidden[r, source_index[r, s]]))[target]

  Args:
    hidden: [R, T, D] final hidden states, f32 or bf16.
    head: the output layer.
    source_index: i32[R, S] row positions.
    targets: i32[R, S] token ids.
    mask: bool[R, S]; where False the result is 0 and nothing is differentiated.
  Returns: f32[R, S] in nats.
  """
  return _scores(hidden, head, source_index, targets, mask, False)[0]


def token_scores(hidden, head, source_index, targets, mask):
  """`token_logps` with the entropy and top-1 hits of the same chunks.

  Args: as `token_logps`.
  Returns: Scores; nothing is differentiated through entropy and top1.
  """
  return Scores(*_scores(hidden, head, source_index, targets, mask, True))


def _scores(hidden, head, source_index, targets, mask, more):
  """The f32[R, S] of `Scores`, the first alone without `more`."""
  source, targets = (jnp.where(mask, x, 0) for x in (source_index, targets))
  found = _token_scores(more, hidden, head, source, targets)
  return tuple(jnp.where(mask, x, 0.0) for x in found)


def completion_logps(token_logps, target_slot, slots):
  """Sums token log-probs by completion.

  A compare-and-sum rather than a scatter: deterministic on every platform.

  Args:
    token_logps: f32[R, S] in nats.
    target_slot: i32[R, S], p·C + c; out of range for padding.
    slots: P·C.
  Returns: f32[R, slots].
  """
  member = target_slot[..., None] == jnp.arange(slots)
  return jnp.sum(jnp.where(member, token_logps[..., None], 0.0), axis=1)


def select(values, index):
  """values[r, index[r, ...]] of f32[R, N] by compare-and-sum."""
  member = index[..., None] == jnp.arange(values.shape[1])
  values = values.reshape(
    values.shape[0], *(1,) * (index.ndim - 1), values.shape[1]
  )
  return jnp.sum(jnp.where(member, values, 0.0), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_scores(more, hidden, head, source, targets):
  return _fwd(more, hidden, head, source, targets)[0]


def _fwd(more, hidden, head, source, targets):
  forward = _sharded(
    functools.partial(_forward, more),
    (_ROWS, _specs(head), _ROWS, _ROWS),
    (_ROWS, _ROWS, _LOGITS),
  )
  found, lse, stored = forward(hidden, head, source, targets)
  return found, (hidden, head, source, targets, lse, stored)


def _bwd(more, residual, grad):
  del more
  specs = _specs(residual[1])
  backward = _sharded(
    _backward,
    (_ROWS, specs, _ROWS, _ROWS, _ROWS, _LOGITS, _ROWS),
    (_ROWS, specs),
  )
  return *backward(*residual, grad[0]), None, None


_token_scores.defvjp(_fwd, _bwd)


def _specs(head):
  return head.replace(kernel=P(None, reduce.TENSOR), bias=P(reduce.TENSOR))


def _sharded(fn, in_specs, out_specs):
  """`fn(on_mesh, ...)` under shard_map, or plain where there is no mesh."""
  mesh = compat.ambient_mesh()
  if mesh is None:
    return functools.partial(fn, False)
  fn = functools.partial(fn, True)
  return compat.shard_map(fn, mesh, in_specs, out_specs)


def _columns(on_mesh, head):
  """Vocabulary ids of the local columns, and which of them are tokens."""
  width = head.kernel.shape[1]
  start = jax.lax.axis_index(reduce.TENSOR) * width if on_mesh else 0
  columns = start + jnp.arange(width)
  return columns, columns < head.vocab_size


def _logits(hidden, head):
  """Logits of all columns, those that only pad the vocabulary among them.

  They are left out where columns are summed: to hide them here would be one
  more pass over all.
  """
  out = jnp.einsum(
    "...d,dv->...v",
    hidden,
    head.kernel.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  if head.bias is not None:
    out += head.bias.astype(jnp.float32)
  if head.scale is not None:
    out *= head.scale
  out = attention.capped(out, head.softcap)
  return out if head.temperature is None else out / head.temperature


def chunks(chunk, *arrays, fill=0):
  """[R, S] arrays as [n, R, chunk], padded; n = 1 without a chunk."""
  length = arrays[0].shape[1]
  chunk = length if chunk is None else min(chunk, length)
  count = -(-length // chunk)
  pad = ((0, 0), (0, count * chunk - length))
  return tuple(
    jnp.pad(x, pad, constant_values=fill)
    .reshape(x.shape[0], count, chunk)
    .swapaxes(0, 1)
    for x in arrays
  )


def unchunk(x, length):
  """[n, R, chunk, ...] back to [R, S, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _forward(more, on_mesh, hidden, head, source, targets):
  """Local rows and columns: (of Scores, log Σ exp, logits | None)."""
  columns, real = _columns(on_mesh, head)

  def body(_, xs):
    source, targets = xs
    h = attention.take_rows(hidden, source)
    out = _logits(h, head)
    top = jnp.max(out, axis=-1, where=real, initial=_HIDDEN)
    total = jnp.sum(jnp.exp(out - top[..., None]), axis=-1, where=real)
    # A gather: to compare every column would be one more pass over them all.
    at = targets - columns[0]
    here = (at >= 0) & (at < columns.shape[0])
    at = jnp.where(here, at, 0)[..., None]
    target = jnp.take_along_axis(out, at, axis=-1)[..., 0]
    target = jnp.where(here, target, 0.0)
    mean = None  # Σ exp(out − top) · (out − top)
    if more:
      below = out - top[..., None]
      mean = jnp.sum(jnp.exp(below) * below, axis=-1, where=real)
    stored = out if head.chunk is None else None
    return None, (top, total, target, mean, stored)

  _, found = jax.lax.scan(body, None, chunks(head.chunk, source, targets))
  top, total, target, mean, stored = jax.tree.map(
    lambda x: unchunk(x, source.shape[1]), found
  )
  if on_mesh:
    highest = jax.lax.pmax(top, reduce.TENSOR)
    factor = jnp.exp(top - highest)
    if more:
      mean = factor * (mean + total * (top - highest))
    total, target, mean = jax.lax.psum(
      (factor * total, target, mean), reduce.TENSOR
    )
    top = highest
  lse = top + jnp.log(total)
  found = (target - lse,)
  if more:
    found += jnp.log(total) - mean / total, (target >= top).astype(jnp.float32)
  return found, lse, stored


def _backward(on_mesh, hidden, head, source, targets, lse, stored, grad):
  """Gradients of Σ grad · logps for hidden and head."""
  columns, real = _columns(on_mesh, head)
  weights = head.kernel.astype(hidden.dtype)

  def body(carry, xs):
    d_kernel, d_bias = carry
    source, targets, lse, grad = xs
    h = attention.take_rows(hidden, source)
    out = _logits(h, head) if stored is None else stored
    hit = columns == targets[..., None]
    probs = jnp.where(real, jnp.exp(out - lse[..., None]), 0.0)
    d_out = grad[..., None] * (hit - probs)
    if head.temperature is not None:
      out, d_out = out * head.temperature, d_out / head.temperature
    if head.softcap is not None:
      d_out *= 1 - jnp.square(out / head.softcap)
    if head.scale is not None:
      d_out *= head.scale
    if d_bias is not None:
      d_bias += jnp.sum(d_out, axis=(0, 1))
    d_out = d_out.astype(hidden.dtype)
    d_kernel += compat.einsum_f32("rsd,rsv->dv", h, d_out)
    d_h = compat.einsum_f32("rsv,dv->rsd", d_out, weights)
    return (d_kernel, d_bias), d_h

  kept = head.kernel, head.bias
  carry = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kept)
  # exp(logit − ∞) = 0 at padding; with 0 it would overflow for large logits.
  (lse,) = chunks(head.chunk, lse, fill=jnp.inf)
  sources, targets, grad = chunks(head.chunk, source, targets, grad)
  xs = sources, targets, lse, grad
  d_head, d_h = jax.lax.scan(body, carry, xs)
  d_h = unchunk(d_h, source.shape[1])
  d_hidden = jax.vmap(lambda i, d: jnp.zeros(hidden.shape[1:]).at[i].add(d))(
    source, d_h
  )
  if on_mesh:
    d_hidden = jax.lax.psum(d_hidden, reduce.TENSOR)
    d_head = jax.lax.psum(d_head, reduce.ROWS)
  d_kernel, d_bias = jax.tree.map(lambda d, x: d.astype(x.dtype), d_head, kept)
  d_head = head.replace(kernel=d_kernel, bias=d_bias)
  return d_hidden.astype(hidden.dtype), d_head
