"""The clipped losses of policy and critic, per token."""

import jax.numpy as jnp


def policy(logps, old_logps, advantages, *, clip):
  """The clipped surrogate, f32[…] per token.

      −min(ρ A, clip(ρ, 1 − c, 1 + c) A),  ρ = π / π_old

  Args:
    logps: log-probs in nats, differentiated.
    old_logps: those of the policy that drew the tokens.
    advantages: A.
    clip: c > 0.
  Returns: (loss, whether the clip decides: 1 or 0).
  Source: arXiv:1707.06347 Eq. 7.
  """
  ratio = jnp.exp(logps - old_logps)
  free = -advantages * ratio
  held = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
  return jnp.maximum(free, held), (held > free).astype(jnp.float32)


def value(values, old_values, returns, *, clip):
  """The clipped squared error of the critic, f32[…] per token.

      ½ max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)

  Returns: (loss, whether the clip decides: 1 or 0).
  Source: the PPO of arXiv:1909.08593.
  """
  near = jnp.clip(values, old_values - clip, old_values + clip)
  free, held = jnp.square(values - returns), jnp.square(near - returns)
  return 0.5 * jnp.maximum(free, held), (held > free).astype(jnp.float32)


def averaged(sums, lengths, weights, average):
  """(values, weights) of completions, of sums over their tokens.

  Args:
    sums, lengths, weights: f32[R, P·C] of each completion.
    average: "tokens": all tokens of the batch count the same; "sums": a
      completion is the sum over its tokens; "means": it is their mean.
  """
  if average == "sums":
    return sums, weights
  means = sums / jnp.maximum(lengths, 1)
  return means, weights * lengths if average == "tokens" else weights
