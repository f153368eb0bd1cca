"""Intervals of rates over independent cases, at 95 %: of prompts, or pairs."""

import math

import numpy as np
import scipy.stats

RESAMPLES = 2000
_Z = 1.959964  # standard errors to either side of a 95 % interval


def wilson(share, count):
  """(low, high) of a share's 95 % interval, of `count` independent cases.

      (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

  Cases that count one half spread less than a coin of that share does, so that
  the interval of a share of wins with ties is, if anything, too wide.

  Args:
    share: in [0, 1].
    count: n, above 0.
  Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
  """
  more = _Z**2 / count
  half = _Z * math.sqrt(share * (1 - share) / count + more / (4 * count))
  middle = share + more / 2
  return (middle - half) / (1 + more), (middle + half) / (1 + more)


def bootstrap(columns, statistic, seed):
  """(low, high) of a statistic over prompts, drawn anew together.

  The percentile interval of RESAMPLES draws of n prompts, with repeats; a draw
  takes all that belongs to a prompt, so values of one prompt stay paired.

  Args:
    columns: arrays f[n], of the same prompts in the same order.
    statistic: (*columns, axis=…) -> their statistic along that axis.
    seed: of the draws.
  Returns: a pair of floats; None of fewer than two prompts.
  Source: Efron and Tibshirani 1993, chapter 13.
  """
  columns = [np.asarray(column, np.float64) for column in columns]
  if len(columns[0]) < 2:
    return None
  found = scipy.stats.bootstrap(
    columns,
    statistic,
    n_resamples=RESAMPLES,
    batch=256,  # RESAMPLES times n values would be held at once
    paired=True,
    vectorized=True,
    confidence_level=0.95,
    method="percentile",
    rng=np.random.default_rng(seed),
  )
  low, high = found.confidence_interval
  return float(low), float(high)


def mean(values, axis=-1):
  """The mean, as a statistic of `bootstrap`."""
  return np.mean(values, axis=axis)


def difference(first, second, axis=-1):
  """The difference of the means, as a statistic of `bootstrap`."""
  return np.mean(first - second, axis=axis)
