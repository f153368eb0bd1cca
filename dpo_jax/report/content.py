"""What a report says, whatever it is written in: figures, words, samples."""

import functools
import math
from typing import NamedTuple

import numpy as np

from dpo_jax.config import saved
from dpo_jax.report import best_of, figures, folder, measures

# Shares of samples that ended may differ by this much without a remark.
ENDED = 0.1
NOTHING = {
  "frontier": "No run has both a reward and a KL.",
  "curves": "No run has logged a training step.",
  "samples": "No prompt has a sample of every run.",
}
TITLES = {
  "frontier": "Reward over KL",
  "table": "All numbers",
  "best_of": "Best of N",
  "curves": "Training",
  "samples": "Samples",
  "provenance": "Provenance",
}


class Picture(NamedTuple):
  """A figure for files (PNG bytes) and for the page (<svg> elements)."""

  png: bytes
  svgs: str


def draw(sweep):
  """The figures of a report.Sweep.

  Returns: {"frontier": Picture, "curves": Picture}, None where there is
    nothing to draw.
  """
  light = [on_white for on_white, _ in figures.palette(len(sweep.groups))]
  groups = list(zip(sweep.groups, light, strict=True))
  truth = sweep.rewards[0] if sweep.rewards else ""
  marks = [_mark(group, truth, color) for group, color in groups]
  start = sweep.reference and folder.Group("reference", [sweep.reference])
  start = start and _mark(start, truth, figures.INK)
  frontier = functools.partial(
    figures.frontier,
    [mark for mark in marks if mark],
    start and start._replace(kl=0.0, kl_se=math.nan),
    f"mean r* ({truth.removeprefix('reward/')}) of the samples",
    joined=sweep.axis is not None,
    best_of=best_of.marks(sweep),
  )
  curves = functools.partial(
    figures.curves,
    [
      figures.Line(group.name, color, run.metrics)
      for group, color in groups
      for run in group.runs
    ],
  )
  named = curves(wide=True, legend=True)  # the page has a legend of its own
  drawings = {
    "frontier": (frontier(wide=True), frontier, "reward", "Reward over KL"),
    "curves": (named, curves, "curves", "Training curves"),
  }
  return {name: _picture(*each, light) for name, each in drawings.items()}


def _mark(group, truth, color):
  """Where a group is between reward and KL, or None if it is not known."""
  spots = [(run.mean("kl"), run.mean(truth)) for run in group.runs]
  spots = [spot for spot in spots if None not in (spot[0][0], spot[1][0])]
  if not spots:
    return None
  ((kl, kl_se), (reward, reward_se)), *more = spots
  name, seeds = group.name, ()
  if more:
    seeds = tuple((x, y) for (x, _), (y, _) in spots)
    kl, kl_se, reward, reward_se = (
      value
      for axis in zip(*seeds, strict=True)
      for value in measures.over_seeds(axis).values()
    )
    name = f"{name} ({len(seeds)} seeds)"
  errors = np.array([kl_se, reward_se], float)  # None as NaN
  trail = tuple(spot for run in group.runs for spot in _trail(run, truth))
  return figures.Mark(name, kl, reward, *errors, color, seeds, trail)


def _trail(run, truth):
  """(kl, reward) of a run's checkpoints before the last, as far as measured."""
  for point in run.evaluation.get("checkpoints", []):
    means = point["means"]
    if {"kl", truth} <= means.keys():
      yield means["kl"]["mean"], means[truth]["mean"]


def _picture(in_file, make, prefix, label, light):
  """A Picture of a file's figure and `make(wide=…)`; None if there is none."""
  if in_file is None:
    return None
  names = {
    figures.INK: "--ink",
    figures.MUTED: "--muted",
    figures.GRID: "--grid",
    figures.PAPER: "--paper",
    **{color: f"--s{i}" for i, color in enumerate(light)},
  }
  svgs = [
    figures.svg(make(wide=kind == "wide"), f"{prefix}-{kind}", label, names)
    for kind in ("wide", "narrow")
  ]
  return Picture(figures.png(in_file), "\n".join(svgs))


