"""A sweep's folder as one page: reward over KL, a table, curves, samples, and
where all that comes from.

`write` makes report.html (nothing in it is loaded from elsewhere), report.md,
frontier.png and curves.png; `rows` and `table` give the table alone.
"""

import sys
import types

from etils import epath

from dpo_jax import lookup, store
from dpo_jax.report import (
  cells,
  claims,
  compared,
  content,
  figures,
  folder,
  markdown,
  measures,
  on_text,
  page,
  study,
  tables,
)

TRUTH = "r*"
# (key of a row, head on a console, head on a page, decimals without an SE);
# without a head it is not there.
COLUMNS = (
  (measures.AT_LENGTH, None, f"{TRUTH} at equal length", 2),
  ("kl", "KL", "KL, nats", 2),
  ("log_ratio", "log-ratio", "log-ratio, nats", 2),
  ("loss", "loss", "held-out loss", 3),
  ("rewards/accuracies", "acc", "accuracy", 3),
  ("logps/chosen", "chosen", "log p chosen", 1),
  ("logps/rejected", "rejected", "log p rejected", 1),
  ("drift/chosen", None, "Δ log p, chosen", 1),
  ("drift/rejected", None, "Δ log p, rejected", 1),
  ("ended", "ended", "share ended", 2),
  ("length", "length", "length, tokens", 1),
  ("distinct_1", "dist-1", "distinct-1", 3),
  ("distinct_2", "dist-2", "distinct-2", 3),
)


def write(workdir):
  """Writes report.html, report.md, frontier.png and curves.png.

  What a sweep has not got yet is said on the page; a figure without data is
  not written, and an older one is removed.

  Args:
    workdir: folder of `dpo-jax sweep`; of a study, see report.study; of
      compared sweeps, see report.on_text.
  Returns: path of report.html.
  Raises: ValueError if the folder holds no sweep, or nothing of its runs.
  """
  if own := _own(workdir):
    return tables.write(own.page(workdir), workdir)
  sweep, workdir = folder.read(workdir), epath.Path(workdir)
  pictures = content.draw(sweep)
  for name, picture in pictures.items():
    path = workdir / f"{name}.png"
    if picture:
      store.write(path, picture.png)
    elif path.exists():
      path.unlink()
  table_rows = _rows(sweep)
  text = markdown.markdown(sweep, grid(table_rows, "page"), pictures)
  store.write(workdir / "report.md", text.encode())
  text = page.html(sweep, grid(table_rows, "page"), pictures)
  store.write(workdir / "report.html", text.encode())
  return workdir / "report.html"


def _own(workdir):
  """The module that reports a folder of many sweeps; None of one sweep."""
  if claims.holds(workdir):
    return study
  return on_text if compared.holds(workdir) else None


def text(workdir):
  """What a report says, for a console: its table, or the verdicts of a study.

  Args, Raises: as `write`.
  """
  if own := _own(workdir):
    return tables.text(own.page(workdir))
  return table(rows(workdir), "text")


def rows(workdir):
  """The report's table as data.

  Args:
    workdir: folder of `dpo-jax sweep`.
  Returns: a dict a run, the reference first, the others in the order of the
    swept value; all have the same keys. "run" is the name; "reward/NAME" (the
    ground truth first), "reward_at_length" (measures.at_length), "kl",
    "log_ratio" in nats and "length" in tokens are {"mean", "se"}, of errors
    over prompts. Numbers are "loss", "rewards/accuracies", "logps/chosen",
    "logps/rejected" (held-out pairs, nats), "drift/chosen", "drift/rejected"
    (those less the reference's), "ended" (the share of samples that did before
    the limit), "distinct_1" and "distinct_2".
    "rewards/accuracies/interval" is (low, high), of 95 %. Above runs that
    differ in init_seed or data.seed alone stands a row of their means, in which
    all is {"mean", "se"}, of errors over "seeds" runs; of one run that is 1.
    None is what is not there or not finite.
  Raises: ValueError if the folder holds no sweep, or nothing of its runs.
  """
  return _rows(folder.read(workdir))


