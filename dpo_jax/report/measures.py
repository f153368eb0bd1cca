"""The numbers of a report's table: of a run, or of runs that differ in seeds.

Of samples, what one prompt's draws have in common is no news: errors are over
prompts, as in eval.frontier.
"""

import math

import numpy as np

from dpo_jax.eval import intervals, statistics
from dpo_jax.report import folder

AT_LENGTH, INTERVAL = "reward_at_length", "rewards/accuracies/interval"
MEANS = ("kl", "log_ratio", "length")
HELD_OUT = ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected")
DRIFT = {f"drift/{side}": f"logps/{side}" for side in ("chosen", "rejected")}


def of(sweep, runs):
  """The numbers of one run; or their means over runs, with their errors.

  Args:
    sweep: folder.Sweep.
    runs: list of Run; several differ in their seeds.
  Returns: {key: number, {"mean", "se"}, or None}; INTERVAL (low, high) or None.
  """
  each = [_of_run(sweep, run) for run in runs]
  if len(each) == 1:
    return each[0]
  means = {key: over_seeds([row[key] for row in each]) for key in each[0]}
  return {**means, INTERVAL: None}


def over_seeds(values):
  """{"mean", "se"} over runs; None if one of them lacks the value.

  Of one run the error is NaN.
  """
  values = [v["mean"] if isinstance(v, dict) else v for v in values]
  if any(not isinstance(value, int | float) for value in values):
    return None
  return statistics.over_prompts(values)


def ended(run):
  """Share of the samples that ended before the limit, or None."""
  there = [sample.get("finished") for sample in run.samples]
  there = [done for done in there if isinstance(done, bool)]
  if there:
    return sum(there) / len(there)
  return folder.number(run.evaluation.get("finished"))


def at_length(samples, reward, length):
  """A policy's mean reward at a length that is not its own.

  Least squares over its samples, r = a + b (n − length): a, the mean reward
  less b times by how much its samples are longer. The error is clustered by
  prompt (CR1), with `length` taken as given.

  Args:
    samples: rows of samples.jsonl.
    reward: key of the reward.
    length: in tokens.
  Returns: {"mean", "se"}; None if all samples are equally long, or there are
    too few.
  """
  rows = [
    (sample.get("id"), *found)
    for sample in samples
    for found in [[folder.number(sample.get(k)) for k in ("length", reward)]]
    if None not in found
  ]
  prompts = {row[0]: number for number, row in enumerate(rows)}
  if len(prompts) < 3 or len({n for _, n, _ in rows}) < 2:
    return None
  x = np.array([(1, n - length) for _, n, _ in rows], float)
  y = np.array([r for *_, r in rows], float)
  inverse = np.linalg.inv(x.T @ x)
  fit = inverse @ x.T @ y
  scores = np.zeros((len(rows), 2))
  np.add.at(scores, [prompts[i] for i, *_ in rows], x * (y - x @ fit)[:, None])
  correction = len(prompts) / (len(prompts) - 1)
  variance = correction * inverse @ scores.T @ scores @ inverse
  return {"mean": float(fit[0]), "se": float(math.sqrt(variance[0, 0]))}


def _of_run(sweep, run):
  row = {}
  for key in (*sweep.rewards, *MEANS):
    mean, se = run.mean(key)
    row[key] = None if mean is None else {"mean": mean, "se": se}
  row |= {AT_LENGTH: _adjusted(sweep, run), "ended": ended(run)}
  pairs = run.evaluation.get("comparisons", {})
  row |= {key: folder.number(pairs.get(key)) for key in HELD_OUT}
  row[INTERVAL] = _interval(run, row["rewards/accuracies"])
  for key, plain in DRIFT.items():
    row[key] = folder.number(pairs.get(key))
    if row[key] is None:
      row[key] = _less_reference(sweep, run, plain)
  for key in ("distinct_1", "distinct_2"):
    row[key] = folder.number(run.evaluation.get(key))
  return row


def _adjusted(sweep, run):
  """The reward r* at the reference's mean length, or None."""
  length, _ = sweep.reference.mean("length") if sweep.reference else (None, 0)
  if length is None or not sweep.rewards:
    return None
  return at_length(run.samples, sweep.rewards[0], length)


def _interval(run, accuracy):
  """Of the accuracy: comparisons of one prompt count as one case."""
  counts = [run.evaluation.get(key) for key in ("count", "examples")]
  counts = [count for count in counts if folder.number(count)]
  if not counts or accuracy is None or not 0 <= accuracy <= 1:
    return None
  return intervals.wilson(accuracy, min(counts))


def _less_reference(sweep, run, key):
  """A held-out mean less the reference's, if the run began with it."""
  start = sweep.reference
  if start is None:
    return None
  same = run.evaluation.get("reference") == start.evaluation.get("reference")
  ours, theirs = (
    folder.number(r.evaluation.get("comparisons", {}).get(key))
    for r in (run, start)
  )
  if not same or ours is None or theirs is None:
    return None
  return ours - theirs
