"""Losses without a reference: of the policy's own log-probs."""

import jax
import jax.numpy as jnp

from dpo_jax import lookup
from dpo_jax.ops.losses import base

log_sigmoid = base.log_sigmoid


def sft(policy_logps, ref_logps):
  """Negative log-likelihood of the chosen completion (Preferred-FT).

      loss = −log π(y_w | x)

  Args:
    policy_logps: f32[..., C] completion log-probs in nats; the first counts.
    ref_logps: unused; there is no reference in this loss.
  Returns: dict of f32[...]: "loss" in nats, summed over tokens.
  Optimum: the distribution of the chosen completions.
  Source: arXiv:2305.18290 section 4.
  """
  del ref_logps
  logps = policy_logps[..., 0]
  return {"loss": -logps, "logps/chosen": jax.lax.stop_gradient(logps)}


def nll(policy_logps, ref_logps, *, lengths):
  """Negative log-likelihood per token of the chosen completions.

      loss = −log π(y_w | x) / n_w, with factor n_w: the mean over tokens

  The term that RPO and MPO add to a preference loss.

  Args:
    policy_logps, ref_logps: f32[..., C] as in `sft`.
    lengths: f32[..., C] scored tokens n.
  Returns: dict of "loss" in nats a token, and "logps/chosen".
  Optimum: the distribution of the chosen completions.
  Source: arXiv:2404.19733, arXiv:2411.10442.
  """
  out = sft(policy_logps, ref_logps)
  length = lengths[..., 0]
  return {**out, "loss": (base.means(out["loss"], length), length)}


def unlikelihood(policy_logps, ref_logps, *, alpha):
  """The unlikelihood baseline of the DPO paper; unbounded below.

      loss = −log π(y_w) + α log π(y_l)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `sft`.
    alpha: α in [0, 1].
  Returns: dict of f32[...]: "loss" and the reward metrics (nats).
  Optimum: ∝ μ(y) [P(y ≻ μ) − α P(μ ≻ y)] for pairs from μ, if that is above 0
    for every y; else unbounded.
  Source: arXiv:2305.18290 appendix C.3.
  """
  del ref_logps
  loss = -policy_logps[..., 0] + alpha * policy_logps[..., 1]
  return base.with_metrics(loss, policy_logps, policy_logps)


def slic(policy_logps, ref_logps, *, delta, nll_weight):
  """SLiC-HF: a hinge on the policy's own margin, and an NLL term.

      loss = max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_w)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `sft`.
    delta: δ > 0, the margin asked for in nats.
    nll_weight: λ ≥ 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (nats).
  Optimum: with λ = 0, of two answers, a margin of ±δ.
  Source: arXiv:2305.10425 Eq. 1; the chosen for its target, as in HALOs.
  """
  del ref_logps
  loss = jax.nn.relu(delta - base.margins(policy_logps))
  loss -= nll_weight * policy_logps[..., 0]
  return base.with_metrics(loss, policy_logps, policy_logps)


def simpo(policy_logps, ref_logps, *, beta, gamma, lengths):
  """SimPO: the mean log-prob as the reward, with a margin.

      l = log π(y) / n
      loss = −log σ(β (l_w − l_l) − γ)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `sft`.
    beta: β > 0.
    gamma: γ ≥ 0.
    lengths: f32[..., 2] scored tokens n.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats a token).
  Optimum: with γ = 0, e^(n (r/β + c)), with c(x) so that it sums to 1; of two
    answers β (l_w − l_l) = log[(a + √(a² + P (1 − P))) / (1 − P)] with
    a = (2P − 1) e^γ / 2.
  Source: arXiv:2405.14734 Eq. 6.
  """
  del ref_logps
  rewards = beta * base.means(policy_logps, lengths)
  loss = -log_sigmoid(base.margins(rewards) - gamma)
  return base.with_metrics(loss, policy_logps, rewards)


def alphapo(policy_logps, ref_logps, *, beta, gamma, alpha, lengths):
  """AlphaPO: SimPO with a bent reward.

      s = (1 − e^(−α l)) / α,  l = log π(y) / n;  α → 0: s = l
      loss = −log σ(β (s_w − s_l) − γ)

  Beyond −α l = 30 the exponential goes on as its tangent.

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `sft`.
    beta: β > 0.
    gamma: γ ≥ 0.
    alpha: α, any number.
    lengths: f32[..., 2] scored tokens n.
  Returns: dict of f32[...]: "loss" and the reward metrics (β s).
  Optimum: with γ = 0, l = −log(1 − α (r/β + c)) / α.
  Source: arXiv:2501.03884.
  """
  del ref_logps
  mean = base.means(policy_logps, lengths)
  rewards = beta * -bent(-mean, alpha)
  loss = -log_sigmoid(base.margins(rewards) - gamma)
  return base.with_metrics(loss, policy_logps, rewards)


def bent(x, alpha):
  """(e^(α x) − 1) / α, its tangent beyond α x = 30; x where α = 0."""
  small = jnp.abs(alpha) < 1e-6
  scaled = x * jnp.where(small, 1.0, alpha)
  near = jnp.clip(scaled, -1.0, 1.0)  # where e^s − 1 would lose digits
  grown = jnp.where(
    jnp.abs(scaled) < 1, jnp.expm1(near), base.smooth_exp(scaled, 30.0) - 1
  )
  return jnp.where(small, x, grown / jnp.where(small, 1.0, alpha))


def orpo(policy_logps, ref_logps, *, odds_weight, lengths):
  """ORPO: fine-tuning on the chosen, and the ratio of odds.

      l = log π(y) / n,  lo = l − log(1 − e^l)
      loss = −l_w − λ log σ(lo_w − lo_l)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `sft`.
    odds_weight: λ ≥ 0.
    lengths: f32[..., 2] scored tokens n.
  Returns: dict of f32[...]: "loss" and the reward metrics (λ × nats a token).
  Optimum: none in closed form.
  Source: arXiv:2403.07691 Eq. 6 and 7.
  """
  del ref_logps
  mean = base.means(policy_logps, lengths)
  # A probability of 1 has infinite odds: beyond 1 − 1e-6, their tangent.
  inside = jnp.minimum(mean, -1e-6)
  odds = inside - jnp.log(-jnp.expm1(inside))
  odds = jnp.where(mean > -1e-6, odds + 1e6 * (mean + 1e-6), odds)
  loss = -mean[..., 0] - odds_weight * log_sigmoid(base.margins(odds))
  return base.with_metrics(loss, policy_logps, odds_weight * mean)


def cpo(policy_logps, ref_logps, *, beta, alpha, lengths, dialect):
  """CPO: DPO under a uniform reference, and an NLL term.

      paper: NLL = −log π(y_w)          trl_1: NLL = −log π(y_w) / n_w
      loss = −log σ(β (log π(y_w) − log π(y_l))) + α NLL

  TRL takes the mean over all tokens of a device's batch; here each pair has
  its own.

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `sft`.
    beta: β > 0.
    alpha: α ≥ 0 of the NLL.
    lengths: f32[..., 2] scored tokens n.
    dialect: "paper" or "trl_1".
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: e^(r/β) / Z with α = 0.
  Source: arXiv:2401.08417.
  """
  del ref_logps
  rewards = beta * policy_logps
  terms = {
    "paper": policy_logps,
    "trl_1": base.means(policy_logps, lengths),
  }
  logps = lookup.lookup(terms, dialect, "loss.dialect")
  loss = -log_sigmoid(base.margins(rewards)) - alpha * logps[..., 0]
  return base.with_metrics(loss, policy_logps, rewards)
