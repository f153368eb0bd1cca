"""Methods compared on samples: what their sweeps say, seed by seed.

A folder has compared.json (config.compared) and the sweeps that it names. Every
checkpoint of a run is a point between reward and KL, both estimates, and a
method's envelope E(k) is the upper concave hull of its points and the
reference's: to answer each prompt by one of two policies, drawn with odds w,
earns a reward linear in w at a KL of no more than linear. A best checkpoint
until k alone would say how dense they are. The best on some prompts seems
better than it is, so that the hull is chosen on half of the prompts and
measured on the other, and the other way round; E is their mean.
"""

from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax import store
from dpo_jax.report import claims, folder

BEST_OF = claims.BEST_OF
_HALVES = "or not on halves of the prompts (sample.checkpoints=True)"


class Spot(NamedTuple):
  """A policy between reward and KL.

  kl, reward: (mean, standard error over prompts). halves: the means of two
  halves of the prompts, [(kl, reward), (kl, reward)].
  """

  step: int
  kl: tuple
  reward: tuple
  halves: list


class Curve(NamedTuple):
  """A run. spots: of its checkpoints, in order; run: folder.Run."""

  method: str
  seed: int
  setting: str
  spots: list
  run: folder.Run


class Compared(NamedTuple):
  """All that was read.

  Attributes:
    options: compared.json.
    reward: key of r*.
    starts: {seed: folder.Run of the reference}.
    curves: {method: [Curve]}.
    best_of: {seed: items of best_of.json, one an N}.
    sweeps: {(method, seed): folder.Sweep}.
    missing: lines that say what is not there.
  """

  options: dict
  reward: str
  starts: dict
  curves: dict
  best_of: dict
  sweeps: dict
  missing: list

  @property
  def methods(self):
    """Names of all methods, ours first."""
    return [self.options["method"], *self.options["against"]]

  @property
  def seeds(self):
    """Seeds of which a method was measured."""
    there = {c.seed for curves in self.curves.values() for c in curves}
    return [seed for seed in self.options["seeds"] if seed in there]

  def sweep(self, method, seed):
    """The folder.Sweep of a method, or the first of a seed for None."""
    return next(
      sweep
      for (name, number), sweep in self.sweeps.items()
      if number == seed and method in (None, name)
    )


def holds(workdir):
  """Whether a folder is one of compared sweeps."""
  return (epath.Path(workdir) / "compared.json").exists()


def read(workdir):
  """The Compared of a folder.

  Raises: ValueError for a damaged compared.json, or if no run is measured.
  """
  workdir = epath.Path(workdir)
  options = store.read_json(workdir / "compared.json")
  for name in ("seeds", "method", "against", "folder"):
    if name not in options:
      raise ValueError(f"{workdir / 'compared.json'} is damaged: no {name}")
  sweeps, ranked, missing = {}, {}, []
  for seed in options["seeds"]:
    for method in (options["method"], *options["against"]):
      path = workdir / options["folder"].format(seed=seed, method=method)
      try:
        if method == BEST_OF:
          ranked[seed] = _items(path / "best_of.json")
        else:
          sweeps[method, seed] = _sweep(path)
      except ValueError as error:
        missing.append(str(error))
  rewards = [key for sweep in sweeps.values() for key in sweep.rewards[:1]]
  curves, starts = {}, {}
  for (method, seed), sweep in list(sweeps.items()):
    if _spot(sweep.reference.evaluation, rewards[0]) is None:
      missing.append(f"seed {seed}, {method}: no reference, {_HALVES}")
      del sweeps[method, seed]
      continue
    starts.setdefault(seed, sweep.reference)
    own, without = _curves(method, seed, sweep, rewards[0])
    curves.setdefault(method, []).extend(own)
    missing += without
  if not any(curves.values()):
    raise ValueError(f"{workdir}: no sweep there has measured a run yet")
  for seed, items in list(ranked.items()):
    if not all(rewards[0] in item["means"] for item in items):
      missing.append(f"seed {seed}: best_of.json has no {rewards[0]}")
      del ranked[seed]
  return Compared(
    *(options, rewards[0], starts, curves, ranked, sweeps, missing)
  )


