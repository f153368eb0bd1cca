"""Losses of a pair that read Δ_w and Δ_l apart, and those of single labels."""

import jax
import jax.numpy as jnp

from dpo_jax import lookup
from dpo_jax.ops.losses import base, margin

log_sigmoid, sigmoid = base.log_sigmoid, jax.nn.sigmoid


def nca(policy_logps, ref_logps, *, beta):
  """NCA of a pair: noise contrast against the reference.

      loss = −log σ(β Δ_w) − ½ log σ(−β Δ_w) − ½ log σ(−β Δ_l)

  Args:
    policy_logps: f32[..., 2] completion log-probs in nats; [..., 0] is chosen.
    ref_logps: f32[..., 2], same layout; constants, no gradient.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: with β = 1 and pairs drawn from π_ref, π = 2 P(y ≻ π_ref) π_ref.
  Source: arXiv:2402.05369.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  chosen, rejected = rewards[..., 0], rewards[..., 1]
  loss = -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen)
  loss -= 0.5 * log_sigmoid(-rejected)
  return base.with_metrics(loss, policy_logps, rewards)


def sppo(policy_logps, ref_logps, *, beta):
  """SPPO with hard labels.

      loss = (Δ_w − 1 / (2β))² + (Δ_l + 1 / (2β))²

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: of free Δ, Δ(y) = (P(y ≻ μ) − ½) / β for pairs drawn from μ.
  Source: arXiv:2405.00675 Eq. 4.7 with probabilities 1 and 0.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  target = 1 / (2 * beta)
  loss = jnp.square(ratios[..., 0] - target)
  loss += jnp.square(ratios[..., 1] + target)
  return base.with_metrics(loss, policy_logps, beta * ratios)


def apo_zero(policy_logps, ref_logps, *, beta):
  """APO-zero: chosen up, rejected down, from the reference.

      loss = 1 − σ(β Δ_w) + σ(β Δ_l)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: at the boundary; the loss saturates.
  Source: arXiv:2408.06266 Eq. 7.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  loss = sigmoid(-rewards[..., 0]) + sigmoid(rewards[..., 1])
  return base.with_metrics(loss, policy_logps, rewards)


def apo_down(policy_logps, ref_logps, *, beta):
  """APO-down: both down, the rejected further.

      loss = σ(β Δ_w) + 1 − σ(β h)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: at the boundary; the loss saturates.
  Source: arXiv:2408.06266 Eq. 8.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  loss = sigmoid(rewards[..., 0]) + sigmoid(-base.margins(rewards))
  return base.with_metrics(loss, policy_logps, rewards)


def cal_dpo(policy_logps, ref_logps, *, beta):
  """Cal-DPO: log-ratios calibrated to ± 1 / (2β), and a ranking term.

      loss = −log σ(h) + ½ [(Δ_w − 1 / (2β))² + (Δ_l + 1 / (2β))²]

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: of two answers and free Δ, σ(h) + h/2 = P + (2P − 1) / (2β).
  Source: arXiv:2412.14516.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  target = 1 / (2 * beta)
  loss = -log_sigmoid(base.margins(ratios))
  loss += 0.5 * jnp.square(ratios[..., 0] - target)
  loss += 0.5 * jnp.square(ratios[..., 1] + target)
  return base.with_metrics(loss, policy_logps, beta * ratios)


def _mean(values, weights):
  """Σ w v / Σ w over a whole batch, without gradient."""
  values = jnp.where(weights != 0, jax.lax.stop_gradient(values), 0.0)
  return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1e-30)


def _running(running, value):
  """The mean over steps with this one: {"mean", "count"}."""
  count = running["count"] + 1
  mean = running["mean"] + (value - running["mean"]) / count
  return {"mean": mean, "count": count}


def bco(policy_logps, ref_logps, *, beta, weights, running, dialect):
  """BCO of a pair: a classifier of completions with a shift.

      paper: δ = mean over the steps so far of the batch's mean reward
      trl_1: δ = 0
      loss = −log σ(β Δ_w − δ) − log σ(−(β Δ_l − δ))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
    weights: f32[...] of the comparisons; 0 for padding.
    running: {"mean", "count"} of the steps before.
    dialect: "paper" (TRL up to 0.28) or "trl_1".
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats); and
    "running", for the next step.
  Optimum: for a fixed δ under which it sums to 1, π_ref odds(y ≻ μ)^(1/β)
    e^(δ/β).
  Source: arXiv:2404.04656.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  running = _running(running, _mean(jnp.mean(rewards, axis=-1), weights))
  deltas = {"paper": running["mean"], "trl_1": 0.0}
  delta = lookup.lookup(deltas, dialect, "loss.dialect")
  loss = -log_sigmoid(rewards[..., 0] - delta)
  loss -= log_sigmoid(delta - rewards[..., 1])
  out = base.with_metrics(loss, policy_logps, rewards)
  return {**out, "running": running}


