"""Sampling with a key-value cache: temperature, top-p, stop at an end.

`sample` is pure and may be traced: inside another jit, on the rows of a mesh.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_HIDDEN = -1e30


class Samples(NamedTuple):
  """Continuations.

  Attributes:
    tokens: i32[B, N]; after the end, the first of `end_ids`.
    lengths: i32[B], tokens drawn including that which ended it.
    finished: bool[B], whether one of `end_ids` was drawn.
    logps: f32[B, N] nats of each token over all tokens, at the temperature it
      was drawn at (greedy: at 1); 0 after the end.
  """

  tokens: jax.Array
  lengths: jax.Array
  finished: jax.Array
  logps: jax.Array


def compiled(model):
  """`sample` of a model, jitted once per shape.

  A compilation each for (batch size, prompt length, max_new_tokens, end_ids,
  vocab_size); parameters, temperature and top_p are traced.
  """
  return jax.jit(
    functools.partial(sample, model),
    static_argnames=("max_new_tokens", "end_ids", "vocab_size"),
  )


def nucleus(logits, top_p):
  """Hides all but the smallest set of tokens whose probability reaches top_p.

  The most likely token always stays. `top_p` may be traced; 1 keeps all, and
  then the vocabulary is not sorted, which on a CPU costs more than the model.
  """

  def hide(logits):
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    ranked = jnp.where(before < top_p, ranked, _HIDDEN)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(ranked, back, axis=-1)

  return jax.lax.cond(top_p < 1, hide, lambda logits: logits, logits)


def _draw(logits, rngs, step, temperature, top_p, known):
  """(token, its log-prob at that temperature); temperature 0 is greedy."""
  divisor = jnp.where(temperature > 0, temperature, 1.0)
  logps = jax.nn.log_softmax(logits / divisor, axis=-1)
  if known is not None:
    index = jnp.arange(logits.shape[-1])
    logits = jnp.where(index < known, logits, _HIDDEN)
  scaled = nucleus(logits / divisor, top_p)
  keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, step)
  noise = jax.vmap(lambda key, x: jax.random.gumbel(key, x.shape))(keys, scaled)
  # One argmax serves both: adding Gumbel noise draws from the softmax. It is
  # spelled out, as XLA's own is a scalar loop on CPUs, slower than the model.
  noisy = jnp.where(temperature > 0, scaled + noise, logits)
  best = noisy == jnp.max(noisy, axis=-1, keepdims=True)
  index = jnp.arange(noisy.shape[-1], dtype=jnp.int32)
  token = jnp.min(jnp.where(best, index, noisy.shape[-1] - 1), axis=-1)
  return token, jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]


def _prefill(model, params, prompts, prompt_lengths, max_new_tokens):
  """(logits after each prompt f32[B, V], cache with room for what follows)."""
  batch, length = prompts.shape
  limit = model.config.max_positions
  if model.config.position == "learned" and length + max_new_tokens > limit:
    raise ValueError(
      f"prompts of {length} and {max_new_tokens} new tokens are more than "
      f"model.max_positions = {limit}"
    )
  cache = model.init_cache(batch, length + max_new_tokens)
  positions = jnp.broadcast_to(jnp.arange(length), prompts.shape)
  inside = positions < prompt_lengths[:, None]
  # What padding writes into the cache is overwritten before it is read: the
  # new tokens take these positions in turn.
  tokens = jnp.where(inside, prompts, 0)
  return model.decode(params, tokens, positions, cache, prompt_lengths - 1)


def _append(samples, step, token, logp, end_ids):
  """Samples with one more token each, where they have not ended."""
  live = ~samples.finished
  ended = jnp.isin(token, jnp.int32(end_ids))
  return Samples(
    samples.tokens.at[:, step].set(token),
    samples.lengths + live,
    samples.finished | (live & ended),
    samples.logps.at[:, step].set(jnp.where(live, logp, 0.0)),
  )


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
):
  """Draws one continuation per prompt.

  A continuation depends on its prompt, its example id and `rng`, not on the
  batch it is drawn in.

  Args:
    model: decoder.Model.
    params: its parameters.
    prompts: i32[B, T], padded on the right.
    prompt_lengths: i32[B], at least 1.
    example_ids: i32[B], folded into `rng`.
    rng: typed PRNG key.
    max_new_tokens: N, static.
    temperature: ≥ 0; 0 takes the most likely token.
    top_p: in (0, 1].
    end_ids: tuple of ids, each of which ends a text; () to never stop; static.
    vocab_size: ids from here on are never drawn, as the tokenizer has none of
      them (published tables have spare rows); None is all of the model's.
  Returns: Samples.
  Raises: ValueError past the end of a learned position table.
  """
  spare = vocab_size is not None and vocab_size < model.vocab_size
  known = vocab_size if spare else None
  fill = end_ids[0] if end_ids else 0
  rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, example_ids)
  logits, cache = _prefill(
    model, params, prompts, prompt_lengths, max_new_tokens
  )

  def going(carry):
    step, _, _, samples = carry
    return (step < max_new_tokens) & ~jnp.all(samples.finished)

  def body(carry):
    step, logits, cache, samples = carry
    token, logp = _draw(logits, rngs, step, temperature, top_p, known)
    token = jnp.where(samples.finished, fill, token)
    samples = _append(samples, step, token, logp, end_ids)
    positions = (prompt_lengths + step)[:, None]
    logits, cache = model.decode(
      params, token[:, None], positions, cache, jnp.zeros_like(prompt_lengths)
    )
    return step + 1, logits, cache, samples

  batch, shape = len(prompts), (len(prompts), max_new_tokens)
  samples = Samples(
    jnp.full(shape, fill, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros(batch, bool),
    jnp.zeros(shape, jnp.float32),
  )
  return jax.lax.while_loop(going, body, (0, logits, cache, samples))[3]
