"""What a study of methods says of the claims that were fixed before it.

A study's folder has study.json (what was asked, and the exact facts of every
seed) and LABELS/METHOD.json, the curves of a method.
"""

from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax import store
from dpo_jax.eval import statistics

TRUE = "true"  # the labels of methods that read no comparison
BEST_OF = "best_of"


class Study(NamedTuple):
  """A study's folder, read.

  Attributes:
    about: study.json.
    results: {(labels, method): METHOD.json}, as far as they are done.
    missing: ["labels/method"] that are not.
  """

  about: dict
  results: dict
  missing: list

  @property
  def options(self):
    """config.study as plain values."""
    return self.about["options"]

  @property
  def claims(self):
    """config.study.claims as plain values."""
    return self.options["claims"]

  @property
  def seeds(self):
    """The seeds, in the order of `worlds`."""
    return [world["seed"] for world in self.about["worlds"]]


def holds(workdir):
  """Whether a folder is that of a study."""
  return (epath.Path(workdir) / "study.json").exists()


def read(workdir):
  """The Study of a folder.

  Raises: ValueError for a damaged file.
  """
  workdir = epath.Path(workdir)
  about, results, missing = store.read_json(workdir / "study.json"), {}, []
  for job in about["jobs"]:
    key = job["labels"], job["method"]
    path = workdir / key[0] / f"{key[1]}.json"
    if path.exists():
      results[key] = store.read_json(path)
    else:
      missing.append("/".join(key))
  return Study(about, results, missing)


def result_of(study, labels, name):
  """A method's content under a labelling, or of r* itself; None if not done."""
  results = study.results
  return results.get((labels, name)) or results.get((TRUE, name))


def curves_of(study, labels, name):
  """[[curve of each setting] of each seed]: {"kl", "reward", "setting"}.

  None if the method is not done.
  """
  if name == BEST_OF:
    return [[_best_of(world, labels)] for world in study.about["worlds"]]
  result = result_of(study, labels, name)
  if result is None:
    return None
  return [
    [run for run in result["runs"] if run["seed"] == seed]
    for seed in study.seeds
  ]


def _best_of(world, labels):
  ranked = world["best_of"][labels]
  return {k: [point[k] for point in ranked] for k in ("kl", "reward")}


def points_of(study, labels, name):
  """[(kl, reward) of all checkpoints] of each seed, or None."""
  curves = curves_of(study, labels, name)
  if curves is None:
    return None
  starts = [world["reference"]["reward"] for world in study.about["worlds"]]
  return [
    statistics.points(own, start)
    for own, start in zip(curves, starts, strict=True)
  ]


def comparisons(study, labels):
  """A dict for each method that ours is compared with under a labelling.

  "against", "verdict", the fields of statistics.Comparison, "holm" (p after
  Holm), "gap" and "their_gap" (to the exact frontier, on the same KLs),
  "dominated" (share of their checkpoints beaten by one of ours) and
  "dominates" (share of ours beaten by one of theirs). Of a method that is not
  done, or has no KL in common with ours, "verdict" says so and nothing else is
  there.
  """
  claims, rows = study.claims, []
  ours = points_of(study, labels, claims["method"])
  for name in claims["against"]:
    theirs = points_of(study, labels, name)
    row = {"against": name, "labels": labels}
    if ours is None or theirs is None:
      rows.append(row | {"verdict": "not done"})
      continue
    rows.append(row | _compared(study, ours, theirs, name == BEST_OF))
  done = [row for row in rows if "p" in row]
  adjusted = statistics.holm([row["p"] for row in done]) if done else []
  for row, p in zip(done, adjusted, strict=True):
    comparison = statistics.Comparison(
      **{name: row[name] for name in statistics.Comparison._fields}
    )
    row["holm"] = p
    row["verdict"] = statistics.verdict(
      comparison, p, level=claims["level"], margin=claims["margin"]
    )
  return rows


def powerless(study):
  """A line that says why nothing can be reproduced with so few seeds, or None.

  The sign-flip test of n seeds has no p below 2^−n.
  """
  claims, seeds = study.claims, len(study.seeds)
  least = min(1.0, len(claims["against"]) / 2**seeds)
  if least < claims["level"]:
    return None
  return (
    f"{seeds} seeds and {len(claims['against'])} comparisons: no p after Holm "
    f"is below {least:.2g}, and the level is {claims['level']:g}, so that "
    "nothing can be called reproduced; add seeds"
  )


