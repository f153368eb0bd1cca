"""Losses of a pair through the margin h = Δ_w − Δ_l."""

import jax
import jax.numpy as jnp

from dpo_jax import lookup
from dpo_jax.ops.losses import base

log_sigmoid = base.log_sigmoid


def smoothed(margin, label_smoothing):
  """−(1 − ε) log σ(margin) − ε log σ(−margin)."""
  loss = -(1 - label_smoothing) * log_sigmoid(margin)
  return loss - label_smoothing * log_sigmoid(-margin)


def dpo(policy_logps, ref_logps, *, beta, label_smoothing):
  """DPO, with label smoothing (cDPO).

      h = (log πc − log πr) − (log ref_c − log ref_r)
      loss = −(1 − ε) log σ(β h) − ε log σ(−β h)

  TRL from 0.29 on ignores ε here.

  Args:
    policy_logps: f32[..., 2] completion log-probs in nats; [..., 0] is chosen.
    ref_logps: f32[..., 2], same layout; constants, no gradient.
    beta: β > 0, strength of the pull to the reference.
    label_smoothing: ε in [0, 0.5), assumed share of flipped labels.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: π_ref e^(r/β) / Z; with ε, of two answers, βh = log((1 − ε) / ε)
    where labels are certain.
  Source: arXiv:2305.18290 Eq. 7; ε: Mitchell, "A note on DPO with noisy
    preferences", Eq. 3.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  loss = smoothed(base.margins(rewards), label_smoothing)
  return base.with_metrics(loss, policy_logps, rewards)


def robust(policy_logps, ref_logps, *, beta, label_smoothing):
  """Robust DPO: unbiased when a share ε of the labels is flipped.

      loss = [−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε)

  Unbounded below as h grows.

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
    label_smoothing: ε in [0, 0.5), share of flipped labels.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: that of DPO on the labels before they were flipped.
  Source: arXiv:2403.00409.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  margin = base.margins(rewards)
  loss = -(1 - label_smoothing) * log_sigmoid(margin)
  loss += label_smoothing * log_sigmoid(-margin)
  loss /= 1 - 2 * label_smoothing
  return base.with_metrics(loss, policy_logps, rewards)


def ipo(policy_logps, ref_logps, *, beta, lengths, dialect):
  """IPO: regression of the margin to 1 / (2τ).

      paper:    h = Δ_w / n_w − Δ_l / n_l     (per-token means; TRL, HALOs)
      original: h = Δ_w − Δ_l                 (sums)
      loss = (h − 1 / (2β))²

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: the paper's τ > 0.
    lengths: f32[..., 2] scored tokens n.
    dialect: "paper" or "original" (the original DPO repository).
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats, summed
    over tokens in both dialects).
  Optimum: h = (P(y ≻ μ) − P(y' ≻ μ)) / τ for pairs drawn from μ, of means or
    of sums as in the loss.
  Source: arXiv:2310.12036 Eq. 17; the mean over tokens is what its authors ran.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  scores = lookup.lookup(
    {"paper": base.means(ratios, lengths), "original": ratios},
    dialect,
    "loss.dialect",
  )
  loss = jnp.square(base.margins(scores) - 1 / (2 * beta))
  return base.with_metrics(loss, policy_logps, beta * ratios)


def hinge(policy_logps, ref_logps, *, beta):
  """Hinge loss on the margin (RSO).

      loss = max(0, 1 − β h)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0, the paper's γ.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: of two answers, βh = ±1 for the likelier winner.
  Source: arXiv:2309.06657, its hinge-norm loss; arXiv:2305.10425.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  loss = jax.nn.relu(1 - base.margins(rewards))
  return base.with_metrics(loss, policy_logps, rewards)


def exo(policy_logps, ref_logps, *, beta, label_smoothing):
  """EXO of a pair: reverse KL to the smoothed label.

      q = σ(β h)
      loss = q [log q − log(1 − ε)] + (1 − q) [log(1 − q) − log ε]

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
    label_smoothing: ε in (0, 0.5).
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: of two answers, βh = (2P − 1) log((1 − ε) / ε).
  Source: arXiv:2402.00856 Eq. 16.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  margin = base.margins(rewards)
  loss = jax.nn.sigmoid(margin) * (
    log_sigmoid(margin) - jnp.log1p(-label_smoothing)
  )
  loss += jax.nn.sigmoid(-margin) * (
    log_sigmoid(-margin) - jnp.log(label_smoothing)
  )
  return base.with_metrics(loss, policy_logps, rewards)


def discopop(policy_logps, ref_logps, *, beta, temperature):
  """DiscoPOP: a blend of the logistic and the exponential loss.

      m = σ(β h / τ)
      loss = −(1 − m) log σ(β h) + m e^(−β h)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
    temperature: τ in (0, 1] of the blend.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: none in closed form; not convex.
  Source: arXiv:2406.08414 Eq. 5.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  margin = base.margins(rewards)
  blend = margin / temperature
  loss = -jax.nn.sigmoid(-blend) * log_sigmoid(margin)
  # m and e^(−βh) in one exponent: apart they are 0 · ∞ for large −h.
  loss += jnp.exp(log_sigmoid(blend) - margin)
  return base.with_metrics(loss, policy_logps, rewards)


def chi_po(policy_logps, ref_logps, *, beta):
  """χPO: DPO with the link of a mixture of χ² and KL.

      φ(Δ) = Δ + e^Δ − 1, beyond Δ = 20 with e^20 (Δ − 19) for e^Δ
      loss = −log σ(β [φ(Δ_w) − φ(Δ_l)])

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β φ).
  Optimum: u + log u = r/β + c for u = π / π_ref.
  Source: arXiv:2407.13399; where it clips the exponential, its tangent
    goes on here.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  rewards = beta * (ratios + base.smooth_exp(ratios, 20.0) - 1)
  loss = -log_sigmoid(base.margins(rewards))
  return base.with_metrics(loss, policy_logps, rewards)


def dpop(policy_logps, ref_logps, *, beta, penalty):
  """DPO-Positive: a penalty where the chosen log-prob falls.

      loss = −log σ(β [h − λ max(0, −Δ_w)])

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
    penalty: λ ≥ 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: none in closed form; that of DPO with λ = 0.
  Source: arXiv:2402.13228.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  fall = jax.nn.relu(-ratios[..., 0])
  loss = -log_sigmoid(beta * (base.margins(ratios) - penalty * fall))
  return base.with_metrics(loss, policy_logps, beta * ratios)


def odpo(policy_logps, ref_logps, *, beta, alpha, scores):
  """ODPO: the margin must exceed an offset from the scores.

      loss = −log σ(β h − α log(s_w − s_l))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
    alpha: α ≥ 0, scale of the offset.
    scores: f32[..., 2] of the data, s_w > s_l.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: at the boundary, since labels that follow the scores are certain;
    that of DPO with α = 0.
  Source: arXiv:2402.10571.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  gap = base.margins(scores)
  offset = alpha * jnp.log(jnp.where(gap > 0, gap, 1.0))  # 0 where padding
  loss = -log_sigmoid(base.margins(rewards) - offset)
  return base.with_metrics(loss, policy_logps, rewards)
