"""A sweep's folder, read: its runs with what each has got so far."""

import json
import math
import unicodedata
from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax import lines, store
from dpo_jax.config import load
from dpo_jax.data.read import files

# Points that differ in these alone are the same experiment, made again.
SEEDS = ("init_seed", "data.seed")


class Run(NamedTuple):
  """A point of the sweep, or the reference; what it lacks is empty.

  metrics: {name: (steps, values)} of the logged training steps, and
  "held_out/NAME" of the evaluations between them, NaN where a value was not
  finite; lacks: names of the files that are not there.
  """

  name: str
  evaluation: dict
  samples: list
  metrics: dict
  lacks: list
  config: dict

  def mean(self, key):
    """(mean of the samples, its standard error); None where it is unknown."""
    value = self.evaluation.get("means", {}).get(key, {})
    return number(value.get("mean")), number(value.get("se"))


class Group(NamedTuple):
  """Runs that differ in their seeds alone; most often one."""

  name: str
  runs: list


class Entry(NamedTuple):
  """A line of the table: a run, or the mean over the seeds of a group.

  group: number of its group, None for the reference; nested: whether a mean
  over seeds that it is part of stands above it.
  """

  name: str
  runs: list
  group: int | None
  nested: bool


class Sweep(NamedTuple):
  """All that a report shows.

  groups: list of Group in the order of the swept value, without the reference;
  axis: the swept field if its values are numbers, else None, seeds aside;
  sampled: whether the sweep draws samples at all.
  """

  title: str
  notes: list
  groups: list
  reference: Run | None
  axis: str | None
  sampled: bool

  @property
  def runs(self):
    """All runs but the reference."""
    return [run for group in self.groups for run in group.runs]

  @property
  def everyone(self):
    """The reference, if there is one, and the runs."""
    return [self.reference, *self.runs] if self.reference else self.runs

  def group_of(self, run):
    """The number of a run's group; None for the reference."""
    for number, group in enumerate(self.groups):
      if any(run is other for other in group.runs):
        return number
    return None

  @property
  def seeded(self):
    """Whether a group has several seeds that are evaluated."""
    return any(len(evaluated(group)) > 1 for group in self.groups)

  @property
  def entries(self):
    """The Entries of the table: the reference, then group by group."""
    start = self.reference
    entries = [Entry(start.name, [start], None, False)] if start else []
    for number, group in enumerate(self.groups):
      runs = evaluated(group)
      if len(runs) > 1:
        name = f"{group.name} ({len(runs)} seeds)"
        entries.append(Entry(name, runs, number, False))
      entries += [
        Entry(run.name, [run], number, len(runs) > 1) for run in group.runs
      ]
    return entries

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
  points = about.get("points")
  if not isinstance(points, list) or "title" not in about:
    raise ValueError(
      f"{workdir / 'sweep.json'} is damaged: it names no points; {command} "
      "writes it again"
    )
  settings = [_numbers(_without_seeds(point)) for point in points]
  axis = _axis(settings)
  if axis:
    values = [setting[axis] for setting in settings]
    points = [points[place] for place in np.argsort(values, kind="stable")]
  groups = _groups(points, workdir)
  runs = [run for group in groups for run in group.runs]
  start = about.get("reference")
  start = _run(_point(workdir, start), "reference") if start else None
  sampled = start is not None or any(run.samples for run in runs)
  notes = [clean(note) for note in about.get("notes", [])]
  sweep = Sweep(clean(about["title"]), notes, groups, start, axis, sampled)
  if not any(r.evaluation or r.samples or r.metrics for r in sweep.everyone):
    raise ValueError(
      f"{workdir} holds a sweep, but nothing of its runs yet; {command} makes "
      "them"
    )
  return sweep


def evaluated(group):
  """The runs of a group that are evaluated."""
  return [run for run in group.runs if run.evaluation]


def _without_seeds(point):
  """What a point sets, but for the seeds."""
  return {k: v for k, v in point["overrides"].items() if k not in SEEDS}


def _numbers(setting):
  """A setting whose argument of the config, "beta=0.1", is a field, too."""
  text = setting.get("arg")
  name, _, value = (
    text.partition("=") if isinstance(text, str) else ("", "", "")
  )
  try:
    value = float(value)
  except ValueError:
    return setting
  plain = len(setting) == 1 and number(value) is not None
  return {name: value} if plain and not name.endswith("seed") else setting


def _groups(points, workdir):
  """Points as Groups, each where its first one is."""
  alike = {}
  for point in points:
    key = json.dumps(_without_seeds(point), sort_keys=True)
    alike.setdefault(key, []).append(point)
  groups = []
  for same in alike.values():
    runs = [_run(_point(workdir, p["folder"]), p["name"]) for p in same]
    name = runs[0].name
    if len(runs) > 1:
      name = clean(load.point_name(_without_seeds(same[0]))) or "all"
    groups.append(Group(name, runs))
  return groups


def _point(workdir, name):
  """The folder of a point, or of the reference, that sweep.json names."""
  return store.inside(workdir, name, workdir / "sweep.json")


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
    if lines.exists(folder / file)
  }
  evaluation = found.get("evaluation.json", {})
  config = evaluation.get("config")
  if config is None and (folder / "config.json").exists():
    config = _json(folder / "config.json")
  return Run(
    clean(name),
    evaluation,
    found.get("samples.jsonl", []),
    found.get("metrics.jsonl", {}),
    [file for file in _READERS if file not in found],
    config or {},
  )


def _json(path):
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} is damaged: it holds no JSON object")
  return content


def _lines(path):
  """The dicts of a .jsonl file; a line that is cut or damaged is left out."""
  return [row for _, row in files.jsonl(path) if isinstance(row, dict)]


def curves(rows):
  """{metric: (steps, values)} of rows of kind "train", then "eval".

  Those of "eval" are called "held_out/NAME"; what is no finite number is NaN.
  """
  curves = {}
  rows = [row for row in rows if number(row.get("step")) is not None]
  for kind, prefix in (("train", ""), ("eval", "held_out/")):
    logged = [row for row in rows if row.get("kind") == kind]
    steps = [row["step"] for row in logged]
    for name in dict.fromkeys(name for row in logged for name in row):
      values = [number(row.get(name)) for row in logged]
      # None as NaN
      curves[prefix + name] = steps, np.array(values, float).tolist()
  return curves


_READERS = {
  "evaluation.json": _json,
  "samples.jsonl": _lines,
  "metrics.jsonl": lambda path: curves(_lines(path)),
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
