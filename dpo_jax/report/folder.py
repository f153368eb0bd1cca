"""A sweep's folder, read: its runs with what each has got so far."""

import json
import math
import unicodedata
from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax.data.read import files


class Run(NamedTuple):
  """A point of the sweep, or the reference; what it lacks is empty.

  metrics: {name: (steps, values)} of the logged training steps, NaN where a
  value was not finite; lacks: names of the files that are not there.
  """

  name: str
  evaluation: dict
  samples: list
  metrics: dict
  lacks: list

  def mean(self, key):
    """(mean of the samples, its standard error); None where it is unknown."""
    value = self.evaluation.get("means", {}).get(key, {})
    return number(value.get("mean")), number(value.get("se"))


class Sweep(NamedTuple):
  """All that a report shows.

  runs: list of Run in the order of the swept value, without the reference;
  axis: the swept field if its values are numbers, else None; sampled: whether
  the sweep draws samples at all.
  """

  title: str
  notes: list
  runs: list
  reference: Run | None
  axis: str | None
  sampled: bool

  @property
  def everyone(self):
    """The reference, if there is one, and the runs."""
    return [self.reference, *self.runs] if self.reference else self.runs

  @property
  def rewards(self):
    """Keys of all rewards, the ground truth first."""
    means = [run.evaluation.get("means", {}) for run in self.everyone]
    samples = [run.samples[0] for run in self.everyone if run.samples]
    keys = [key for found in means + samples for key in found]
    return [k for k in dict.fromkeys(keys) if k.startswith("reward/")]


def read(workdir):
  """A sweep's folder as a Sweep.

  Raises: ValueError if the folder holds no sweep, or nothing of its runs.
  """
  workdir = epath.Path(workdir)
  command = f"`dpo-jax sweep --config FILE.py --workdir {workdir}`"
  if not (workdir / "sweep.json").exists():
    raise ValueError(
      f"{workdir} holds no sweep (sweep.json is missing); {command} makes one"
    )
  about = _json(workdir / "sweep.json")
  points = about["points"]
  axis = _axis([point["overrides"] for point in points])
  if axis:
    points = sorted(points, key=lambda point: point["overrides"][axis])
  runs = [_run(workdir / p["folder"], p["name"]) for p in points]
  start = about.get("reference")
  start = _run(workdir / start, "reference") if start else None
  sampled = start is not None or any(run.samples for run in runs)
  notes = [clean(note) for note in about.get("notes", [])]
  sweep = Sweep(clean(about["title"]), notes, runs, start, axis, sampled)
  if not any(r.evaluation or r.samples or r.metrics for r in sweep.everyone):
    raise ValueError(
      f"{workdir} holds a sweep, but nothing of its runs yet; {command} makes "
      "them"
    )
  return sweep


def _axis(points):
  """The one field that all points set to a number, or None."""
  fields = {key for point in points for key in point}
  if len(fields) != 1:
    return None
  (field,) = fields
  kinds = {type(point.get(field)) for point in points}
  return field if kinds <= {int, float} else None


def _run(folder, name):
  found = {
    file: read(folder / file)
    for file, read in _READERS.items()
    if (folder / file).exists()
  }
  return Run(
    clean(name),
    found.get("evaluation.json", {}),
    found.get("samples.jsonl", []),
    found.get("metrics.jsonl", {}),
    [file for file in _READERS if file not in found],
  )


def _json(path):
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def _lines(path):
  """The dicts of a .jsonl file; a line that is cut or damaged is left out."""
  return [row for _, row in files.jsonl(path) if isinstance(row, dict)]


def _curves(path):
  """{metric: (steps, values)} of the lines of kind "train"."""
  logged = [
    row
    for row in _lines(path)
    if row.get("kind") == "train" and number(row.get("step")) is not None
  ]
  steps = [row["step"] for row in logged]
  curves = {}
  for name in dict.fromkeys(name for row in logged for name in row):
    values = [number(row.get(name)) for row in logged]
    curves[name] = steps, np.array(values, float).tolist()  # None as NaN
  return curves


_READERS = {
  "evaluation.json": _json,
  "samples.jsonl": _lines,
  "metrics.jsonl": _curves,
}


def clean(text):
  """Text without what no page may hold: control characters, half surrogates.

  Line breaks and tabs stay; a line break is always a line feed.
  """
  text = str(text).replace("\r\n", "\n")
  return "".join(
    c
    if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")
    else "\ufffd"
    for c in text
  )


def number(value):
  """A finite number as it is, all else as None."""
  real = isinstance(value, int | float) and not isinstance(value, bool)
  return value if real and math.isfinite(value) else None
