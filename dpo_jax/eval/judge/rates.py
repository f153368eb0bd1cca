"""Rates of verdicts, with what they rest on."""

import collections

import numpy as np

from dpo_jax.eval import intervals
from dpo_jax.eval.judge import lengths, verdicts


def of_samples(pairs, judged, seed):
  """What the verdicts on one sample file come to.

  Args:
    pairs: list of matched.Pair, one a prompt.
    judged: a verdicts.Verdict of each.
    seed: of the bootstrap.
  Returns: dict: "pairs"; "judged", those with a verdict, of which "wins",
    "ties" and "losses"; "win_rate", (wins + ½ ties) / judged, with "wilson" and
    "bootstrap", its 95 % intervals; "at_equal_length" (see lengths.py) with its
    bootstrap interval; "tie_rate" of those judged; "flip_rate", the share of
    the pairs that were asked in both orders in which the letter stayed, so that
    the texts changed sides; "first_rate", how often the text shown first won
    there; "lengths", mean characters of [ours, theirs]; "why", counts of
    verdicts.WHY. What has no case is None.
  """
  why = collections.Counter(verdict.why for verdict in judged)
  there = [
    (pair, verdict.value)
    for pair, verdict in zip(pairs, judged, strict=True)
    if verdict.value is not None
  ]
  values = np.array([value for _, value in there])
  both = [verdict.about.get("said", ()) for verdict in judged]
  both = [said for said in both if len(said) == 2 and None not in said]
  out = {
    "pairs": len(pairs),
    "judged": len(there),
    "wins": int(np.sum(values == 1)),
    "ties": int(np.sum(values == 0.5)),
    "losses": int(np.sum(values == 0)),
    "win_rate": None,
    "wilson": None,
    "bootstrap": None,
    "at_equal_length": None,
    "at_equal_length_bootstrap": None,
    "tie_rate": None,
    "flip_rate": _mean([a == b for a, b in both]),
    "first_rate": _mean([said == "A" for each in both for said in each]),
    "lengths": None,
    "why": {name: why[name] for name in verdicts.WHY if why[name]},
  }
  if there:
    out |= _of_verdicts([pair for pair, _ in there], values, seed)
  return out


def _of_verdicts(pairs, values, seed):
  """The rates of pairs that have verdicts."""
  ours, theirs = ([getattr(p, side) for p in pairs] for side in _SIDES)
  d = lengths.differences(ours, theirs)
  rate = float(np.mean(values))
  return {
    "win_rate": rate,
    "wilson": intervals.wilson(rate, len(values)),
    "bootstrap": intervals.bootstrap([values], intervals.mean, seed),
    "at_equal_length": float(lengths.at_equal_length(values, d)),
    "at_equal_length_bootstrap": intervals.bootstrap(
      [values, d], lengths.at_equal_length, seed
    ),
    "tie_rate": float(np.mean(values == 0.5)),
    "lengths": [float(np.mean([*map(len, side)])) for side in (ours, theirs)],
  }


_SIDES = ("ours", "theirs")


def between(first, second, seed):
  """The difference of two win rates, of the prompts that both have.

  Args:
    first, second: lists of Verdict of two sample files against the same, of
      the same prompts in the same order.
    seed: of the bootstrap.
  Returns: {"prompts", "difference": second − first, "bootstrap"}; None where
    they have no prompt in common.
  """
  values = [
    (b.value, a.value)
    for a, b in zip(first, second, strict=True)
    if None not in (a.value, b.value)
  ]
  if not values:
    return {"prompts": 0, "difference": None, "bootstrap": None}
  columns = np.array(values).T
  return {
    "prompts": len(values),
    "difference": float(intervals.difference(*columns)),
    "bootstrap": intervals.bootstrap(columns, intervals.difference, seed),
  }


def _mean(cases):
  return float(np.mean(cases)) if len(cases) else None
