"""Advantages of sampled completions, from rewards token by token.

All take and return f32[B, K, N]: B prompts, K completions of each, N tokens,
padded on the right where `mask` is False; what is padded is 0 in all of them.
They are constants of the loss: no gradient is taken through them.
"""

import jax
import jax.numpy as jnp


def token_rewards(scores, logps, ref_logps, mask, *, beta):
  """Rewards of the tokens: the KL penalty of each, the score at the last.

      r_t = −β (log π(y_t) − log π_ref(y_t)) + [t is the last] · score

  Their sum is score − β Σ_t k1_t.

  Args:
    scores: f32[B, K] of whole completions.
    logps, ref_logps: f32[B, K, N] in nats, of the policy that drew them.
    mask: bool[B, K, N], which tokens there are.
    beta: coefficient of the penalty.
  Source: arXiv:1909.08593 Eq. 2, arXiv:2305.18290 Eq. 3.
  """
  penalty = jnp.where(mask, logps - ref_logps, 0.0)
  following = jnp.pad(mask[..., 1:], ((0, 0), (0, 0), (0, 1)))
  last = mask & ~following
  return jnp.where(last, scores[..., None], 0.0) - beta * penalty


def whitened(values, mask, *, keeps_mean=False):
  """Values with variance 1, and with mean 0 unless it is kept.

      (v − mean) / √(var + 1e-8) [+ mean]

  over all tokens of all completions, with the population's variance.
  """
  count = jnp.maximum(jnp.sum(mask), 1)
  mean = jnp.sum(values, where=mask) / count
  spread = jnp.sum(jnp.square(values - mean), where=mask) / count
  out = (values - mean) * jax.lax.rsqrt(spread + 1e-8)
  return jnp.where(mask, out + mean if keeps_mean else out, 0.0)


def discounted(values, *, factor):
  """Σ_{j ≥ t} factor^(j − t) · values_j, along the last axis."""

  def back(behind, value):
    total = value + factor * behind
    return total, total

  over_time = jnp.moveaxis(values, -1, 0)
  start = jnp.zeros(values.shape[:-1])
  _, sums = jax.lax.scan(back, start, over_time, reverse=True)
  return jnp.moveaxis(sums, 0, -1)


def gae(rewards, mask, values, *, gamma, lam, value_lam):
  """Generalised advantage estimation with a critic.

      δ_t = r_t + γ V_{t+1} − V_t,  V behind the last token = 0
      A_t = Σ_j (γ λ)^j δ_{t+j},    R_t = V_t + A_t with λ = value_lam

  Args:
    rewards, mask: see the module docstring.
    values: V before each token was drawn.
    gamma: γ, the discount.
    lam, value_lam: λ of the policy, and of what the critic learns.
  Returns: (advantages, returns).
  Source: arXiv:1506.02438 Eq. 16; two λ: arXiv:2503.01491.
  """
  values = jnp.where(mask, values, 0.0)
  following = jnp.pad(values[..., 1:], ((0, 0), (0, 0), (0, 1)))
  errors = jnp.where(mask, rewards + gamma * following - values, 0.0)
  advantages = discounted(errors, factor=gamma * lam)
  returns = values + discounted(errors, factor=gamma * value_lam)
  return tuple(jnp.where(mask, x, 0.0) for x in (advantages, returns))


def reinforce(rewards, mask, *, gamma):
  """What each token brought: A_t = Σ_{j ≥ t} γ^(j − t) r_j.

  Returns: (advantages, the same).
  Source: R. J. Williams, Machine Learning 8 (1992).
  """
  returns = jnp.where(mask, discounted(rewards, factor=gamma), 0.0)
  return returns, returns


def rloo(rewards, mask):
  """The whole completion against the mean of the K − 1 others of its prompt.

      A = R − Σ_{others} R / (K − 1),  R = Σ_t r_t

  Returns: (advantages, R at each token).
  Source: arXiv:2402.14740 Eq. 8.
  """
  totals = jnp.sum(rewards, axis=-1)
  count = totals.shape[1]
  others = (jnp.sum(totals, axis=1, keepdims=True) - totals) / (count - 1)
  return _at_tokens(totals - others, totals, mask)


def grpo(rewards, mask, *, scale):
  """The whole completion against the mean of its prompt's K, or in its spread.

      A = (R − mean R) / (std R + 1e-4),  R = Σ_t r_t

  Args:
    scale: "std", with that of a sample (K − 1), or "none": not divided.
  Returns: (advantages, R at each token).
  Source: arXiv:2402.03300 section 4.1; "none": arXiv:2503.20783.
  """
  totals = jnp.sum(rewards, axis=-1)
  advantages = totals - jnp.mean(totals, axis=1, keepdims=True)
  if scale == "std":
    spread = jnp.std(totals, axis=1, keepdims=True, ddof=1)
    advantages /= spread + 1e-4
  return _at_tokens(advantages, totals, mask)


def _at_tokens(advantages, totals, mask):
  return tuple(jnp.where(mask, x[..., None], 0.0) for x in (advantages, totals))
