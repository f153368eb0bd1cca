"""What is read of whole next-token distributions at the scored positions."""

import jax
import jax.numpy as jnp

from dpo_jax.ops import attention, logprobs


def token_kl(hidden, head, ref_hidden, ref_head, source_index, mask):
  """KL(π ‖ π_ref) of the next token at each scored position, in nats.

      kl[r, s] = Σ_v π(v) [log π(v) − log π_ref(v)], given all before it

  Args:
    hidden, ref_hidden: [R, T, D] of policy and reference.
    head, ref_head: their output layers.
    source_index: i32[R, S] row positions that predict the scored tokens.
    mask: bool[R, S]; 0 where False.
  Returns: f32[R, S].
  """

  def kl(source):
    ours = logprobs.logits(attention.take_rows(hidden, source), head)
    theirs = logprobs.logits(attention.take_rows(ref_hidden, source), ref_head)
    logp, logq = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

  return _by_chunk(kl, source_index, mask, head.chunk)


def token_log_sum_sq(hidden, head, source_index, mask):
  """log Σ_v π(v)² of the next token at each scored position.

  Args: as `token_kl`, of one model.
  Returns: f32[R, S], at most 0.
  """

  def log_sum_sq(source):
    out = logprobs.logits(attention.take_rows(hidden, source), head)
    return jax.nn.logsumexp(2 * jax.nn.log_softmax(out), axis=-1)

  return _by_chunk(log_sum_sq, source_index, mask, head.chunk)


def _by_chunk(fn, source_index, mask, chunk):
  """fn(positions [R, chunk]) at all scored positions; 0 where masked.

  Each chunk is computed again in the backward pass, which stores no logits.
  """
  (sources,) = logprobs.chunks(chunk, jnp.where(mask, source_index, 0))
  body = jax.checkpoint(lambda _, source: (None, fn(source)))
  _, values = jax.lax.scan(body, None, sources)
  return jnp.where(mask, logprobs.unchunk(values, source_index.shape[1]), 0.0)