def aot(policy_logps, ref_logps, *, beta, label_smoothing, weights):
  """AOT, paired: sorted margins of a batch against the reference's.

      u = sort(log πc − log πr),  v = sort(log ref_c − log ref_r)
      loss_i = −(1 − ε) log σ(β (u_i − v_i)) − ε log σ(−β (u_i − v_i))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
    label_smoothing: ε in [0, 0.5).
    weights: f32[...] of the comparisons, 0 or 1.
  Returns: dict of f32[...]: "loss" of the rank of u, and the reward metrics
    (β × nats).
  Optimum: none in closed form; dominance of the margins' distribution.
  Source: arXiv:2406.05882 (`aot_pair` in TRL up to 0.28, `aot` since).
  """
  ref_logps = jax.lax.stop_gradient(ref_logps)
  gaps = base.margins(policy_logps), base.margins(ref_logps)
  return _sorted(gaps, policy_logps, ref_logps, beta, label_smoothing, weights)


def aot_unpaired(policy_logps, ref_logps, *, beta, label_smoothing, weights):
  """AOT, unpaired: sorted chosen against sorted rejected log-ratios.

      u = sort(Δ_w),  v = sort(Δ_l)
      loss_i = −(1 − ε) log σ(β (u_i − v_i)) − ε log σ(−β (u_i − v_i))

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
    label_smoothing: ε in [0, 0.5).
    weights: f32[...] of the comparisons, 0 or 1.
  Returns: dict of f32[...]: "loss" of the rank of u, and the reward metrics
    (β × nats).
  Optimum: none in closed form; dominance of chosen over rejected rewards.
  Source: arXiv:2406.05882 (`aot` in TRL up to 0.28, `aot_unpaired` since).
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  sides = ratios[..., 0], ratios[..., 1]
  return _sorted(sides, policy_logps, ref_logps, beta, label_smoothing, weights)


def _sorted(sides, policy_logps, ref_logps, beta, label_smoothing, weights):
  real = weights > 0
  # Padding sorts behind everything, and its ranks come back to it.
  sides = [jnp.where(real, x, jnp.inf).reshape(-1) for x in sides]
  first, second = map(jnp.sort, sides)
  counted = jnp.arange(first.size) < jnp.sum(real)
  gap = jnp.where(counted, first, 0.0) - jnp.where(counted, second, 0.0)
  loss = margin.smoothed(beta * gap, label_smoothing)
  # Each rank's loss stands where the first side of that rank came from.
  loss = loss[jnp.argsort(jnp.argsort(sides[0]))].reshape(weights.shape)
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  return base.with_metrics(loss, policy_logps, rewards)


def kto_pair(policy_logps, ref_logps, *, beta, weights):
  """KTO on pairs: a side's reference point is the other's mean.

      z_w = max(0, mean Δ_w),  z_l = max(0, mean Δ_l) over the batch, sg
      loss = ½ [1 − σ(β (Δ_w − z_l)) + 1 − σ(β (z_w − Δ_l))]

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `nca`.
    beta: β > 0.
    weights: f32[...] of the comparisons; 0 for padding.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Optimum: at the boundary; the loss saturates.
  Source: arXiv:2402.01306 Eq. 7; the pairing is that of HALOs' report.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  chosen, rejected = ratios[..., 0], ratios[..., 1]
  z_chosen = jax.nn.relu(_mean(chosen, weights))
  z_rejected = jax.nn.relu(_mean(rejected, weights))
  loss = sigmoid(beta * (z_rejected - chosen))
  loss += sigmoid(beta * (rejected - z_chosen))
  return base.with_metrics(loss / 2, policy_logps, beta * ratios)