def facts(sweep):
  """One line: how many runs, updates, samples and held-out pairs."""
  count = len(sweep.runs)
  parts = [f"{count} run{'s' if count != 1 else ''}"]
  if sweep.reference:
    parts[0] += " and the reference"
  held_out = "examples", "held-out examples"
  if _of_pairs(sweep.runs):
    held_out = "count", "held-out pairs"
  for key, what in (
    ("step", "updates"),
    ("samples", "samples a run"),
    held_out,
  ):
    found = {run.evaluation.get(key) for run in sweep.runs} - {None}
    if len(found) == 1:
      parts.append(f"{found.pop():,} {what}")
  return " · ".join(parts)


def _of_pairs(runs):
  """Whether what is held out was compared: labels and texts are not."""
  return any(
    "rewards/accuracies" in run.evaluation.get("comparisons", {})
    for run in runs
  )


def _reward_of(runs):
  """Whose reward it is by which an accuracy is measured."""
  models = {run.config.get("algo") == "reward" for run in runs}
  if len(models) > 1:
    return "reward, of a reward model or implicit"
  return "reward of the reward model" if True in models else "implicit reward"


def missing(sweep):
  """Lines that say what the sweep has not got."""
  lines = []
  for run in sweep.everyone:
    # The reference is not trained; a sweep without prompts draws nothing.
    due = set(run.lacks) - (
      {"metrics.jsonl"} if run is sweep.reference else set()
    )
    due -= set() if sweep.sampled else {"samples.jsonl"}
    due -= set() if _measured(run.config) else {"evaluation.json"}
    if due:
      lines.append(f"{run.name}: no {', no '.join(sorted(due))}")
    _, skipped = run.metrics.get("skipped", ((), (0,)))
    if skipped[-1] > 0:
      count = (
        f"{skipped[-1]:.0f} updates were" if skipped[-1] > 1 else "update was"
      )
      lines.append(f"{run.name}: its last {count} not finite")
  if lines:
    lines.append("The same dpo-jax sweep command goes on where it stopped.")
  for run in sweep.everyone:
    lines += [f"{run.name}: {line}" for line in _refused(run)]
  if not sweep.sampled:
    lines.append(
      "No samples, no reward and no KL: the sweep names no prompts "
      "(sample.prompts)."
    )
  return lines


def _refused(run):
  """Lines on the updates that a run refused."""

  def last(name):
    return run.metrics.get(f"skipped/{name}", ((), (0,)))[1][-1]

  if last("total"):
    yield (
      f"updates refused for not being finite: {last('total'):.0f}, at most "
      f"{last('longest'):.0f} in a row"
    )
  if last("spikes"):
    yield f"updates refused as spikes: {last('spikes'):.0f}"


def _measured(config):
  """Whether a config, or one that is not known, asks for an evaluation."""
  fields = saved.flatten(config)
  asked = [fields.get(key, "") for key in ("data.eval", "sample.prompts")]
  return any(value is not None for value in asked)


def cell(texts):
  """A cell of the report.grid as one text."""
  if len(texts) == 3:
    return "{} ({}–{})".format(*texts)
  return " ± ".join(texts)


def remarks(sweep):
  """Lines about what does not compare with the reference as it seems to."""
  start = sweep.reference
  share = start and measures.ended(start)
  lines = _other_starts(sweep)
  if share is None:
    return lines
  for entry in sweep.entries:
    row = measures.of(sweep, entry.runs)
    ours = _mean(row["ended"])
    if entry.nested or ours is None or abs(ours - share) <= ENDED + 1e-9:
      continue
    limit = entry.runs[0].config.get("sample", {}).get("max_new_tokens")
    lines.append(
      f"{entry.name}: {ours:.0%} of the samples ended before the limit"
      f"{f' of {limit} tokens' if limit else ''}, of the reference's "
      f"{share:.0%}.{_at_equal_length(sweep, row)}"
    )
  return lines


def _other_starts(sweep):
  """[] or a line: which runs began from another policy than the reference."""
  start = sweep.reference and sweep.reference.evaluation.get("reference")
  others = [
    run.name
    for run in sweep.runs
    if run.evaluation.get("reference") not in (None, start)
  ]
  if not start or not others:
    return []
  return [
    f"{', '.join(others)}: began from other parameters than the reference "
    "shown here; KL, log-ratio and Δ log p are from where each run began."
  ]


