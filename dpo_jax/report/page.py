"""A report as one HTML page that loads nothing."""

import jinja2

from dpo_jax.report import (
  best_of,
  content,
  figures,
  folder,
  provenance,
  samples,
)


def html(sweep, grid, pictures):
  """The report as one HTML page that loads nothing.

  Args: as markdown.markdown, but for the report.grid of its rows.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("dpo_jax.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda x: folder.clean(x) if type(x) is str else x,
  )
  heads, body = grid
  rows = [(e, c) for e, (_, *c) in zip(sweep.entries, body, strict=True)]
  return environment.get_template("page.html").render(
    sweep=sweep,
    palette=figures.palette(len(sweep.groups)),
    content=content,
    samples=samples,
    best_of=best_of.grid(sweep),
    provenance=provenance.facts(sweep),
    pictures=pictures,
    heads=heads,
    rows=rows,
  )
