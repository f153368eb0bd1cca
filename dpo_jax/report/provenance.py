"""Where the numbers of a report come from: configs, versions, device, time."""

import json
import math
import statistics

from dpo_jax import progress
from dpo_jax.config import saved
from dpo_jax.report import folder

UNKNOWN = "not recorded"
_SEEDS = (*folder.SEEDS, "sample.seed")
# Said of all runs alike too: what they were made from.
_FROM = (
  *("init_from", "data.train", "data.eval", "sample.prompts"),
  *("data.batch_size", "optim.learning_rate"),
)
_MADE_WITH = ("commit", "dpo_jax", "python", "jax", "device")


def facts(sweep):
  """What the runs share, and what they differ in.

  Returns: (alike, heads, body): [(what, value)] that holds for all runs, of the
    configs' fields those that say what a run was made from; and a
    table of the rest: "run" and what differs, a list a run of its name and
    values. Of one run all is alike. All are strings.
  """
  configs = [saved.flatten(run.config) for run in sweep.runs]
  rows = [_of(run, c) for run, c in zip(sweep.runs, configs, strict=True)]
  # Fields that differ come first: they are what the sweep is about.
  named = dict.fromkeys(key for config in configs for key in config)
  values = {
    key: [_text(c[key]) if key in c else "–" if c else UNKNOWN for c in configs]
    for key in named
    if key not in _SEEDS
  }
  values = {
    key: texts
    for key, texts in values.items()
    for known in [{*texts} - {UNKNOWN}]
    if len(known) > 1 or (key in _FROM and known != {"null"})
  }
  if not any(configs):
    values = {"config": [UNKNOWN] * len(configs)}
  values |= {key: [row[key] for row in rows] for key in rows[0]}
  alike = [(k, v[0]) for k, v in values.items() if len(set(v)) == 1]
  differ = {k: v for k, v in values.items() if len(set(v)) > 1}
  names = [run.name for run in sweep.runs]
  body = list(zip(names, *differ.values(), strict=True)) if differ else []
  return alike, ["run", *differ], body


def _of(run, config):
  """{what: value as text} of a run, but for its config's other fields."""
  made_with = run.evaluation.get("made_with") or {}
  row = {
    key: _text(config[key]) if key in config else UNKNOWN for key in _SEEDS
  }
  for key in _MADE_WITH:
    value = made_with.get(key)
    row[key] = folder.clean(value) if value is not None else UNKNOWN
  row["training time, h:m:s"] = _duration(trained(run.metrics))
  _, speeds = run.metrics.get("tokens_per_second", ((), ()))
  speeds = [speed for speed in speeds if math.isfinite(speed)]
  row["tokens/s (median)"] = (
    f"{statistics.median(speeds):,.0f}" if speeds else UNKNOWN
  )
  return row


def trained(metrics):
  """Seconds that a run took until what it logged last, or None.

  "elapsed" counts from the start of a process, at "wall_time" less "elapsed";
  a run that was resumed had several, each begun after what is logged before.
  """
  steps, elapsed = metrics.get("elapsed", ((), ()))
  _, clock = metrics.get("wall_time", ((), [math.nan] * len(steps)))
  total = before = 0.0
  last = math.nan
  for seconds, now in zip(elapsed, clock, strict=True):
    if not math.isfinite(seconds):
      continue
    if seconds < before or now - seconds >= last:
      before = 0.0
    total, before, last = total + seconds - before, seconds, now
  return total or None


def _duration(seconds):
  return UNKNOWN if seconds is None else progress.duration(seconds)


def _text(value):
  """A config's value as its file would have it."""
  return value if isinstance(value, str) else json.dumps(value)