def _at_equal_length(sweep, row):
  """What is left of a reward that texts of another length earned."""
  reward = _mean(row[sweep.rewards[0]]) if sweep.rewards else None
  there = row[measures.AT_LENGTH]
  if reward is None:
    return ""
  if there is None:
    return f" Its r* of {reward:.2f} may be partly a matter of length."
  # Which of the two is higher, and by more than its error, is the reader's.
  length, _ = sweep.reference.mean("length")
  se = "" if there["se"] is None else f" ± {there['se']:.2f}"
  return (
    f" Its r* is {reward:.2f}; at the reference's mean length, {length:.1f} "
    f"tokens, {there['mean']:.2f}{se}."
  )


def _mean(value):
  return value["mean"] if isinstance(value, dict) else value


def captions(sweep):
  """{section: what to know to read it}; plain text."""
  rewards = [key.removeprefix("reward/") for key in sweep.rewards]
  joined = f", joined in the order of {sweep.axis}" if sweep.axis else ""
  others = f"; not optimised: {', '.join(rewards[1:])}" if rewards[1:] else ""
  truth = f"r* ({rewards[0]}): the ground truth{others}. " if rewards else ""
  over = (
    "± 1 standard error over prompts, whose draws count as one: of this "
    "trained policy, not of training it again with another seed."
  )
  one, over = over, over if sweep.sampled else ""
  if sweep.seeded:
    over = (
      "± 1 standard error over seeds where a number of seeds stands behind the "
      "name, else over prompts, whose draws count as one."
    )
    one = f"{over} Small dots: each seed's run."
  diamond = " The diamond is the reference." if sweep.reference else ""
  alike = " Seeds share a colour." if sweep.seeded else ""
  return {
    "frontier": "Each run's own samples: their mean reward r* over their "
    f"sequence KL(π‖π_ref){joined}. Bars: {one}{diamond} "
    "Up is more reward, left is closer to the reference."
    f"{best_of.of_marks(sweep)}",
    "best_of": best_of.caption(sweep),
    "table": " ".join([truth + over, *_columns(sweep)]).strip(),
    "curves": "Thin: what was logged. Thick: its mean over a centred window of "
    f"{figures.SMOOTHING:.0%} of the run's logged steps. Gaps: values that "
    "were not finite. Losses of different β, or of different kinds, are "
    f"different functions: compare each with itself.{alike}",
    "provenance": "Versions, commit and device are of the evaluation.",
  }


def _columns(sweep):
  """What the columns of the table are, of those there that need a word."""
  rows = [measures.of(sweep, entry.runs) for entry in sweep.entries]
  there = {key for row in rows for key in row if row[key] is not None}
  said = []
  if measures.AT_LENGTH in there:
    length, _ = sweep.reference.mean("length")
    said.append(
      "r* at equal length: by a least-squares line through a policy's own "
      "samples, r = a + b (n − L), what it earns at the reference's mean "
      f"length L = {length:.1f} tokens: a, the mean of r less b times that of "
      "n − L, with its error clustered by prompt and L taken as given."
    )
  if "log_ratio" in there:
    said.append(
      "log-ratio: mean of log π − log π_ref over the samples, the plain "
      "estimate of the KL."
    )
  if there & {*measures.HELD_OUT, *measures.DRIFT}:
    what = "comparisons" if _of_pairs(sweep.runs) else "examples"
    parts = ["the loss"]
    if "rewards/accuracies" in there:
      parts.append(
        "the accuracy, the share whose chosen completion has the higher "
        f"{_reward_of(sweep.runs)} (in brackets Wilson's 95% interval, over "
        "prompts where a prompt has several comparisons)"
      )
    if there & {*measures.DRIFT}:
      parts.append("Δ log p, the mean of log π − log π_ref, in nats")
    elif there & {*measures.DRIFT.values()}:
      parts.append("the mean of log p, in nats")
    said.append(f"Of the held-out {what}: {_listed(parts)}.")
  if "ended" in there:
    said.append(
      "share ended: of the samples, those that ended before the limit."
    )
  return said


def _listed(parts):
  """`a; b; and c`."""
  *others, last = parts
  return "; ".join([*others, f"and {last}" if others else last])
