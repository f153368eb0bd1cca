"""A page of one figure and some tables: of a study, or of methods on text."""

import json
from collections.abc import Callable
from typing import NamedTuple

import jinja2
from etils import epath

from dpo_jax import store
from dpo_jax.eval import statistics
from dpo_jax.report import figures, markdown


class Page(NamedTuple):
  """What such a report says.

  Attributes:
    title: of the whole.
    caption: what to know to read the figure.
    remarks: lines that say what the results lack.
    sections: list of (title, heads, rows of strings).
    draw: wide -> matplotlib Figure, or None where there is nothing.
    made_with: {what: version}.
    summary: all of it as plain values, for frontier.json.
  """

  title: str
  caption: str
  remarks: list
  sections: list
  draw: Callable
  made_with: dict
  summary: dict


def write(page, workdir):
  """Writes frontier.json, frontier.png, report.md and report.html.

  Returns: path of report.html.
  """
  workdir = epath.Path(workdir)
  summary = json.dumps(statistics.plain(page.summary), indent=1) + "\n"
  store.write(workdir / "frontier.json", summary.encode())
  drawings = [page.draw(wide) for wide in (True, False)]
  if drawings[0] is not None:
    store.write(workdir / "frontier.png", figures.png(drawings[0]))
  store.write(workdir / "report.md", _markdown(page, drawings).encode())
  store.write(workdir / "report.html", _html(page, drawings).encode())
  return workdir / "report.html"


def text(page):
  """The tables and remarks, for a console."""
  parts = []
  for title, heads, body in page.sections:
    parts += [title, _aligned(heads, body), ""]
  return "\n".join([*parts, *page.remarks]).rstrip()


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


def _markdown(page, drawings):
  parts = [f"# {markdown.plain(page.title)}"]
  parts += [markdown.plain(line) for line in page.remarks]
  if drawings[0] is not None:
    parts += ["![Reward over KL](frontier.png)", markdown.plain(page.caption)]
  for title, heads, body in page.sections:
    rows = [
      (name, *((markdown.plain(cell),) for cell in cells))
      for name, *cells in body
    ]
    parts += [f"## {markdown.plain(title)}", markdown.table(heads, rows)]
  return "\n\n".join(parts) + "\n"


def _html(page, drawings):
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
    for kind, drawing in zip(("wide", "narrow"), drawings, strict=True)
    if drawing is not None
  ]
  return environment.get_template("tables.html").render(
    title=page.title,
    caption=page.caption,
    remarks=page.remarks,
    sections=page.sections,
    svgs=svgs,
    made_with=page.made_with,
  )