def _sweep(path):
  """The Sweep of a folder, whose reference was sampled; or ValueError."""
  if not (path / "sweep.json").exists():
    raise ValueError(f"{path}: no sweep yet")
  sweep = folder.read(path)
  if not sweep.rewards or sweep.reference is None:
    raise ValueError(f"{path}: its reference is not sampled yet")
  return sweep


def _items(path):
  """Those of a best_of.json; or ValueError."""
  if not path.exists():
    raise ValueError(f"{path}: not there yet")
  items = store.read_json(path).get("best_of")
  if not items:
    raise ValueError(f"{path} is damaged: it has no best_of; delete it")
  return items


def _curves(method, seed, sweep, reward):
  """(Curves of a sweep, lines that say which runs have no samples)."""
  own, without = [], []
  for run in sweep.runs:
    every = [*run.evaluation.get("checkpoints", []), run.evaluation]
    measured = [_spot(each, reward) for each in every]
    if None in measured or not run.config:
      what = f"seed {seed}, {method}, {run.name}"
      without.append(f"{what}: not measured yet, {_HALVES}")
    else:
      own.append(Curve(method, seed, run.name, measured, run))
  return own, without


def _spot(evaluation, reward):
  """The Spot of an evaluation; None if one of its values is not there."""
  means, halves = evaluation.get("means", {}), evaluation.get("halves", [])
  keys = "kl", reward
  if not set(keys) <= means.keys() or len(halves) != 2:
    return None
  kl, mean = ((means[key]["mean"], means[key]["se"]) for key in keys)
  parts = [tuple(half.get(key) for key in keys) for half in halves]
  values = [kl[0], mean[0], *parts[0], *parts[1]]
  if any(folder.number(value) is None for value in values):
    return None
  return Spot(evaluation["step"], kl, mean, parts)


def start(compared, seed):
  """The Spot of a seed's reference."""
  return _spot(compared.starts[seed].evaluation, compared.reward)


def spots(compared, method, seed):
  """All Spots of a method's seed, the reference first."""
  own = [c for c in compared.curves.get(method, ()) if c.seed == seed]
  return [start(compared, seed), *(spot for c in own for spot in c.spots)]


def envelope(points, grid):
  """E(k) at each k of a grid, of Spots, the first of which is the reference.

  Args:
    points: list of Spot.
    grid: KLs in nats; behind the last of them E is that of the best.
  """
  halves = np.array([spot.halves for spot in points])  # [spots, half, 2]
  out = []
  for chosen, told in ((0, 1), (1, 0)):
    hull = _hull(*halves[:, chosen].T)
    out.append(np.interp(grid, halves[hull, chosen, 0], halves[hull, told, 1]))
  return np.mean(out, axis=0)


def _hull(kl, reward):
  """Indices of the upper concave hull, from the first point to the best."""
  hull = [0]
  for new in np.lexsort((-reward, kl)):
    if kl[new] <= kl[0] or reward[new] <= reward[hull[-1]]:
      continue
    while len(hull) > 1:
      (x0, x1), (y0, y1) = kl[hull[-2:]], reward[hull[-2:]]
      if (y1 - y0) * (kl[new] - x0) > (reward[new] - y0) * (x1 - x0):
        break
      hull.pop()
    hull.append(int(new))
  return hull


def reach(points):
  """(least, largest) KL of some Spots, the reference aside."""
  kls = [spot.kl[0] for spot in points[1:]]
  return min(kls), max(kls)


def best_of_points(compared, seed):
  """[(n, KL bound, reward)] of a seed's Best of N, N = 1 aside.

  The reward is the reference's on all prompts and what N draws gain over one on
  those of best_of.json, which may be fewer.
  """
  key, items = compared.reward, compared.best_of[seed]
  alone = next((i for i in items if i["n"] == 1), None)
  base = start(compared, seed).reward[0]
  moved = base - alone["means"][key]["mean"] if alone else 0.0
  return [
    (i["n"], i["bound"], i["means"][key]["mean"] + moved)
    for i in items
    if i["n"] > 1
  ]


def made_with(compared):
  """Versions and machine, of the first policy that was measured."""
  first = next(iter(compared.starts.values()))
  return first.evaluation.get("made_with", {})
