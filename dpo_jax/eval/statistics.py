"""Means with their errors, and what can be said of methods from a few seeds.

A method's envelope E(k) is the best reward among its checkpoints of KL ≤ k, and
its gap the mean of F*(k) − E(k) over some KLs, F* the exact frontier. Two
methods are compared seed by seed: both begin with the same policy and
comparisons.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

REPRODUCED, ON_PAR = "reproduced", "on par"
NOT_REPRODUCED = "not reproduced"


def over_prompts(values):
  """Mean of a value a prompt, and its standard error.

  Draws of one prompt are not independent of one another; prompts are.

  Args:
    values: a number a prompt.
  Returns: {"mean", "se"}; of one prompt the error is NaN.
  """
  values = np.asarray(values, np.float64)
  spread = values.std(ddof=1) if len(values) > 1 else math.nan
  return {
    "mean": float(values.mean()),
    "se": float(spread / len(values) ** 0.5),
  }


def plain(value):
  """Values as JSON has them: what is not finite is null."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def points(curves, start):
  """(kl f64[N], reward f64[N]) of all checkpoints of some runs, and of step 0.

  Args:
    curves: list of {"kl": list, "reward": list}.
    start: reward of the policy that they begin from, whose KL is 0.
  """
  kl = np.concatenate([[0.0], *(curve["kl"] for curve in curves)])
  reward = np.concatenate([[start], *(curve["reward"] for curve in curves)])
  return kl, reward


def envelope(kl, reward, grid):
  """E(k) = the best reward of a checkpoint at KL ≤ k, at each k of a grid."""
  within = np.asarray(kl) <= np.asarray(grid)[:, None]
  return np.max(np.where(within, reward, -np.inf), axis=1)


def near(kl, grid, share):
  """Which k of a grid have a checkpoint at a KL in k (1 ± share).

  Where there is none, the envelope says how sparse checkpoints are.
  """
  grid = np.asarray(grid)[:, None]
  return np.any(np.abs(np.asarray(kl) - grid) <= share * grid, axis=1)


def dominated(kl, reward, by_kl, by_reward):
  """Share of checkpoints beaten on both axes: by one of ≤ KL and ≥ reward."""
  less = np.asarray(by_kl) <= np.asarray(kl)[:, None]
  more = np.asarray(by_reward) >= np.asarray(reward)[:, None]
  return float(np.any(less & more, axis=1).mean())


def sign_flip(differences):
  """The exact one-sided p of the paired sign-flip test that a mean is above 0.

      p = share of the 2^n sign patterns s with mean(s · |d|) ≥ mean(d)

  Under the hypothesis that each difference is as likely as its negative. With n
  pairs p is at least 2^−n.

  Args:
    differences: n numbers, n ≤ 20.
  """
  differences = np.asarray(differences, np.float64)
  if len(differences) > 20:
    raise ValueError(f"{len(differences)} pairs have too many sign patterns")
  patterns = np.array(list(itertools.product((1, -1), repeat=len(differences))))
  sums = patterns @ np.abs(differences)
  rounding = 1e-12 * np.abs(differences).sum()
  return float(np.mean(sums >= differences.sum() - rounding))


def holm(ps):
  """p-values adjusted for being several: Holm's step-down.

      p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)),  p_(1) ≤ … ≤ p_(m)

  Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
  """
  ps = np.asarray(ps, np.float64)
  order = np.argsort(ps)
  scaled = np.minimum(1.0, ps[order] * np.arange(len(ps), 0, -1))
  out = np.empty_like(ps)
  out[order] = np.maximum.accumulate(scaled)
  return out.tolist()


def interval(values, *, resamples, seed):
  """(low, high): the 95 % bootstrap interval (BCa) of a mean over seeds."""
  values = np.asarray(values, np.float64)
  if np.ptp(values) == 0:  # nothing to draw again
    return float(values[0]), float(values[0])
  drawn = stats.bootstrap(
    (values,),
    np.mean,
    n_resamples=resamples,
    rng=np.random.default_rng(seed),
    vectorized=True,
  )
  low, high = drawn.confidence_interval
  return float(low), float(high)


def trend(values):
  """The exact p of Page's test that values rise from column to column.

  Args:
    values: f64[n, k]: k values of each of n seeds, in the order in which they
      are said to rise.
  Source: E. B. Page, Journal of the American Statistical Association 58 (1963).
  """
  return float(stats.page_trend_test(values, method="exact").pvalue)


class Comparison(NamedTuple):
  """One method against another, of n seeds.

  Attributes:
    difference: mean over seeds of D, the mean over KLs of E_ours − E_theirs.
    each: D of each seed.
    low, high: 95 % bootstrap interval of the mean.
    p: of the sign-flip test, for itself.
    worst: the least over KLs of mean(E_ours − E_theirs) / its standard error.
    grid: the KLs, in nats.
  """

  difference: float
  each: list
  low: float
  high: float
  p: float
  worst: float
  grid: list


def compare(ours, theirs, grid, *, resamples, seed):
  """The Comparison of two methods' envelopes.

  Args:
    ours, theirs: f64[n, k] of each seed, at the KLs of the grid.
    grid: k KLs in nats.
  Raises: ValueError for a reward that is not finite.
  """
  ahead = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
  if not np.isfinite(ahead).all():
    raise ValueError("a reward is not finite: nothing can be said of it")
  each = ahead.mean(axis=1)
  error = ahead.std(axis=0, ddof=1) / len(ahead) ** 0.5
  # Of seeds that all agree the error is 0: a difference is then certain.
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = np.nan_to_num(ahead.mean(axis=0) / error, nan=0.0)
  return Comparison(
    float(each.mean()),
    each.tolist(),
    *interval(each, resamples=resamples, seed=seed),
    sign_flip(each),
    float(ratio.min()),
    list(grid),
  )


def verdict(comparison, p, *, level, margin):
  """What may be said of "ours dominates theirs".

  reproduced: p < level, the interval is above 0, and at no KL are we behind by
  more than 2 standard errors. on par: the interval is within ± margin. Else not
  reproduced.

  Args:
    p: of the sign-flip test, adjusted for being one of several.
    margin: of reward.
  """
  dominates = p < level and comparison.low > 0 and comparison.worst >= -2
  if dominates:
    return REPRODUCED
  if -margin <= comparison.low and comparison.high <= margin:
    return ON_PAR
  return NOT_REPRODUCED
