"""What a report says, whatever it is written in: figures, words, samples."""

import functools
import math
from typing import NamedTuple

import numpy as np

from dpo_jax.report import figures, folder

PROMPTS = 3
NOTHING = {
  "frontier": "No run has both a reward and a KL.",
  "curves": "No run has logged a training step.",
  "samples": "No prompt has a sample of every run.",
}
TITLES = {
  "frontier": "Reward over KL",
  "table": "All numbers",
  "curves": "Training",
  "samples": "Samples",
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
  light = [on_white for on_white, _ in figures.palette(len(sweep.runs))]
  runs = list(zip(sweep.runs, light, strict=True))
  truth = sweep.rewards[0] if sweep.rewards else ""
  marks = [_mark(run, truth, color) for run, color in runs]
  start = sweep.reference and _mark(sweep.reference, truth, figures.INK)
  frontier = functools.partial(
    figures.frontier,
    [mark for mark in marks if mark],
    start and start._replace(kl=0.0, kl_se=math.nan),
    f"mean r* ({truth.removeprefix('reward/')}) of the samples",
    joined=sweep.axis is not None,
  )
  curves = functools.partial(
    figures.curves,
    [figures.Line(run.name, color, run.metrics) for run, color in runs],
  )
  named = curves(wide=True, legend=True)  # the page has a legend of its own
  drawings = {
    "frontier": (frontier(wide=True), frontier, "reward", "Reward over KL"),
    "curves": (named, curves, "curves", "Training curves"),
  }
  return {name: _picture(*each, light) for name, each in drawings.items()}


def _mark(run, truth, color):
  """A run's place between reward and KL, or None if it is not known."""
  (kl, kl_se), (reward, reward_se) = run.mean("kl"), run.mean(truth)
  if kl is None or reward is None:
    return None
  errors = np.array([kl_se, reward_se], float)  # None as NaN
  return figures.Mark(run.name, kl, reward, *errors, color)


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
  for key, what in (
    ("step", "updates"),
    ("samples", "samples a run"),
    ("count", "held-out pairs"),
  ):
    found = {run.evaluation.get(key) for run in sweep.runs} - {None}
    if len(found) == 1:
      parts.append(f"{found.pop():,} {what}")
  return " · ".join(parts)


def missing(sweep):
  """Lines that say what the sweep has not got."""
  lines = []
  for run in sweep.everyone:
    # The reference is not trained; a sweep without prompts draws nothing.
    due = set(run.lacks) - (
      {"metrics.jsonl"} if run is sweep.reference else set()
    )
    due -= set() if sweep.sampled else {"samples.jsonl"}
    if due:
      lines.append(f"{run.name}: no {', no '.join(sorted(due))}")
  if lines:
    lines.append("The same dpo-jax sweep command goes on where it stopped.")
  if not sweep.sampled:
    lines.append(
      "No samples, no reward and no KL: the sweep names no prompts "
      "(sample.prompts)."
    )
  return lines


def prompts(sweep):
  """Samples side by side: the first prompts that all runs with samples share.

  Returns: list of (prompt, [(run, its first sample)]).
  """
  drawn = []
  for run in sweep.everyone:
    first = {}
    for sample in run.samples:
      first.setdefault(sample["id"], sample)
    if first:
      drawn.append((run, first))
  if not drawn:
    return []
  shared = [i for i in drawn[0][1] if all(i in first for _, first in drawn)]
  return [
    (drawn[0][1][i]["prompt"], [(run, first[i]) for run, first in drawn])
    for i in shared[:PROMPTS]
  ]


def captions(sweep):
  """{section: what to know to read it}; plain text."""
  rewards = [key.removeprefix("reward/") for key in sweep.rewards]
  joined = f", joined in the order of {sweep.axis}" if sweep.axis else ""
  others = f"; not optimised: {', '.join(rewards[1:])}" if rewards[1:] else ""
  truth = f"r* ({rewards[0]}): the ground truth{others}. " if rewards else ""
  return {
    "frontier": "Each run's own samples: their mean reward r* over their "
    f"sequence KL(π‖π_ref){joined}. Bars are ± 1 standard error, the diamond "
    "is the reference. Up is more reward, left is closer to the reference.",
    "table": f"{truth}± 1 standard error. log-ratio: mean of log π − log π_ref "
    "over the samples, the plain estimate of the KL. accuracy, log p: of the "
    "held-out comparisons, the share whose chosen completion has the higher "
    "implicit reward, and the mean log-probs in nats.",
    "curves": "Thin: what was logged. Thick: its mean over a centred window of "
    f"{figures.SMOOTHING:.0%} of the run's logged steps. Gaps: values that "
    "were not finite.",
  }


def score(sweep, sample):
  """The line under a sample: r*, length, whether it ended by itself."""
  parts = []
  reward = (
    folder.number(sample.get(sweep.rewards[0])) if sweep.rewards else None
  )
  if reward is not None:
    parts.append(f"r* {reward:.2f}".replace("-", "−"))
  length = folder.number(sample.get("length"))
  if length is not None:
    parts.append(f"{length} token{'s' if length != 1 else ''}")
  if sample.get("finished") is False:
    parts.append("cut off")
  return " · ".join(parts)
