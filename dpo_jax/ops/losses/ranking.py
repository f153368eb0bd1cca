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
  ends = _ends(policy_logps, present), _ends(rewards, present)
  return base.with_metrics(_of_order(rewards, present), *ends)


def bradley_terry(rewards, *, label_smoothing, centring):
  """The loss of a reward model.

      m = r(x, y_w) − r(x, y_l)
      loss = −(1−ε) log σ(m) − ε log σ(−m) + c (r(x, y_w) + r(x, y_l))²

  Args:
    rewards: f32[..., 2], [..., 0] of the chosen.
    label_smoothing: ε in [0, 0.5), the share of wrong labels.
    centring: c ≥ 0; without it only differences of rewards count. 0.01 is
      advised.
  Returns: dict of f32[...]: "loss", the reward metrics and "nll", −log σ(m).
  Optimum: r* up to a shift per prompt (ε = c = 0).
  Source: arXiv:2305.18290 Eq. 2; the last term arXiv:2312.09244 Eq. 2.
  """
  margin = base.margins(rewards)
  won, lost = base.log_sigmoid(margin), base.log_sigmoid(-margin)
  loss = -(1 - label_smoothing) * won - label_smoothing * lost
  loss += centring * jnp.square(jnp.sum(rewards, axis=-1))
  return _of_rewards(loss, -won, rewards)


def bradley_terry_margin(rewards, *, alpha, centring, scores):
  """Bradley–Terry with margins from the data's scores.

      m = r(x, y_w) − r(x, y_l)
      loss = −log σ(m − α (s_w − s_l)) + c (r(x, y_w) + r(x, y_l))²

  Args:
    rewards: f32[..., 2], [..., 0] of the chosen.
    alpha: α ≥ 0, rewards per unit of the scores.
    centring: c ≥ 0, as that of bradley_terry.
    scores: f32[..., 2], of the data, same layout.
  Returns: dict of f32[...], as bradley_terry.
  Optimum: r* + α s up to a shift per prompt, where scores say nothing of the
    labels (c = 0).
  Source: arXiv:2307.09288 Eq. 2, whose margins are steps of a scale.
  """
  margin = base.margins(rewards)
  gap = jax.lax.stop_gradient(base.margins(scores))
  loss = -base.log_sigmoid(margin - alpha * gap)
  loss += centring * jnp.square(jnp.sum(rewards, axis=-1))
  return _of_rewards(loss, -base.log_sigmoid(margin), rewards)


def plackett_luce_reward(rewards, *, centring, present):
  """Of a reward model, of rankings.

      loss = −Σ_k [r_k − log Σ_{j ≥ k} e^(r_j)] + c (2 r̄)², best first

  Args:
    rewards: f32[..., K], best first.
    centring: c ≥ 0; r̄ is the mean of the ranking, so that K = 2 is
      bradley_terry.
    present: bool[..., K]; False behind the last of a shorter ranking.
  Returns: dict of f32[...]: "loss", the reward metrics of the first against
    the last, and "nll", the loss without its last term.
  Optimum: r* up to a shift per prompt (c = 0).
  Source: arXiv:2305.18290 Eq. 18; the last term as that of bradley_terry.
  """
  nll = _of_order(rewards, present)
  count = jnp.maximum(jnp.sum(present, axis=-1), 1)
  mean = jnp.sum(jnp.where(present, rewards, 0.0), axis=-1) / count
  loss = nll + centring * jnp.square(2 * mean)
  return _of_rewards(loss, nll, _ends(rewards, present))


def _of_order(rewards, present):
  """−log of the probability of an order, f32[...] of rewards f32[..., K]."""
  ranks = jnp.arange(rewards.shape[-1])
  behind = (ranks > ranks[:, None]) & present[..., None, :]
  counts = jnp.any(behind, axis=-1) & present
  # A sum over none would be −∞; the last rank's is of itself and not counted.
  behind |= ~counts[..., None] & (ranks == ranks[:, None])
  others = jax.nn.logsumexp(rewards[..., None, :], axis=-1, where=behind)
  # z − log(e^z + e^o) = log σ(z − o), which keeps the digits of small losses.
  terms = jnp.where(counts, base.log_sigmoid(rewards - others), 0.0)
  return -jnp.sum(terms, axis=-1)


def _ends(values, present):
  """The first and the last of a ranking: f32[..., 2]."""
  last = jnp.sum(present, axis=-1, keepdims=True) - 1
  worst = jnp.take_along_axis(values, jnp.maximum(last, 0), axis=-1)
  return jnp.concatenate([values[..., :1], worst], axis=-1)


def _of_rewards(loss, nll, rewards):
  """The output of a loss of rewards f32[..., 2], of the best and the worst."""
  out = base.with_metrics(loss, rewards, rewards)
  out = {k: v for k, v in out.items() if not k.startswith("logps/")}
  return {**out, "nll": jax.lax.stop_gradient(nll)}