def table(rows, style):
  """Rows as text.

  Args:
    rows: what `rows` returned.
    style: "text" (aligned, for a console) or "markdown".
  Returns: str without a line break at its end.
  Raises: ValueError for another style.
  """
  lookup.lookup(("text", "markdown"), style, "style")
  heads, body = grid(rows, "text" if style == "text" else "page")
  if style == "markdown":
    return markdown.table(heads, body)
  names, *columns = zip(*body, strict=True)
  columns = [_left(heads[0], names), *map(_right, heads[1:], columns)]
  return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def grid(rows, style):
  """The table as strings, with as many decimals as a column's errors justify.

  Args:
    rows: what `rows` returned.
    style: "text" for short heads, else long ones, more columns, and none that
      is empty.
  Returns: (heads, body): lists of strings, and a list a run of its name and
    its cells: (mean, se), (value, low, high), or (value,) where there is no
    error.
  """
  columns = _columns(rows, style)
  texts = []
  for key, _, decimals in columns:
    ranges = [style == "page" and row.get(f"{key}/interval") for row in rows]
    texts.append(cells.column([row[key] for row in rows], ranges, decimals))
  heads = ["run", *(head for _, head, _ in columns)]
  names = [row["run"] for row in rows]
  return heads, list(zip(names, *texts, strict=True))


def _columns(rows, style):
  """(key, head, decimals) of each column that a style shows."""
  names = [
    key.removeprefix("reward/") for key in rows[0] if key.startswith("reward/")
  ]
  columns = [(f"reward/{name}", name, name, 2) for name in names]
  if columns:
    key, name, *_ = columns[0]
    columns[0] = key, f"{TRUTH} {name}", f"{TRUTH} ({name})", 2
  # At equal length the first reward stands beside itself.
  columns = [*columns[:1], COLUMNS[0], *columns[1:], *COLUMNS[1:]]
  if style == "text":
    return [(key, short, at) for key, short, _, at in columns if short]
  there = {key for key in rows[0] if any(r[key] is not None for r in rows)}
  # Log-probs as they are say less than how far they moved.
  there -= {plain for key, plain in measures.DRIFT.items() if key in there}
  return [(key, head, at) for key, _, head, at in columns if key in there]


def _left(head, texts):
  width = max(map(len, (head, *texts)))
  return [text.ljust(width) for text in (head, *texts)]


def _right(head, cells):
  """A console column: ± below ±, so that the means end below one another."""
  widths = [max(len(cell[0]) for cell in cells)]
  widths.append(
    max(len(cell[-1]) + 1 if len(cell) > 1 else 0 for cell in cells)
  )
  texts = [
    cell[0].rjust(widths[0]) + "±".join(("", *cell[1:])).ljust(widths[1])
    for cell in cells
  ]
  width = max(map(len, (head, *texts)))
  return [text.rjust(width) for text in (head, *texts)]


def _rows(sweep):
  return [
    {
      "run": entry.name,
      "seeds": len(entry.runs),
      **measures.of(sweep, entry.runs),
    }
    for entry in sweep.entries
  ]


class Picture(bytes):
  """A PNG, which a notebook shows."""

  def _repr_png_(self):
    return bytes(self)

  def __repr__(self):
    return f"<PNG of {len(self):,} bytes>"


class Table(list):
  """What `rows` returned, which a notebook shows as the table.

  Attributes:
    page: path of report.html.
    figures: {"frontier": Picture, "curves": Picture}, as far as they are there.
  """

  def __init__(self, rows, page):
    super().__init__(rows)
    self.page = page
    paths = [page.parent / f"{name}.png" for name in ("frontier", "curves")]
    self.figures = {
      path.stem: Picture(path.read_bytes()) for path in paths if path.exists()
    }

  def __repr__(self):
    return table(self, "text")

  def _repr_markdown_(self):
    return table(self, "markdown")


def training(name, history):
  """{"curves": Picture} of one run; {} if it has logged nothing.

  Args:
    name: of the run.
    history: rows of its metrics.jsonl, see run.recorder.history.
  """
  line = figures.Line(name, figures.INK, folder.curves(history))
  drawn = figures.curves([line], wide=True)
  return {"curves": Picture(figures.png(drawn))} if drawn else {}


def made(workdir):
  """Writes the report of a sweep's folder and returns its Table.

  Of a folder of many sweeps, the path of its page.

  Args, Raises: as `write`.
  """
  page = write(workdir)
  return page if _own(workdir) else Table(rows(workdir), page)


class _Callable(types.ModuleType):
  """This package: `dj.report(folder)` and `dj.report.rows` are one name."""

  def __call__(self, workdir):
    return made(workdir)


sys.modules[__name__].__class__ = _Callable
