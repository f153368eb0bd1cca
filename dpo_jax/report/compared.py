"""Methods compared on samples: what their sweeps say, seed by seed.

A folder has compared.json (config.compared) and the sweeps that it names. Every
checkpoint of a run is a point between reward and KL, both estimates, and a
method's envelope E(k) is what the best of its checkpoints of KL ≤ k is worth.
The best on some prompts seems better than it is, so that it is chosen on half
of the prompts and measured on the other, and the other way round; E is their
mean.
"""

import json
from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax import store
from dpo_jax.eval import statistics
from dpo_jax.report import folder, measures

BEST_OF = "best_of"
KLS = 50  # points of an envelope, whose mean is compared


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
        sweeps[method, seed] = folder.read(path)
      except ValueError as error:
        missing.append(str(error))
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
      lacking.append(f"seed {seed}, {method}, {run.name}: not measured yet")
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


def comparisons(compared):
  """A dict for each method that ours is compared with.

  "against"; "until", the largest KL in nats that both reach in every seed;
  "ours" and "theirs", the mean of E over the KLs from 0 to there ({"mean",
  "se"} over seeds); "each", the difference in each of "seeds", and
  "difference"; "dominated", the share of their checkpoints that one of ours
  beats on both axes, and "dominates", of ours by theirs. Of a method that no
  seed has beside ours, the first alone.
  """
  ours, rows = compared.options["method"], []
  for name in compared.options["against"]:
    if name == BEST_OF:
      rows.append(_against_best_of(compared, ours))
      continue
    seeds = _both(compared, ours, name)
    if not seeds:
      rows.append({"against": name})
      continue
    each = [[spots(compared, m, s) for m in (ours, name)] for s in seeds]
    until = min(furthest(points) for pair in each for points in pair)
    grid = np.linspace(0, until, KLS)
    reached = [[envelope(points, grid).mean() for points in p] for p in each]
    beaten = [_beaten(*pair) for pair in each]
    rows.append(
      _row(name, until, seeds, reached)
      | {
        "dominated": float(np.mean([theirs for theirs, _ in beaten])),
        "dominates": float(np.mean([mine for _, mine in beaten])),
      }
    )
  return rows


def _both(compared, *methods):
  """Seeds in which all of some methods are measured."""
  return [
    seed
    for seed in compared.seeds
    if all(
      any(c.seed == seed for c in compared.curves.get(m, ())) for m in methods
    )
  ]


def _row(name, until, seeds, reached):
  """Fields of a comparison that come of (ours, theirs) of each seed."""
  ours, theirs = np.transpose(reached)
  return {
    "against": name,
    "until": float(until),
    "seeds": seeds,
    "ours": _over(ours),
    "theirs": _over(theirs),
    "each": (ours - theirs).tolist(),
    "difference": _over(ours - theirs),
  }


def _over(values):
  """{"mean", "se"} over seeds; of one seed the error is None."""
  return statistics.plain(statistics.over_prompts(values))


def _beaten(ours, theirs):
  """(share of theirs beaten by ours, of ours by theirs), but for step 0."""
  mine, other = (
    np.transpose([(s.kl[0], s.reward[0]) for s in points[1:]])
    for points in (ours, theirs)
  )
  return (
    statistics.dominated(*other, *mine),
    statistics.dominated(*mine, *other),
  )


def best_of_points(compared, seed):
  """[(n, KL bound, reward)] of a seed's Best-of-N, N = 1 aside."""
  items = compared.best_of[seed]["best_of"]
  key = compared.reward
  return [
    (i["n"], i["bound"], i["means"][key]["mean"]) for i in items if i["n"] > 1
  ]


def _against_best_of(compared, ours):
  """At the KLs of the N that both reach; theirs is the bound of it."""
  seeds = [s for s in _both(compared, ours) if s in compared.best_of]
  if not seeds:
    return {"against": BEST_OF}
  reach = min(furthest(spots(compared, ours, s)) for s in seeds)
  reached, until = [], 0.0
  for seed in seeds:
    points = [p for p in best_of_points(compared, seed) if p[1] <= reach]
    if not points:
      return {"against": BEST_OF}
    kls = [kl for _, kl, _ in points]
    until = max(kls)
    mine = envelope(spots(compared, ours, seed), kls).mean()
    reached.append((mine, np.mean([reward for *_, reward in points])))
  return _row(BEST_OF, until, seeds, reached)


