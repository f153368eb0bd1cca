"""What compared sweeps say: who is ahead, what β does, where settings end."""

import json

import numpy as np

from dpo_jax import store
from dpo_jax.eval import statistics
from dpo_jax.report import compared, measures

KLS = 50  # points of an envelope, whose mean is compared


def comparisons(found):
  """A dict for each method that ours is compared with.

  "against"; "until", the largest KL in nats that both reach in every seed;
  "ours" and "theirs", the mean of E over the KLs from 0 to there ({"mean",
  "se"} over seeds); "each", the difference in each of "seeds", and
  "difference"; "dominated", the share of their checkpoints that one of ours
  beats on both axes, and "dominates", of ours by theirs. Of a method that no
  seed has beside ours, the first alone.
  """
  ours, rows = found.options["method"], []
  for name in found.options["against"]:
    if name == compared.BEST_OF:
      rows.append(_against_best_of(found, ours))
      continue
    seeds = _both(found, ours, name)
    if not seeds:
      rows.append({"against": name})
      continue
    each = [[compared.spots(found, m, s) for m in (ours, name)] for s in seeds]
    until = min(compared.furthest(points) for pair in each for points in pair)
    grid = np.linspace(0, until, KLS)
    reached = [
      [compared.envelope(points, grid).mean() for points in p] for p in each
    ]
    beaten = [_beaten(*pair) for pair in each]
    rows.append(
      _row(name, until, seeds, reached)
      | {
        "dominated": float(np.mean([theirs for theirs, _ in beaten])),
        "dominates": float(np.mean([mine for _, mine in beaten])),
      }
    )
  return rows


def _both(found, *methods):
  """Seeds in which all of some methods are measured."""
  return [
    seed
    for seed in found.seeds
    if all(
      any(c.seed == seed for c in found.curves.get(m, ())) for m in methods
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


def _against_best_of(found, ours):
  """At the KLs of the N that both reach; theirs is the bound of it."""
  seeds = [s for s in _both(found, ours) if s in found.best_of]
  if not seeds:
    return {"against": compared.BEST_OF}
  reach = min(compared.furthest(compared.spots(found, ours, s)) for s in seeds)
  reached, until = [], 0.0
  for seed in seeds:
    points = [p for p in compared.best_of_points(found, seed) if p[1] <= reach]
    if not points:
      return {"against": compared.BEST_OF}
    kls = [kl for _, kl, _ in points]
    until = max(kls)
    mine = compared.envelope(compared.spots(found, ours, seed), kls).mean()
    reached.append((mine, np.mean([reward for *_, reward in points])))
  return _row(compared.BEST_OF, until, seeds, reached)


def trend(found):
  """How our final KL follows the swept number; None if nothing says so.

  {"field", "values" (falling), "seeds", "kl" [seeds][values], "strict" (seeds
  in which KL rises at every step), "p" of Page's test, None of one seed}.
  """
  field, ours = found.options.get("trend"), found.options["method"]
  if field is None:
    return None
  final = {
    (c.seed, _value(c.run.config, field)): c.spots[-1].kl[0]
    for c in found.curves.get(ours, ())
  }
  values = sorted({value for _, value in final}, reverse=True)
  seeds = [s for s in found.seeds if all((s, v) in final for v in values)]
  if not seeds or len(values) < 3:
    return None
  kl = np.array([[final[seed, value] for value in values] for seed in seeds])
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


def ends(found):
  """Where every setting ends: {"method", "setting", "seeds", **measures}.

  Of each the numbers of measures.of, means over seeds with their errors, and
  "updates" and "seconds" of a run. The reference comes first, as a method, and
  Best of N last, at the bound of its KL.
  """
  groups = {("reference", ""): [(s, r) for s, r in found.starts.items()]}
  for name, curves in found.curves.items():
    for curve in curves:
      key = name, curve.setting
      groups.setdefault(key, []).append((curve.seed, curve.run))
  return [
    {"method": name, "setting": setting, "seeds": [s for s, _ in runs]}
    | _measures(found, name, runs)
    for (name, setting), runs in groups.items()
  ] + _ends_of_best_of(found)


def _ends_of_best_of(found):
  """Those of Best of N, an N each."""
  items = {}
  for seed, made in found.best_of.items():
    for item in made["best_of"]:
      if item["n"] > 1:
        items.setdefault(item["n"], []).append((seed, item))
  return [
    {
      "method": compared.BEST_OF,
      "setting": f"N={n}",
      "seeds": [seed for seed, _ in own],
      "kl": own[0][1]["bound"],
    }
    | {
      key: _over([item["means"][key]["mean"] for _, item in own])
      for key in (found.reward, "length")
    }
    for n, own in items.items()
  ]


def _measures(found, name, runs):
  """Those of some runs; each beside the reference of its own seed."""
  rows = [
    measures.of(found.sweep(None if name == "reference" else name, seed), [run])
    for seed, run in runs
  ]
  for row, (_, run) in zip(rows, runs, strict=True):
    row["updates"] = run.evaluation.get("step")
    _, elapsed = run.metrics.get("elapsed", ((), (None,)))
    row["seconds"] = elapsed[-1]
  keys = rows[0].keys() - {measures.INTERVAL}
  return {
    key: statistics.plain(measures.over_seeds([row[key] for row in rows]))
    for key in sorted(keys)
  }


def summary(found):
  """All of it as plain values: what frontier.json holds."""
  runs = [
    {
      "method": curve.method,
      "seed": curve.seed,
      "setting": curve.setting,
      "rate": curve.run.config["optim"]["learning_rate"],
      "checkpoints": [spot._asdict() for spot in curve.spots],
    }
    for curves in found.curves.values()
    for curve in curves
  ]
  return {
    "made_with": compared.made_with(found),
    "options": found.options,
    "reward": found.reward,
    "missing": found.missing,
    "comparisons": comparisons(found),
    "trend": trend(found),
    "ends": ends(found),
    "references": {
      str(seed): compared.start(found, seed)._asdict() for seed in found.seeds
    },
    "best_of": {str(seed): made for seed, made in found.best_of.items()},
    "runs": runs,
  }


def write(found, path):
  """Writes `summary` as JSON."""
  content = statistics.plain(summary(found))
  store.write(path, (json.dumps(content, indent=1) + "\n").encode())
