"""What compared sweeps say: who is ahead, what β does, where settings end."""

import numpy as np

from dpo_jax.config import saved
from dpo_jax.eval import statistics
from dpo_jax.report import compared, measures, provenance

KLS = 50  # points of an envelope, whose mean is compared


def comparisons(found):
  """A dict for each method that ours is compared with.

  "against"; "since" and "until", the KLs in nats between which both have
  checkpoints in every seed: below its first one an envelope is a chord, and
  says how near to the reference it was measured; "ours" and "theirs", the mean
  of E over the KLs between ({"mean", "se"} over seeds); "each", the difference
  in each of "seeds", and "difference"; "dominated", the share of their
  checkpoints that one of ours beats on both axes, and "dominates", of ours by
  theirs. Of a method that has no KL or seed in common with ours, the first
  alone.
  """
  ours, rows = found.options["method"], []
  for name in found.options["against"]:
    if name == compared.BEST_OF:
      rows.append(_against_best_of(found, ours))
      continue
    seeds = _both(found, ours, name)
    each = [[compared.spots(found, m, s) for m in (ours, name)] for s in seeds]
    reached = [compared.reach(points) for pair in each for points in pair]
    since = max((least for least, _ in reached), default=0.0)
    until = min((most for _, most in reached), default=0.0)
    if since >= until:
      rows.append({"against": name})
      continue
    grid = np.linspace(since, until, KLS)
    means = [
      [compared.envelope(points, grid).mean() for points in p] for p in each
    ]
    beaten = [_beaten(*pair) for pair in each]
    rows.append(
      _row(name, (since, until), seeds, means)
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


def _row(name, between, seeds, reached):
  """Fields of a comparison that come of (ours, theirs) of each seed."""
  ours, theirs = np.transpose(reached)
  return {
    "against": name,
    "since": float(between[0]),
    "until": float(between[1]),
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
  """At the KLs of the N that ours reaches; that of Best of N is a bound."""
  seeds = [s for s in _both(found, ours) if s in found.best_of]
  own = [compared.spots(found, ours, seed) for seed in seeds]
  reach = min((compared.reach(spots)[1] for spots in own), default=0.0)
  theirs = [
    {kl: reward for _, kl, reward in compared.best_of_points(found, seed)}
    for seed in seeds
  ]
  shared = set.intersection(*map(set, theirs)) if theirs else set()
  kls = sorted(kl for kl in shared if kl <= reach)
  if not kls:
    return {"against": compared.BEST_OF}
  reached = [
    (compared.envelope(spots, kls).mean(), np.mean([at[kl] for kl in kls]))
    for spots, at in zip(own, theirs, strict=True)
  ]
  return _row(compared.BEST_OF, (kls[0], kls[-1]), seeds, reached)


def trend(found):
  """How our final KL follows the swept number; None if nothing says so.

  {"field", "values" (falling), "rates" (learning rates of each value),
  "seeds", "kl" [seeds][values], "strict" (seeds in which KL rises at every
  step), "p" of Page's test, None of one seed}.
  """
  field, ours = found.options.get("trend"), found.options["method"]
  if field is None:
    return None
  final, rates = {}, {}
  for curve in found.curves.get(ours, ()):
    config = saved.flatten(curve.run.config)
    value = config.get(field)
    final[curve.seed, value] = curve.spots[-1].kl[0]
    rates.setdefault(value, set()).add(config.get("optim.learning_rate"))
  if None in rates:
    return None
  values = sorted(rates, reverse=True)
  seeds = [s for s in found.seeds if all((s, v) in final for v in values)]
  if not seeds or len(values) < 3:
    return None
  kl = np.array([[final[seed, value] for value in values] for seed in seeds])
  return {
    "field": field,
    "values": values,
    "rates": [sorted(rates[value]) for value in values],
    "seeds": seeds,
    "kl": kl.tolist(),
    "strict": int(np.all(np.diff(kl) > 0, axis=1).sum()),
    "p": statistics.trend(kl) if len(seeds) > 1 else None,
  }


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
  for seed, all_n in found.best_of.items():
    for item in all_n:
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
    row["seconds"] = provenance.trained(run.metrics)
  keys = {key for row in rows for key in row} - {measures.INTERVAL}
  return {
    key: statistics.plain(measures.over_seeds([row.get(key) for row in rows]))
    for key in sorted(keys)
  }


def summary(found):
  """All of it as plain values: what frontier.json holds."""
  runs = [
    {
      "method": curve.method,
      "seed": curve.seed,
      "setting": curve.setting,
      "rate": saved.flatten(curve.run.config).get("optim.learning_rate"),
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
    "best_of": {str(seed): items for seed, items in found.best_of.items()},
    "runs": runs,
  }
