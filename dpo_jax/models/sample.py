"""Sampling with a key-value cache: temperature, top-p, stop at an end.

`sample` is pure and may be traced: inside another jit, on the rows of a mesh.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models import decoder, unstacked

_HIDDEN = -1e30
# Columns that are drawn from together; V is a multiple of it.
_BLOCK = 128
# Bytes of layers up to which each gets a copy of its own while tokens are
# drawn. Larger models have no room for it, and lose less by the copying.
_COPIED = 4 * 2**30
_ONE = 0x3F800000  # the bits of 1.0


class Samples(NamedTuple):
  """Continuations.

  Attributes:
    tokens: i32[B, N]; after the end, the first of `end_ids`.
    lengths: i32[B], tokens drawn including that which ended it.
    finished: bool[B], whether one of `end_ids` was drawn, or of `stops` all.
    logps: f32[B, N] nats of each token under the model at the temperature of
      the draw (1 where that is 0), over all tokens, whatever top-p hid; 0 after
      the end.
  """

  tokens: jax.Array
  lengths: jax.Array
  finished: jax.Array
  logps: jax.Array


def compiled(model):
  """`sample` of a model, jitted once per shape.

  A compilation each for (prompts, their length, draws, max_new_tokens, end_ids,
  vocab_size, stops); parameters, temperature and top_p are traced.
  """
  return jax.jit(
    functools.partial(sample, model),
    static_argnames=("max_new_tokens", "end_ids", "vocab_size", "stops"),
  )


def nucleus(logits, top_p):
  """Hides all but the smallest set of tokens whose probability reaches top_p.

  The most likely token always stays; of equally likely ones the first do. The
  least probability that stays is found by halving, in the 31 bits of an f32
  between 0 and 1: to sort a vocabulary takes a CPU longer than the model.

  Args:
    logits: f32[B, V].
    top_p: in (0, 1], may be traced.
  """
  probs = jax.nn.softmax(logits, axis=-1)
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def mass(least):
    inside = bits >= least[:, None]
    return jnp.sum(jnp.where(inside, probs, 0.0), axis=-1)

  def halve(_, bounds):  # the mass from `low` on reaches top_p, from `high` not
    low, high = bounds
    middle = low + (high - low) // 2
    reaches = mass(middle) >= top_p
    return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

  none = jnp.zeros(len(logits), jnp.int32)
  least, above = jax.lax.fori_loop(0, 31, halve, (none, none + _ONE + 1))
  last = bits == least[:, None]
  earlier = jnp.cumsum(last, axis=-1) - last
  before = mass(above)[:, None] + earlier * probs
  stays = (bits > least[:, None]) | (last & (before < top_p))
  return jnp.where(stays, logits, _HIDDEN)


def _block_sums(logits):
  """(largest, log Σ exp) of each block of columns: f32[B, V / 128] both."""
  blocks = logits.reshape(len(logits), -1, _BLOCK)
  top = jnp.max(blocks, axis=-1)
  return top, top + jnp.log(jnp.sum(jnp.exp(blocks - top[..., None]), axis=-1))


def pick(logits, keys, greedy):
  """A token of each row: of softmax(logits), or its most likely one.

  First its block of columns is drawn, then the column: the same distribution,
  with a noise for each block and for each column of one, not for all columns.
  Both are drawn by the largest of logit + Gumbel noise.

  Args:
    logits: f32[B, V], V a multiple of 128.
    keys: PRNG keys [B].
    greedy: whether it is the most likely, may be traced.
  Returns: i32[B].
  """
  top, total = _block_sums(logits)
  count = total.shape[1]
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (count + _BLOCK,)))(keys)
  noise = jnp.where(greedy, 0.0, noise)
  scores = jnp.where(greedy, top, total) + noise[:, :count]
  block = jnp.argmax(scores, axis=-1)[:, None]
  columns = logits.reshape(len(logits), count, _BLOCK)
  columns = jnp.take_along_axis(columns, block[..., None], axis=1)[:, 0]
  column = jnp.argmax(columns + noise[:, count:], axis=-1)
  return (block[:, 0] * _BLOCK + column).astype(jnp.int32)


def _draw(logits, rngs, step, temperature, top_p, known):
  """(token, its log-prob, see Samples); temperature 0 is greedy."""
  greedy = temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, jnp.maximum(temperature, 1e-6))
  total = jax.nn.logsumexp(_block_sums(scaled)[1], axis=-1)
  allowed = scaled
  if known is not None:
    index = jnp.arange(logits.shape[-1])
    allowed = jnp.where(index < known, scaled, _HIDDEN)
  keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, step)
  token = jax.lax.cond(
    top_p < 1,
    lambda logits: pick(nucleus(logits, top_p), keys, greedy),
    lambda logits: pick(logits, keys, greedy),
    allowed,
  )
  chosen = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
  return token, chosen - total


def _append(samples, step, token, logp, end_ids, stops):
  """Samples with one more token each, where they have not ended."""
  live = ~samples.finished
  token = jnp.where(live, token, end_ids[0] if end_ids else 0)
  tokens = samples.tokens.at[:, step].set(token)
  ended = jnp.isin(token, jnp.int32(end_ids))
  for ids in stops:
    ended |= _end_in(tokens, step, ids)
  return Samples(
    tokens,
    samples.lengths + live,
    samples.finished | (live & ended),
    samples.logps.at[:, step].set(jnp.where(live, logp, 0.0)),
  )


def _end_in(tokens, step, ids):
  """bool[B]: whether the tokens up to that of `step` end in some ids."""
  size = len(ids)
  if size > tokens.shape[1]:
    return jnp.zeros(len(tokens), bool)
  last = jax.lax.dynamic_slice_in_dim(tokens, step + 1 - size, size, axis=1)
  return (step >= size - 1) & jnp.all(last == jnp.int32(ids), axis=1)


def _prefill(model, params, prompts, prompt_lengths, draws, max_new_tokens):
  """(params, logits f32[B · draws, V] after each prompt, cache) to decode with.

  A prompt is computed once for its draws.
  """
  length = prompts.shape[1]
  limit = model.config.max_positions
  if model.config.position == "learned" and length + max_new_tokens > limit:
    raise ValueError(
      f"prompts of {length} and {max_new_tokens} new tokens are more than "
      f"model.max_positions = {limit}"
    )
  logits, cache = model.prefill(params, prompts, prompt_lengths)
  # What padding left in the cache is overwritten before it is read: the new
  # tokens take these positions in turn.
  room = ((0, 0), (0, 0), (0, 0), (0, max_new_tokens), (0, 0))
  logits, cache = (
    jnp.repeat(logits, draws, axis=0),
    jax.tree.map(lambda x: jnp.pad(jnp.repeat(x, draws, axis=1), room), cache),
  )
  stacks = [params[name] for name in decoder.stacks(model.config)]
  size = jnp.dtype(model.config.dtype).itemsize
  if sum(size * math.prod(x.shape) for x in jax.tree.leaves(stacks)) <= _COPIED:
    params = unstacked.params_of(model.config, params)
    cache = unstacked.cache_of(cache)
  return params, logits, cache


def sample(
  model,
  params,
  prompts,
  prompt_lengths,
  example_ids,
  rng,
  *,
  max_new_tokens,
  temperature,
  top_p,
  end_ids,
  vocab_size=None,
  stops=(),
):
  """Draws continuations of prompts, K of each.

  A continuation depends on its prompt, its example id and `rng`, not on the
  batch it is drawn in.

  Args:
    model: decoder.Model.
    params: its parameters.
    prompts: i32[B, T], padded on the right.
    prompt_lengths: i32[B], at least 1.
    example_ids: i32[B · K], K for each prompt in turn, folded into `rng`.
    rng: typed PRNG key.
    max_new_tokens: N, static.
    temperature: ≥ 0; 0 takes the most likely token.
    top_p: in (0, 1].
    end_ids: tuple of ids, each of which ends a text; () to never stop; static.
    vocab_size: ids from here on are never drawn, as the tokenizer has none of
      them (published tables have spare rows); None is all of the model's.
    stops: tuple of tuples of ids, each of which ends a text too, once all of it
      was drawn; static.
  Returns: Samples of B · K rows.
  Raises: ValueError past the end of a learned position table, and for ids that
    are not as many for each prompt.
  """
  rows = len(example_ids)
  if rows % len(prompts):
    raise ValueError(
      f"{rows} example_ids are not as many for each of {len(prompts)} prompts"
    )
  draws = rows // len(prompts)
  spare = vocab_size is not None and vocab_size < model.vocab_size
  known = vocab_size if spare else None
  rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, example_ids)
  params, logits, cache = _prefill(
    model, params, prompts, prompt_lengths, draws, max_new_tokens
  )

  def drawn(step, logits, samples):
    token, logp = _draw(logits, rngs, step, temperature, top_p, known)
    return _append(samples, step, token, logp, end_ids, stops)

  samples = drawn(0, logits, _none(rows, max_new_tokens))
  starts = jnp.repeat(prompt_lengths, draws)
  samples = _continue(model, params, cache, starts, samples, drawn)
  after = jnp.arange(max_new_tokens) >= samples.lengths[:, None]
  fill = end_ids[0] if end_ids else 0
  return samples._replace(tokens=jnp.where(after, fill, samples.tokens))


def _none(rows, max_new_tokens):
  """Samples without a token."""
  shape = rows, max_new_tokens
  return Samples(
    jnp.zeros(shape, jnp.int32),
    jnp.zeros(rows, jnp.int32),
    jnp.zeros(rows, bool),
    jnp.zeros(shape, jnp.float32),
  )


def _continue(model, params, cache, starts, samples, drawn):
  """Samples of one token to their end, or the last step.

  Args:
    model, params, cache: to decode with.
    starts: i32[B], the position of the first token of each.
    samples: Samples.
    drawn: (step, logits, samples) -> samples with the token of that step.
  """

  def going(carry):
    step, _, samples = carry
    return (step < samples.tokens.shape[1]) & ~jnp.all(samples.finished)

  def body(carry):
    step, cache, samples = carry
    last = jax.lax.dynamic_slice_in_dim(samples.tokens, step - 1, 1, axis=1)
    positions = (starts + step - 1)[:, None]
    at = jnp.zeros_like(starts)
    logits, cache = model.decode(params, last, positions, cache, at)
    return step + 1, cache, drawn(step, logits, samples)

  return jax.lax.while_loop(going, body, (1, cache, samples))[2]