def kto(
  policy_logps,
  ref_logps,
  *,
  beta,
  desirable_weight,
  undesirable_weight,
  labels,
  weights,
):
  """KTO: single completions, each desirable or not.

      z = max(0, mean Δ of completions of other prompts), sg
      loss = λ_D [1 − σ(β (Δ − z))] if desirable, else λ_U [1 − σ(β (z − Δ))]

  Args:
    policy_logps: f32[..., 2] completion log-probs in nats; [..., 1] is that of
      a completion of another prompt, which is not trained on.
    ref_logps: f32[..., 2], same layout; constants, no gradient.
    beta: β > 0.
    desirable_weight, undesirable_weight: λ_D, λ_U > 0.
    labels: f32[...], 1 desirable, 0 not.
    weights: f32[...] of the completions; 0 for padding.
  Returns: dict of f32[...]: "loss" and the metrics of labels (β × nats).
  Optimum: at the boundary; the loss saturates.
  Source: arXiv:2402.01306.
  """
  ratios = base.log_ratios(policy_logps, ref_logps)
  z = jax.nn.relu(_mean(ratios[..., 1], weights))
  desirable = desirable_weight * sigmoid(beta * (z - ratios[..., 0]))
  undesirable = undesirable_weight * sigmoid(beta * (ratios[..., 0] - z))
  loss = jnp.where(labels > 0, desirable, undesirable)
  out = _labelled(loss, policy_logps, beta * ratios, labels)
  return {**out, "kl": jnp.broadcast_to(z, loss.shape)}


def bco_unpaired(policy_logps, ref_logps, *, beta, labels, weights, running):
  """BCO: a classifier of single completions with a shift.

      δ = mean over the steps so far of the batch's mean reward
      loss = −log σ(β Δ − δ) if desirable, else −log σ(−(β Δ − δ))

  Args:
    policy_logps: f32[..., 1] completion log-probs in nats.
    ref_logps: f32[..., 1], same layout; constants, no gradient.
    beta: β > 0.
    labels: f32[...], 1 desirable, 0 not.
    weights: f32[...] of the completions; 0 for padding.
    running: {"mean", "count"} of the steps before.
  Returns: dict of f32[...]: "loss" and the metrics of labels (β × nats); and
    "running", for the next step.
  Optimum: for a fixed δ under which it sums to 1, π_ref odds(desirable | y)^
    (1/β) e^(δ/β).
  Source: arXiv:2404.04656.
  """
  rewards = beta * base.log_ratios(policy_logps, ref_logps)
  running = _running(running, _mean(rewards[..., 0], weights))
  shifted = rewards[..., 0] - running["mean"]
  loss = -log_sigmoid(jnp.where(labels > 0, shifted, -shifted))
  out = _labelled(loss, policy_logps, rewards, labels)
  return {**out, "running": running}


def _labelled(loss, policy_logps, rewards, labels):
  """The output of a loss of labels: its metrics by label."""
  policy_logps, rewards = jax.lax.stop_gradient((policy_logps, rewards))
  desirable = (labels > 0).astype(jnp.float32)
  out = {"loss": loss}
  for name, factor in (("chosen", desirable), ("rejected", 1 - desirable)):
    out[f"rewards/{name}"] = rewards[..., 0], factor
    out[f"logps/{name}"] = policy_logps[..., 0], factor
  return out
