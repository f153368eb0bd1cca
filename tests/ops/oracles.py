"""Losses in float64 numpy, written from the formulas, and cases to compare.

An oracle is `f(v, held) -> losses` or `(losses, factors)`. `v` holds every
argument and field of the loss as attributes; `held` holds them where the loss
takes a statistic without gradient (sg): finite differences move `v` alone.
What is no comparison (weight 0 in a coupled batch) costs 0.
"""

import math

import numpy as np


def exp(x, top=30.0):
  """e^x, its tangent beyond `top`: as the losses say they go on."""
  low = np.minimum(x, top)
  return np.exp(low) * (1 + x - low)


def expm1(alpha, x):
  """(e^(α x) − 1) / α."""
  z = alpha * x
  near = np.expm1(np.clip(z, -1, 1))  # keeps the digits of small z
  return np.where(np.abs(z) < 1, near, exp(z) - 1) / alpha


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def reverse_kl(delta, alpha):
  del alpha
  return delta


def forward_kl(delta, alpha):
  del alpha
  return 1 - exp(-delta)


def js(delta, alpha):
  del alpha
  return log_sigmoid(delta) + math.log(2)


def alpha_divergence(delta, alpha):
  return delta if alpha == 1 else expm1(alpha - 1, delta)


# s(Δ) = f'(e^Δ) − f'(1).
DIVERGENCES = {
  "reverse_kl": reverse_kl,
  "forward_kl": forward_kl,
  "js": js,
  "alpha": alpha_divergence,
}


def ratios(v):
  """s(Δ) of each completion."""
  s = DIVERGENCES[getattr(v, "divergence", "reverse_kl")]
  alpha = getattr(v, "divergence_alpha", None)
  return s(v.policy_logps - v.ref_logps, alpha)


def diff(x):
  return x[..., 0] - x[..., 1]


def per_token(x, lengths):
  """Means over tokens; 0 where there is none."""
  return np.where(lengths > 0, x / np.maximum(lengths, 1), 0.0)


def average(values, weights):
  values = np.where(weights > 0, values, 0.0)
  return np.sum(values * weights) / np.sum(weights)


def smoothed(z, epsilon):
  return -(1 - epsilon) * log_sigmoid(z) - epsilon * log_sigmoid(-z)


def dpo(v, held):
  del held
  return smoothed(v.beta * diff(ratios(v)), v.label_smoothing)


def robust(v, held):
  del held
  z, epsilon = v.beta * diff(ratios(v)), v.label_smoothing
  loss = -(1 - epsilon) * log_sigmoid(z) + epsilon * log_sigmoid(-z)
  return loss / (1 - 2 * epsilon)


def ipo(v, held):
  del held
  s = ratios(v)
  if v.dialect == "paper":
    s = per_token(s, v.lengths)
  return (diff(s) - 1 / (2 * v.beta)) ** 2


def hinge(v, held):
  del held
  return np.maximum(0.0, 1 - v.beta * diff(ratios(v)))


def exo(v, held):
  del held
  z, epsilon = v.beta * diff(ratios(v)), v.label_smoothing
  up = sigmoid(z) * (log_sigmoid(z) - np.log(1 - epsilon))
  return up + sigmoid(-z) * (log_sigmoid(-z) - np.log(epsilon))


def discopop(v, held):
  del held
  z = v.beta * diff(ratios(v))
  m = z / v.temperature
  blended = np.exp(log_sigmoid(m) - z)  # m e^(−z): apart they are 0 · ∞
  return -sigmoid(-m) * log_sigmoid(z) + blended


def chi_po(v, held):
  del held
  delta = v.policy_logps - v.ref_logps
  return -log_sigmoid(v.beta * diff(delta + exp(delta, top=20.0)))


def ln_dpo(v, held):
  del held
  return -log_sigmoid(v.beta * diff(per_token(ratios(v), v.lengths)))


def dpop(v, held):
  del held
  s = ratios(v)
  fall = np.maximum(0.0, -s[..., 0])
  return -log_sigmoid(v.beta * (diff(s) - v.penalty * fall))


def r_dpo(v, held):
  del held
  price = v.alpha * diff(v.lengths)
  return -log_sigmoid(v.beta * diff(ratios(v)) + price)


def odpo(v, held):
  del held
  gap = diff(v.scores)
  offset = v.alpha * np.log(np.where(gap > 0, gap, 1.0))
  return -log_sigmoid(v.beta * diff(ratios(v)) - offset)


def tdpo1(v, held):
  del held
  return -log_sigmoid(v.beta * (diff(ratios(v)) + diff(v.sequence_kl)))


def tdpo2(v, held):
  lead = v.sequence_kl[..., 1] - held.sequence_kl[..., 0]
  return -log_sigmoid(v.beta * (diff(ratios(v)) - v.alpha * lead))


def sampo(v, held):
  del held
  return -log_sigmoid(v.beta * diff(v.common_logps - v.ref_common_logps))


def ld_dpo(v, held):
  del held
  policy = v.prefix_logps + v.alpha * (v.policy_logps - v.prefix_logps)
  ref = v.ref_prefix_logps + v.alpha * (v.ref_logps - v.ref_prefix_logps)
  return -log_sigmoid(v.beta * diff(policy - ref))


def wpo(v, held):
  sums = held.policy_logps - held.sum_sq_probs
  weight = np.exp(np.sum(per_token(sums, held.lengths), axis=-1))
  if v.dialect == "trl_1":
    weight = np.minimum(1.0, weight)
  return -weight * log_sigmoid(v.beta * diff(ratios(v)))


def nca(v, held):
  del held
  z = v.beta * ratios(v)
  both = log_sigmoid(-z[..., 0]) + log_sigmoid(-z[..., 1])
  return -log_sigmoid(z[..., 0]) - both / 2


