"""Preference losses: pure functions of completion log-probs.

Every loss is `f(policy_logps, ref_logps, *, ...) -> dict` with "loss" and the
reward metrics per comparison. Notation: Δ = log π − log π_ref of a completion,
h = Δ_w − Δ_l, ε the label smoothing, σ the logistic function. A numeric field
of `config.loss` is traced and may change without recompiling; a text field
(a dialect) is static.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import lookup


class Loss(NamedTuple):
  """An entry of LOSSES.

  Attributes:
    fn: the loss.
    needs: names of further arguments computed beside the log-probs, each
      f32[..., 2] per comparison: "lengths" (scored tokens).
    batch_level: whether the examples of a batch are coupled.
  """

  fn: Callable
  needs: tuple[str, ...] = ()
  batch_level: bool = False


def _log_ratios(policy_logps, ref_logps):
  """Δ f32[..., 2] in nats; the reference is a constant."""
  return policy_logps - jax.lax.stop_gradient(ref_logps)


def _with_metrics(loss, policy_logps, rewards):
  """Adds the metrics that every pairwise loss reports, without gradient."""
  policy_logps, rewards = jax.lax.stop_gradient((policy_logps, rewards))
  chosen, rejected = rewards[..., 0], rewards[..., 1]
  # A tie counts one half: at policy = reference the accuracy is 0.5, not 0.
  accuracy = 0.5 * (1.0 + jnp.sign(chosen - rejected))
  return {
    "loss": loss,
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": accuracy,
    "logps/chosen": policy_logps[..., 0],
    "logps/rejected": policy_logps[..., 1],
  }


def dpo(policy_logps, ref_logps, *, beta, label_smoothing):
  """DPO, with label smoothing (cDPO).

      h = (log πc − log πr) − (log ref_c − log ref_r)
      loss = −(1 − ε) log σ(β h) − ε log σ(−β h)

  Args:
    policy_logps: f32[..., 2] completion log-probs in nats; [..., 0] is chosen.
    ref_logps: f32[..., 2], same layout; constants, no gradient.
    beta: β > 0, strength of the pull to the reference.
    label_smoothing: ε in [0, 0.5), assumed share of flipped labels.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Source: arXiv:2305.18290 Eq. 7; ε: Mitchell, "A note on DPO with noisy
    preferences", Eq. 3.
  """
  rewards = beta * _log_ratios(policy_logps, ref_logps)
  margin = rewards[..., 0] - rewards[..., 1]
  loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
  loss -= label_smoothing * jax.nn.log_sigmoid(-margin)
  return _with_metrics(loss, policy_logps, rewards)


def ipo(policy_logps, ref_logps, *, beta, lengths, dialect):
  """IPO: regression of the margin to 1 / (2τ).

      paper:    h = Δ_w / n_w − Δ_l / n_l     (per-token means)
      original: h = Δ_w − Δ_l                 (sums)
      loss = (h − 1 / (2β))²

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: the paper's τ > 0.
    lengths: f32[..., 2] scored tokens n.
    dialect: "paper" or "original" (the original DPO repository).
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats, summed
    over tokens in both dialects).
  Source: arXiv:2310.12036 Eq. 17; the mean over tokens is what its authors ran.
  """
  ratios = _log_ratios(policy_logps, ref_logps)
  scores = lookup.lookup(
    {"paper": ratios / jnp.maximum(lengths, 1.0), "original": ratios},
    dialect,
    "loss.dialect",
  )
  h = scores[..., 0] - scores[..., 1]
  loss = jnp.square(h - 1 / (2 * beta))
  return _with_metrics(loss, policy_logps, beta * ratios)


def hinge(policy_logps, ref_logps, *, beta):
  """Hinge loss on the margin (RSO).

      loss = max(0, 1 − β h)

  Args:
    policy_logps, ref_logps: f32[..., 2] as in `dpo`.
    beta: β > 0.
  Returns: dict of f32[...]: "loss" and the reward metrics (β × nats).
  Source: arXiv:2309.06657, its hinge-norm loss; arXiv:2305.10425.
  """
  rewards = beta * _log_ratios(policy_logps, ref_logps)
  loss = jax.nn.relu(1 - (rewards[..., 0] - rewards[..., 1]))
  return _with_metrics(loss, policy_logps, rewards)


def sft(policy_logps, ref_logps):
  """Negative log-likelihood of the (chosen) completion.

      loss = −log π(y_w | x)

  Args:
    policy_logps: f32[..., K] completion log-probs in nats; the first counts.
    ref_logps: unused; there is no reference in this loss.
  Returns: dict of f32[...]: "loss" in nats, summed over tokens.
  Source: arXiv:2305.18290 section 4 (Preferred-FT).
  """
  del ref_logps
  return {
    "loss": -policy_logps[..., 0],
    "logps/chosen": jax.lax.stop_gradient(policy_logps[..., 0]),
  }


LOSSES = {
  "dpo": Loss(dpo),
  "ipo": Loss(ipo, needs=("lengths",)),
  "hinge": Loss(hinge),
  "sft": Loss(sft),
}
