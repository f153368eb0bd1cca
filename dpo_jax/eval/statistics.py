"""Means over prompts with their errors, as numbers and as a file has them."""

import math

import numpy as np


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
