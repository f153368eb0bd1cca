"""The report of a study: the figure, the claims, the facts.

`write` makes frontier.png, frontier.json, report.md and report.html.
"""

import jinja2
from etils import epath

from dpo_jax import progress
from dpo_jax.report import claims, figures, markdown, methods

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


def write(workdir):
  """Writes the report of a study's folder; returns the path of report.html."""
  workdir, study = epath.Path(workdir), claims.read(workdir)
  claims.write(study, workdir / "frontier.json")
  wide, narrow = (methods.draw(study, wide=wide) for wide in (True, False))
  if wide is not None:
    (workdir / "frontier.png").write_bytes(figures.png(wide))
  sections = list(_sections(study))
  text = _markdown(study, sections, wide is not None)
  (workdir / "report.md").write_bytes(text.encode())
  page = _page(study, sections, [("wide", wide), ("narrow", narrow)])
  (workdir / "report.html").write_bytes(page.encode())
  return workdir / "report.html"


def text(workdir):
  """The claims and their verdicts, for a console."""
  study, parts = claims.read(workdir), []
  for title, heads, body in _sections(study):
    parts += [title, _aligned(heads, body), ""]
  parts += _remarks(study)
  return "\n".join(parts).rstrip()


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


def _aligned(heads, body):
  columns = list(zip(heads, *body, strict=True))
  widths = [max(map(len, column)) for column in columns]
  lines = [
    "  ".join(
      cell.ljust(width) for cell, width in zip(line, widths, strict=True)
    )
    for line in (heads, *body)
  ]
  return "\n".join(line.rstrip() for line in lines)


def _markdown(study, sections, drawn):
  parts = [f"# {TITLE}", *_remarks(study)]
  if drawn:
    parts += ["![Reward over KL](frontier.png)", _caption(study)]
  for title, heads, body in sections:
    rows = [(name, *((cell,) for cell in cells)) for name, *cells in body]
    parts += [f"## {title}", markdown.table(heads, rows)]
  return "\n\n".join(parts) + "\n"


def _caption(study):
  return CAPTION.format(seeds=len(study.seeds))


def _page(study, sections, drawings):
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("dpo_jax.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  names = {figures.INK: "--ink", figures.MUTED: "--muted"}
  names |= {figures.GRID: "--grid", figures.PAPER: "--paper"}
  svgs = [
    figures.svg(drawing, kind, "Reward over KL", names)
    for kind, drawing in drawings
    if drawing is not None
  ]
  return environment.get_template("study.html").render(
    title=TITLE,
    caption=_caption(study),
    remarks=_remarks(study),
    sections=sections,
    svgs=svgs,
    made_with=study.about["made_with"],
  )