def sppo(v, held):
  del held
  s, half = ratios(v), 1 / (2 * v.beta)
  return (s[..., 0] - half) ** 2 + (s[..., 1] + half) ** 2


def apo_zero(v, held):
  del held
  z = v.beta * ratios(v)
  return 1 - sigmoid(z[..., 0]) + sigmoid(z[..., 1])


def apo_down(v, held):
  del held
  z = v.beta * ratios(v)
  return sigmoid(z[..., 0]) + 1 - sigmoid(diff(z))


def cal_dpo(v, held):
  return -log_sigmoid(diff(ratios(v))) + sppo(v, held) / 2


def running(v):
  """BCO's δ and the state with it: the mean over the steps so far."""
  rewards = np.mean(v.beta * ratios(v), axis=-1)
  count = v.running["count"] + 1
  total = v.running["mean"] * v.running["count"] + average(rewards, v.weights)
  return {"mean": total / count, "count": count}


def bco(v, held):
  z = v.beta * ratios(v)
  shift = 0.0 if v.dialect == "trl_1" else running(held)["mean"]
  return -log_sigmoid(z[..., 0] - shift) - log_sigmoid(shift - z[..., 1])


def bco_unpaired(v, held):
  z = v.beta * ratios(v)[..., 0] - running(held)["mean"]
  return -np.where(v.labels == 1, log_sigmoid(z), log_sigmoid(-z))


def matched(v, left, right):
  """Costs of the sorted `left` against the sorted `right`, real ones only."""
  real = np.flatnonzero(v.weights > 0)
  left, right = left.reshape(-1)[real], right.reshape(-1)[real]
  order, out = np.argsort(left), np.zeros(v.weights.size)
  cost = smoothed(v.beta * (left[order] - np.sort(right)), v.label_smoothing)
  out[real[order]] = cost
  return out.reshape(v.weights.shape)


def aot(v, held):
  del held
  return matched(v, diff(v.policy_logps), diff(v.ref_logps))


def aot_unpaired(v, held):
  del held
  return matched(v, ratios(v)[..., 0], ratios(v)[..., 1])


def kto_pair(v, held):
  s, fixed = ratios(v), ratios(held)
  z_w = max(0.0, average(fixed[..., 0], held.weights))
  z_l = max(0.0, average(fixed[..., 1], held.weights))
  up = 1 - sigmoid(v.beta * (s[..., 0] - z_l))
  return (up + 1 - sigmoid(v.beta * (z_w - s[..., 1]))) / 2


def kto(v, held):
  s = ratios(v)[..., 0]
  z = max(0.0, average(ratios(held)[..., 1], held.weights))
  good = v.desirable_weight * (1 - sigmoid(v.beta * (s - z)))
  bad = v.undesirable_weight * (1 - sigmoid(v.beta * (z - s)))
  return np.where(v.labels == 1, good, bad)


def plackett_luce(v, held):
  del held
  return of_order(v.beta * ratios(v), v.present)


def of_order(z, present):
  """−log of the probability of an order, best first."""
  out = np.zeros(z.shape[:-1])
  for index in np.ndindex(out.shape):
    row = z[index][present[index]]
    for k in range(len(row)):
      out[index] -= row[k] - np.logaddexp.reduce(row[k:])
  return out


def sft(v, held):
  del held
  return -v.policy_logps[..., 0]


def nll(v, held):
  del held
  return -per_token(v.policy_logps, v.lengths)[..., 0], v.lengths[..., 0]


def unlikelihood(v, held):
  del held
  return -v.policy_logps[..., 0] + v.alpha * v.policy_logps[..., 1]


def slic(v, held):
  calibration = np.maximum(0.0, v.delta - diff(v.policy_logps))
  return calibration + v.nll_weight * sft(v, held)


def simpo(v, held):
  del held
  margin = diff(per_token(v.policy_logps, v.lengths))
  return -log_sigmoid(v.beta * margin - v.gamma)


def alphapo(v, held):
  if v.alpha == 0:
    return simpo(v, held)
  mean = per_token(v.policy_logps, v.lengths)
  margin = diff(-expm1(v.alpha, -mean))
  return -log_sigmoid(v.beta * margin - v.gamma)


def orpo(v, held):
  del held
  mean = per_token(v.policy_logps, v.lengths)
  # A probability of 1 has infinite odds: the tangent beyond 1 − 1e-6.
  below = np.minimum(mean, -1e-6)
  odds = below - np.log(-np.expm1(below)) + (mean - below) * 1e6
  return -mean[..., 0] - v.odds_weight * log_sigmoid(diff(odds))


def cpo(v, held):
  chosen = -v.policy_logps[..., 0]
  if v.dialect == "trl_1":
    chosen = nll(v, held)[0]
  return -log_sigmoid(v.beta * diff(v.policy_logps)) + v.alpha * chosen


def bradley_terry(v, held):
  del held
  z, epsilon = diff(v.rewards), v.label_smoothing
  right, wrong = log_sigmoid(z), log_sigmoid(-z)
  return -(1 - epsilon) * right - epsilon * wrong + centring(v, v.rewards)


def centring(v, rewards):
  return v.centring * rewards.sum(-1) ** 2


def bradley_terry_margin(v, held):
  del held
  short = diff(v.rewards) - v.alpha * diff(v.scores)
  return -log_sigmoid(short) + centring(v, v.rewards)


def plackett_luce_reward(v, held):
  del held
  count = np.maximum(v.present.sum(-1, keepdims=True), 1)
  twice = 2 * v.rewards * v.present / count
  return of_order(v.rewards, v.present) + centring(v, twice)
