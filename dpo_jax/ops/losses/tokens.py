"""Losses of a pair that look at tokens: how many, which, how likely."""

import jax
import jax.numpy as jnp

from dpo_jax import lookup
from dpo_jax.ops.losses import base

log_sigmoid = base.log_sigmoid


def ln_dpo(policy_logps, ref_logps, *, beta, lengths):
  """Length-normalised DPO (Tülu 3).

      loss = −log σ(β (Δ_w / n_w − Δ_l / n_l))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`.
    beta: β > 0, for means over tokens.
    lengths: f32[..., 2] scored tokens n.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats a token).
  Optimum: π_ref e^(n (r/β + c)), with c(x) so that it sums to 1.
  Source: arXiv:2411.15124 Eq. 6.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  rewards = beta * base.means(ratios, lengths)
  loss = -log_sigmoid(base.margins(rewards))
  return base.with_metrics(loss, policy_logps, rewards)


def r_dpo(policy_logps, ref_logps, *, beta, alpha, lengths):
  """R-DPO: DPO of a reward less α a token.

      loss = −log σ(β h + α (n_w − n_l))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`.
    beta: β > 0.
    alpha: α ≥ 0, price of a token.
    lengths: f32[..., 2] scored tokens n.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: π_ref e^((r − α n) / β) / Z.
  Source: arXiv:2403.19159.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  loss = -log_sigmoid(base.margins(rewards) + alpha * base.margins(lengths))
  return base.with_metrics(loss, policy_logps, rewards)


def tdpo1(policy_logps, ref_logps, *, beta, sequence_kl):
  """TDPO 1: DPO with the difference of the sequence KLs.

      K = Σ_t KL(π_ref ‖ π) at t
      loss = −log σ(β [h − (K_l − K_w)])

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`.
    beta: β > 0.
    sequence_kl: f32[..., 2] K in nats, differentiated.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: that of DPO where both answers have the same K, as single tokens do.
  Source: arXiv:2404.11999.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  margin = base.margins(rewards) + beta * base.margins(sequence_kl)
  return base.with_metrics(-log_sigmoid(margin), policy_logps, rewards)


def tdpo2(policy_logps, ref_logps, *, beta, alpha, sequence_kl):
  """TDPO 2: TDPO 1 scaled, without gradient through the chosen KL.

      loss = −log σ(β [h − α (K_l − sg K_w)])

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`.
    beta: β > 0.
    alpha: α ≥ 0.
    sequence_kl: f32[..., 2] K in nats, as in `tdpo1`.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: none in closed form; that of DPO with α = 0.
  Source: arXiv:2404.11999.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  chosen = jax.lax.stop_gradient(sequence_kl[..., 0])
  margin = base.margins(rewards) - beta * alpha * (sequence_kl[..., 1] - chosen)
  return base.with_metrics(-log_sigmoid(margin), policy_logps, rewards)


def sampo(policy_logps, ref_logps, *, beta, common_logps, ref_common_logps):
  """SamPO: DPO on equally many random tokens of both completions.

      Δ = Σ over min(n_w, n_l) tokens, drawn anew each step, the same for
          policy and reference
      loss = −log σ(β (Δ_w − Δ_l))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`, for the metrics.
    beta: β > 0.
    common_logps, ref_common_logps: f32[..., 2] sums over the drawn tokens.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats, of all
    tokens).
  Optimum: that of DPO where both completions have the same length.
  Source: arXiv:2406.10957; its code draws for each model apart.
  """
  drawn = base.log_ratios(common_logps, ref_common_logps)
  loss = -log_sigmoid(beta * base.margins(drawn))
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  return base.with_metrics(loss, policy_logps, rewards)


def ld_dpo(
  policy_logps, ref_logps, *, beta, alpha, prefix_logps, ref_prefix_logps
):
  """LD-DPO: the tail beyond the shorter length counts less.

      log π := Σ_{t ≤ min(n_w, n_l)} + α Σ_{t > min(n_w, n_l)}, both models
      loss = −log σ(β h)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`.
    beta: β > 0.
    alpha: α in [0, 1].
    prefix_logps, ref_prefix_logps: f32[..., 2] of the first min(n_w, n_l)
      tokens.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats, of all
    tokens).
  Optimum: that of DPO where both completions have the same length, or α = 1.
  Source: arXiv:2409.06411.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  prefix = base.log_ratios(prefix_logps, ref_prefix_logps)
  weighed = prefix + alpha * (ratios - prefix)
  loss = -log_sigmoid(beta * base.margins(weighed))
  return base.with_metrics(loss, policy_logps, beta * ratios)


def wpo(policy_logps, ref_logps, *, beta, lengths, sum_sq_probs, dialect):
  """WPO: DPO weighted by how likely the policy is to write the pair.

      w = exp(1/n Σ_t [log π(y_t) − log Σ_v π(v)²])
      paper:  loss = −sg(w_w w_l) log σ(β h)
      trl_1:  loss = −sg(min(1, w_w w_l)) log σ(β h)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `margin.dpo`.
    beta: β > 0.
    lengths: f32[..., 2] scored tokens n.
    sum_sq_probs: f32[..., 2] Σ_t log Σ_v π(v)².
    dialect: "paper" or "trl_1".
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: that of DPO (the weight is the same for both orders of a pair).
  Source: arXiv:2406.11827 Eq. 2.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  each = base.means(policy_logps - sum_sq_probs, lengths)
  both = jax.lax.stop_gradient(jnp.sum(each, axis=-1))
  bounds = {"paper": 80.0, "trl_1": 0.0}  # e^80: only so that it is finite
  bound = lookup.lookup(bounds, dialect, "loss.dialect")
  loss = -log_sigmoid(base.margins(rewards))
  loss *= jnp.exp(jnp.minimum(both, bound))
  return base.with_metrics(loss, policy_logps, rewards)
