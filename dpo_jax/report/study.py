"""The report of a study: the figure, the claims, the facts."""

import functools

from dpo_jax import progress
from dpo_jax.report import claims, methods, tables

TITLE = "Methods compared where all is exact"
CAPTION = (
  "Dots are checkpoints of every seed and setting; lines are the best reward "
  "until a KL, mean over {seeds} seeds with a band of one standard error over "
  "them. The exact frontier is π_ref e^(r*/τ) / Z."
)
HEADS = (
  *("against", "KLs", "gap", "their gap", "difference", "95 % interval"),
  *("p, Holm", "dominated", "by them", "verdict"),
)
TREND = (
  *("labels", "final KL by β (of its optimum)", "strict", "p, Page"),
  "verdict",
)


def page(workdir):
  """The tables.Page of a study's folder."""
  study = claims.read(workdir)
  return tables.Page(
    title=TITLE,
    caption=CAPTION.format(seeds=len(study.seeds)),
    remarks=_remarks(study),
    sections=list(_sections(study)),
    draw=functools.partial(methods.draw, study),
    made_with=study.about["made_with"],
    summary=claims.summary(study),
  )


def _remarks(study):
  """Lines that say what the results lack."""
  lines = [claims.powerless(study)]
  if study.missing:
    missing = ", ".join(study.missing)
    lines.append(f"not done yet: {missing}; the same sweep goes on")
  return [line for line in lines if line]


def _sections(study):
  """Yields (title, heads, rows of strings)."""
  ours = methods.shown(study.claims["method"])
  trends = []
  for labels in study.options["labels"]:
    rows = claims.comparisons(study, labels)
    shown = methods.LABELS.get(labels, labels)
    yield f"Does {ours} dominate? ({shown})", HEADS, list(map(_row, rows))
    trends.append(claims.trend(study, labels))
  rows = [_trend_row(each) for each in trends if each]
  if rows:
    yield "Does β control the KL?", TREND, rows
  yield "What each method took", *_costs(study)


def _row(row):
  """A comparison as the strings of HEADS."""
  name = methods.shown(row["against"])
  if "p" not in row:
    return [name, *["–"] * (len(HEADS) - 2), row["verdict"]]
  return [
    name,
    str(len(row["grid"])),
    f"{row['gap']:.4f}",
    f"{row['their_gap']:.4f}",
    f"{row['difference']:+.4f}",
    f"{row['low']:+.4f} to {row['high']:+.4f}",
    f"{row['holm']:.3f}",
    f"{row['dominated']:.0%}",
    f"{row['dominates']:.0%}",
    row["verdict"],
  ]


def _trend_row(trend):
  means = [
    sum(column) / len(column) for column in zip(*trend["kl"], strict=True)
  ]
  best = trend["optimum"] or [None] * len(means)
  told = [
    f"{beta:g}: {kl:.2f}{'' if exact is None else f' ({exact:.2f})'}"
    for beta, kl, exact in zip(trend["betas"], means, best, strict=True)
  ]
  return [
    methods.LABELS.get(trend["labels"], trend["labels"]),
    ", ".join(told),
    f"{trend['strict']} of {len(trend['kl'])} seeds",
    f"{trend['p']:.1g}",
    trend["verdict"],
  ]


def _costs(study):
  heads = "method", "labels", "learning rate", "tried", "tokens a run", "time"
  body = []
  for (labels, name), result in study.results.items():
    tried = result["tried"].items()
    edges = [*result["tried"]][:1] + [*result["tried"]][-1:]
    at_edge = str(result["rate"]) in edges
    body.append(
      [
        methods.shown(name),
        labels.replace("_", " "),
        f"{result['rate']:g}{', at the edge' if at_edge else ''}",
        ", ".join(f"{rate}: {gap:.4f}" for rate, gap in tried) or "–",
        f"{result['tokens']:,}",
        progress.duration(result["seconds"]),
      ]
    )
  return heads, body