def trend(compared):
  """How our final KL follows the swept number; None if nothing says so.

  {"field", "values" (falling), "seeds", "kl" [seeds][values], "strict" (seeds
  in which KL rises at every step), "p" of Page's test, None of one seed}.
  """
  field, ours = compared.options.get("trend"), compared.options["method"]
  if field is None:
    return None
  found = {
    (c.seed, _value(c.run.config, field)): c.spots[-1].kl[0]
    for c in compared.curves.get(ours, ())
  }
  values = sorted({value for _, value in found}, reverse=True)
  seeds = [s for s in compared.seeds if all((s, v) in found for v in values)]
  if not seeds or len(values) < 3:
    return None
  kl = np.array([[found[seed, value] for value in values] for seed in seeds])
  return {
    "field": field,
    "values": values,
    "seeds": seeds,
    "kl": kl.tolist(),
    "strict": int(np.all(np.diff(kl) > 0, axis=1).sum()),
    "p": statistics.trend(kl) if len(seeds) > 1 else None,
  }


def _value(config, field):
  section, name = field.split(".")
  return config[section][name]


def ends(compared):
  """Where every setting ends: {"method", "setting", "seeds", **measures}.

  Of each the numbers of measures.of, means over seeds with their errors, and
  "updates" and "seconds" of a run. The reference comes first, as a method, and
  Best of N last, at the bound of its KL.
  """
  groups = {("reference", ""): [(s, r) for s, r in compared.starts.items()]}
  for name, curves in compared.curves.items():
    for curve in curves:
      key = name, curve.setting
      groups.setdefault(key, []).append((curve.seed, curve.run))
  return [
    {"method": name, "setting": setting, "seeds": [s for s, _ in runs]}
    | _measures(compared, name, runs)
    for (name, setting), runs in groups.items()
  ] + _ends_of_best_of(compared)


def _ends_of_best_of(compared):
  """Those of Best of N, an N each."""
  items = {}
  for seed, made in compared.best_of.items():
    for item in made["best_of"]:
      if item["n"] > 1:
        items.setdefault(item["n"], []).append((seed, item))
  return [
    {
      "method": BEST_OF,
      "setting": f"N={n}",
      "seeds": [seed for seed, _ in found],
      "kl": found[0][1]["bound"],
    }
    | {
      key: _over([item["means"][key]["mean"] for _, item in found])
      for key in (compared.reward, "length")
    }
    for n, found in items.items()
  ]


def _measures(compared, name, runs):
  """Those of some runs; each beside the reference of its own seed."""
  own = compared.options["method"] if name == "reference" else name
  rows = [measures.of(compared.sweeps[own, seed], [run]) for seed, run in runs]
  for row, (_, run) in zip(rows, runs, strict=True):
    row["updates"] = run.evaluation.get("step")
    _, elapsed = run.metrics.get("elapsed", ((), (None,)))
    row["seconds"] = elapsed[-1]
  keys = rows[0].keys() - {measures.INTERVAL}
  return {
    key: statistics.plain(measures.over_seeds([row[key] for row in rows]))
    for key in sorted(keys)
  }


def summary(compared):
  """All of it as plain values: what frontier.json holds."""
  runs = [
    {
      "method": curve.method,
      "seed": curve.seed,
      "setting": curve.setting,
      "rate": curve.run.config["optim"]["learning_rate"],
      "checkpoints": [spot._asdict() for spot in curve.spots],
    }
    for curves in compared.curves.values()
    for curve in curves
  ]
  return {
    "made_with": made_with(compared),
    "options": compared.options,
    "reward": compared.reward,
    "missing": compared.missing,
    "comparisons": comparisons(compared),
    "trend": trend(compared),
    "ends": ends(compared),
    "references": {
      str(seed): start(compared, seed)._asdict() for seed in compared.seeds
    },
    "best_of": {str(seed): made for seed, made in compared.best_of.items()},
    "runs": runs,
  }


def made_with(compared):
  """Versions and machine, of the first policy that was measured."""
  first = next(iter(compared.starts.values()))
  return first.evaluation.get("made_with", {})


def write(compared, path):
  """Writes `summary` as JSON."""
  content = statistics.plain(summary(compared))
  store.write(path, (json.dumps(content, indent=1) + "\n").encode())
