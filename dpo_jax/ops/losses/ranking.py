"""Losses of rankings, and of scalar rewards."""

import jax
import jax.numpy as jnp

from dpo_jax.ops.losses import base


def plackett_luce(policy_logps, ref_logps, *, beta, present):
  """Plackett–Luce: DPO of a ranking of K completions.

      loss = −Σ_k [β Δ_k − log Σ_{j ≥ k} e^(β Δ_j)], best first

  Args:
    policy_logps: f32[..., K] completion log-probs in nats, best first.
    ref_logps: f32[..., K], same layout; constants, no gradient.
    beta: β > 0.
    present: bool[..., K]; False behind the last of a shorter ranking.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats) of the
    first against the last.
  Optimum: π_ref e^(r/β) / Z.
  Source: arXiv:2305.18290 Eq. 20; K = 2 is its Eq. 7.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  ranks = jnp.arange(rewards.shape[-1])
  behind = (ranks > ranks[:, None]) & present[..., None, :]
  counts = jnp.any(behind, axis=-1) & present
  # A sum over none would be −∞; the last rank's is of itself and not counted.
  behind |= ~counts[..., None] & (ranks == ranks[:, None])
  others = jax.nn.logsumexp(rewards[..., None, :], axis=-1, where=behind)
  # z − log(e^z + e^o) = log σ(z − o), which keeps the digits of small losses.
  terms = jnp.where(counts, base.log_sigmoid(rewards - others), 0.0)
  last = jnp.sum(present, axis=-1, keepdims=True) - 1

  def ends(values):
    worst = jnp.take_along_axis(values, jnp.maximum(last, 0), axis=-1)
    return jnp.concatenate([values[..., :1], worst], axis=-1)

  loss = -jnp.sum(terms, axis=-1)
  return base.with_metrics(loss, ends(policy_logps), ends(rewards))


def bradley_terry(rewards):
  """The loss of a reward model.

      loss = −log σ(r(x, y_w) − r(x, y_l))

  Args:
    rewards: f32[..., 2], [..., 0] of the chosen.
  Returns: dict of f32[...]: "loss" and the reward metrics.
  Optimum: r* up to a shift per prompt.
  Source: arXiv:2305.18290 Eq. 2.
  """
  loss = -base.log_sigmoid(base.margins(rewards))
  out = base.with_metrics(loss, rewards, rewards)
  return {k: v for k, v in out.items() if not k.startswith("logps/")}