def _compared(study, ours, theirs, at_theirs):
  """What is compared of two methods' points, seed by seed.

  Args:
    at_theirs: at the KLs of their few points, and not at those of the grid.
  """
  claims = study.claims
  if at_theirs:  # as many for each seed, without step 0 and the best of one
    grids = [kl[2:] for kl, _ in theirs]
    grid = np.mean(grids, axis=0)
  else:
    common = [
      statistics.near(kl, claims["grid"], claims["near"])
      for kl, _ in (*ours, *theirs)
    ]
    grid = np.asarray(claims["grid"])[np.all(common, axis=0)]
    grids = [grid] * len(ours)
  if not len(grid):
    return {"verdict": "no KL in common"}
  envelopes = [
    [statistics.envelope(*own, k) for own, k in zip(points, grids, strict=True)]
    for points in (ours, theirs)
  ]
  exact = [
    np.interp(k, world["frontier"]["kl"], world["frontier"]["reward"])
    for k, world in zip(grids, study.about["worlds"], strict=True)
  ]
  comparison = statistics.compare(
    *(*envelopes, grid),
    resamples=claims["resamples"],
    seed=claims["seed"],
  )
  trained = [[(kl[1:], r[1:]) for kl, r in points] for points in (ours, theirs)]
  beaten = [
    (statistics.dominated(*t, *o), statistics.dominated(*o, *t))
    for o, t in zip(*trained, strict=True)
  ]
  gaps = [float(np.mean(np.subtract(exact, each))) for each in envelopes]
  return {
    **comparison._asdict(),
    "gap": gaps[0],
    "their_gap": gaps[1],
    "dominated": float(np.mean([theirs for theirs, _ in beaten])),
    "dominates": float(np.mean([ours for _, ours in beaten])),
  }


def trend(study, labels):
  """How the final KL follows β, or None if the method is not done.

  {"betas" (falling), "kl" [seeds][betas], "optimum" (mean over seeds of the KL
  of π_ref e^(κ r*/β) / Z, of Bradley–Terry labels), "strict" (seeds in which
  KL rises at every step to a smaller β), "p" of Page's test, "verdict"}.
  """
  result = result_of(study, labels, study.claims["trend"])
  if result is None:
    return None
  runs = result["runs"]
  betas = sorted({run["setting"]["loss.beta"] for run in runs}, reverse=True)
  kl = np.array(
    [
      [
        run["kl"][-1]
        for beta in betas
        for run in runs
        if (run["seed"], run["setting"]["loss.beta"]) == (seed, beta)
      ]
      for seed in study.seeds
    ]
  )
  p, strict = statistics.trend(kl), np.all(np.diff(kl) > 0, axis=1)
  reproduced = p < study.claims["level"] and strict.all()
  return {
    "labels": labels,
    "betas": betas,
    "kl": kl.tolist(),
    "optimum": _optimal_kl(study, labels, betas),
    "strict": int(strict.sum()),
    "p": p,
    "verdict": statistics.REPRODUCED
    if reproduced
    else statistics.NOT_REPRODUCED,
  }


def _optimal_kl(study, labels, betas):
  """The KL of the optimum at each β; None where labels have no finite one."""
  if labels != "bradley_terry":
    return None
  scale, found = study.options["label_scale"], []
  for world in study.about["worlds"]:
    exact = world["frontier"]  # at temperatures that fall
    temperature, kl = exact["temperature"][::-1], exact["kl"][::-1]
    found.append(np.interp(np.divide(betas, scale), temperature, kl))
  return np.mean(found, axis=0).tolist()


def summary(study):
  """All of it as plain values: what frontier.json holds."""
  every = study.options["labels"]
  rows = [row for labels in every for row in comparisons(study, labels)]
  trends = [trend(study, labels) for labels in every]
  return {
    "made_with": study.about["made_with"],
    "language": study.about["language"],
    "options": study.options,
    "missing": study.missing,
    "comparisons": rows,
    "trends": [each for each in trends if each],
    "worlds": [
      {k: world[k] for k in ("seed", "reference", "reward_model_accuracy")}
      for world in study.about["worlds"]
    ],
    "methods": [
      {
        **{k: result[k] for k in ("method", "labels", "rate", "tried")},
        **{k: result[k] for k in ("tokens", "seconds")},
        "final": [
          {
            "seed": run["seed"],
            "setting": run["setting"],
            "kl": run["kl"][-1],
            "reward": run["reward"][-1],
          }
          for run in result["runs"]
        ],
        "envelopes": _envelopes(study, key),
      }
      for key, result in study.results.items()
    ],
  }


def _envelopes(study, key):
  """[[E(k) at the KLs of the grid] of each seed]."""
  return [
    statistics.envelope(*points, study.claims["grid"]).tolist()
    for points in points_of(study, *key)
  ]
