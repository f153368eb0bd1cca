"""Methods compared on samples: what their sweeps say, seed by seed.

A folder has compared.json (config.compared) and the sweeps that it names. Every
checkpoint of a run is a point between reward and KL, both estimates, and a
method's envelope E(k) is what the best of its checkpoints of KL ≤ k is worth.
The best on some prompts seems better than it is, so that it is chosen on half
of the prompts and measured on the other, and the other way round; E is their
mean.
"""

from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax import store
from dpo_jax.report import folder

BEST_OF = "best_of"
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
    best_of: {seed: items of best_of.json}.
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

  Raises: ValueError for a damaged file, or if no sweep has a measured policy.
  """
  workdir = epath.Path(workdir)
  options = store.read_json(workdir / "compared.json")
  sweeps, best_of, missing = {}, {}, []
  for seed in options["seeds"]:
    for method in (options["method"], *options["against"]):
      path = workdir / options["folder"].format(seed=seed, method=method)
      if method == BEST_OF:
        if (path / "best_of.json").exists():
          best_of[seed] = store.read_json(path / "best_of.json")
        else:
          missing.append(f"{path}: no best_of.json")
        continue
      if not (path / "sweep.json").exists():
        missing.append(f"{path}: no sweep yet")
        continue
      try:
        sweep = folder.read(path)
      except ValueError as error:
        missing.append(str(error))
        continue
      start = sweep.reference and sweep.reference.evaluation
      if sweep.rewards and start and _spot(start, sweep.rewards[0]):
        sweeps[method, seed] = sweep
      else:
        missing.append(f"{path}: its reference is not measured yet, {_HALVES}")
  rewards = [key for sweep in sweeps.values() for key in sweep.rewards[:1]]
  if not rewards:
    raise ValueError(f"{workdir}: no sweep there has measured a policy yet")
  curves, starts = {}, {}
  for (method, seed), sweep in sweeps.items():
    starts.setdefault(seed, sweep.reference)
    found, lacking = _curves(method, seed, sweep, rewards[0])
    curves.setdefault(method, []).extend(found)
    missing += lacking
  return Compared(
    *(options, rewards[0], starts, curves, best_of, sweeps, missing)
  )


def _curves(method, seed, sweep, reward):
  """(Curves of a sweep, lines that say which runs have no samples)."""
  found, lacking = [], []
  for run in sweep.runs:
    every = [*run.evaluation.get("checkpoints", []), run.evaluation]
    spots = [_spot(each, reward) for each in every]
    if None in spots:
      what = f"seed {seed}, {method}, {run.name}"
      lacking.append(f"{what}: not measured yet, {_HALVES}")
    else:
      found.append(Curve(method, seed, run.name, spots, run))
  return found, lacking


def _spot(evaluation, reward):
  """The Spot of an evaluation, or None if it has none."""
  means, halves = evaluation.get("means", {}), evaluation.get("halves", [])
  if not {"kl", reward} <= means.keys() or len(halves) != 2:
    return None
  kl, mean = ((means[k]["mean"], means[k]["se"]) for k in ("kl", reward))
  parts = [(half["kl"], half[reward]) for half in halves]
  return Spot(evaluation["step"], kl, mean, parts)


def start(compared, seed):
  """The Spot of a seed's reference."""
  return _spot(compared.starts[seed].evaluation, compared.reward)


def spots(compared, method, seed):
  """All Spots of a method's seed, the reference first."""
  own = [c for c in compared.curves.get(method, ()) if c.seed == seed]
  return [start(compared, seed), *(spot for c in own for spot in c.spots)]


def envelope(points, grid):
  """E(k) at each k of a grid, of Spots; see the module docstring."""
  halves = np.array([spot.halves for spot in points])  # [spots, half, 2]
  out = []
  for chosen, told in ((0, 1), (1, 0)):
    within = halves[:, chosen, 0] <= np.asarray(grid)[:, None]
    best = np.argmax(np.where(within, halves[:, chosen, 1], -np.inf), axis=1)
    out.append(halves[best, told, 1])
  return np.mean(out, axis=0)


def furthest(points):
  """The largest KL of some Spots."""
  return max(spot.kl[0] for spot in points)


def best_of_points(compared, seed):
  """[(n, KL bound, reward)] of a seed's Best-of-N, N = 1 aside."""
  items = compared.best_of[seed]["best_of"]
  key = compared.reward
  return [
    (i["n"], i["bound"], i["means"][key]["mean"]) for i in items if i["n"] > 1
  ]


def made_with(compared):
  """Versions and machine, of the first policy that was measured."""
  first = next(iter(compared.starts.values()))
  return first.evaluation.get("made_with", {})
