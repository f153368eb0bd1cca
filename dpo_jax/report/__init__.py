"""A sweep's folder as one page: reward over KL, a table, curves, samples.

`write` makes report.html (nothing in it is loaded from elsewhere), report.md,
frontier.png and curves.png; `rows` and `table` give the table alone.
"""

import math
import sys
import types

from etils import epath

from dpo_jax import lookup
from dpo_jax.report import content, figures, folder, markdown, page

TRUTH, MISSING = "r*", "–"
# (key of a row, head on a console, head on a page, decimals without an SE)
COLUMNS = (
  ("kl", "KL", "KL, nats", 2),
  ("log_ratio", "log-ratio", "log-ratio, nats", 2),
  ("rewards/accuracies", "acc", "accuracy", 3),
  ("logps/chosen", "chosen", "log p chosen", 1),
  ("logps/rejected", "rejected", "log p rejected", 1),
  ("length", "length", "length, tokens", 1),
  ("distinct_1", "dist-1", "distinct-1", 3),
  ("distinct_2", "dist-2", "distinct-2", 3),
)
MEANS = ("kl", "log_ratio", "length")


def write(workdir):
  """Writes report.html, report.md, frontier.png and curves.png.

  What a sweep has not got yet is said on the page; a figure without data is
  not written, and an older one is removed.

  Args:
    workdir: folder of `dpo-jax sweep`.
  Returns: path of report.html.
  Raises: ValueError if the folder holds no sweep, or nothing of its runs.
  """
  sweep, workdir = folder.read(workdir), epath.Path(workdir)
  pictures = content.draw(sweep)
  for name, picture in pictures.items():
    path = workdir / f"{name}.png"
    if picture:
      path.write_bytes(picture.png)
    elif path.exists():
      path.unlink()
  found = _rows(sweep)
  text = markdown.markdown(sweep, table(found, "markdown"), pictures)
  (workdir / "report.md").write_bytes(text.encode())
  text = page.html(sweep, grid(found, "page"), pictures)
  (workdir / "report.html").write_bytes(text.encode())
  return workdir / "report.html"


def rows(workdir):
  """The report's table as data.

  Args:
    workdir: folder of `dpo-jax sweep`.
  Returns: a dict a run, the reference first, the others in the order of the
    swept value; all have the same keys. "run" is the name; "reward/NAME" (the
    ground truth first), "kl", "log_ratio" in nats and "length" in tokens are
    {"mean", "se"}; "rewards/accuracies", "logps/chosen", "logps/rejected"
    (held-out pairs, nats), "distinct_1" and "distinct_2" are numbers. None is
    what is not there or not finite.
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
  heads, body = grid(rows, style)
  if style == "markdown":
    lines = [
      [markdown.plain(head) for head in heads],
      ["---", *["---:"] * (len(heads) - 1)],
      *([markdown.plain(n), *map(" ± ".join, cells)] for n, *cells in body),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
  names, *columns = zip(*body, strict=True)
  columns = [_left(heads[0], names), *map(_right, heads[1:], columns)]
  return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def grid(rows, style):
  """The table as strings, with as many decimals as a column's errors justify.

  Args:
    rows: what `rows` returned.
    style: "text" for short heads, else long ones.
  Returns: (heads, body): lists of strings, and a list a run of its name and
    its cells: (mean, se), or (value,) where there is no error.
  """
  names = [
    key.removeprefix("reward/") for key in rows[0] if key.startswith("reward/")
  ]
  columns = [(f"reward/{name}", name, name, 2) for name in names]
  if columns:
    key, name, *_ = columns[0]
    columns[0] = key, f"{TRUTH} {name}", f"{TRUTH} ({name})", 2
  columns += COLUMNS
  heads = [short if style == "text" else head for _, short, head, _ in columns]
  cells = [_cells([row[key] for row in rows], at) for key, _, _, at in columns]
  names = [row["run"] for row in rows]
  return ["run", *heads], list(zip(names, *cells, strict=True))


def _cells(values, decimals):
  """Cells of a column; the smallest error gets a digit, three at the most."""
  pairs = [
    (v["mean"], v["se"]) if isinstance(v, dict) else (v, None) for v in values
  ]
  errors = [se for _, se in pairs if se]
  if errors:
    # An error of rounding alone, such as the reference's, asks for no digits.
    least = min(se for se in errors if se >= max(errors) / 100)
    decimals = min(3, max(0, math.ceil(-math.log10(least))))

  def text(value):
    # + 0.0 so that nothing is -0.0.
    return f"{round(value, decimals) + 0.0:.{decimals}f}"

  return [
    tuple(text(part) for part in pair if part is not None) or (MISSING,)
    for pair in pairs
  ]


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
  rows = []
  for run in sweep.everyone:
    row = {"run": run.name}
    for key in (*sweep.rewards, *MEANS):
      mean, se = run.mean(key)
      row[key] = None if mean is None else {"mean": mean, "se": se}
    others = run.evaluation | run.evaluation.get("comparisons", {})
    for key, *_ in COLUMNS:
      row.setdefault(key, folder.number(others.get(key)))
    rows.append(row)
  return rows


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
  curves = {}
  for row in history:
    prefix = "" if row["kind"] == "train" else "held_out/"
    for key in row.keys() - {"step", "kind"}:
      steps, values = curves.setdefault(prefix + key, ([], []))
      steps.append(row["step"])
      values.append(math.nan if row[key] is None else row[key])
  line = figures.Line(name, figures.INK, curves)
  drawn = figures.curves([line], wide=True)
  return {"curves": Picture(figures.png(drawn))} if drawn else {}


def made(workdir):
  """Writes the report of a sweep's folder and returns its Table.

  Args, Raises: as `write`.
  """
  page = write(workdir)
  return Table(rows(workdir), page)


class _Callable(types.ModuleType):
  """This package: `dj.report(folder)` and `dj.report.rows` are one name."""

  def __call__(self, workdir):
    return made(workdir)


sys.modules[__name__].__class__ = _Callable
