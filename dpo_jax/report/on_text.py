"""The report of methods compared on text: the figure and its tables.

`write` makes frontier.png, frontier.json, report.md and report.html.
"""

import functools

import numpy as np
from etils import epath

from dpo_jax.report import (
  cells,
  compared,
  content,
  figures,
  methods,
  standings,
  tables,
)

TITLE = "Methods compared on samples"
CAPTION = (
  "Every dot is a checkpoint of a seed and setting: the mean reward r* of its "
  "own samples over their sequence KL(π‖π_ref). Crosses are where settings "
  "end, ± 1 standard error over {seeds} seeds on both axes; the error of a dot "
  "is {reward:.3f} in reward and {kl:.2f} nats (medians, over prompts). Lines "
  "are the best until a KL, chosen on half of the prompts and measured on the "
  "other; mean over seeds with a band of one standard error. Squares: Best of "
  "N, at the bound of its KL, log N − (N − 1)/N."
)
AHEAD = (
  *("against", "KL from 0 to", "r*", "their r*", "difference"),
  *("each seed", "ahead", "dominated", "by them"),
)
ENDS = (
  ("reward", "r*", 3),
  ("reward_at_length", "at the reference's length", 3),
  ("kl", "KL, nats", 2),
  ("ended", "ended", 2),
  ("length", "length", 1),
  ("loss", "held-out loss", 3),
  ("rewards/accuracies", "accuracy", 3),
  ("distinct_2", "distinct-2", 3),
  ("updates", "updates", 0),
  ("seconds", "seconds", 0),
)


def write(workdir):
  """Writes the report of a folder; returns the path of report.html."""
  found = compared.read(workdir)
  standings.write(found, epath.Path(workdir) / "frontier.json")
  return tables.write(_page(found), workdir)


def text(workdir):
  """The tables, for a console."""
  return tables.text(_page(compared.read(workdir)))


def _page(found):
  spots = [s for cs in found.curves.values() for c in cs for s in c.spots]
  errors = {k: np.median([getattr(s, k)[1] for s in spots]) for k in _AXES}
  return tables.Page(
    title=TITLE,
    caption=CAPTION.format(seeds=len(found.seeds), **errors),
    remarks=found.missing,
    sections=list(_sections(found)),
    draw=functools.partial(draw, found),
    made_with=compared.made_with(found),
  )


_AXES = ("reward", "kl")


def _sections(found):
  """Yields (title, heads, rows of strings)."""
  ours = methods.shown(found.options["method"])
  rows = [_ahead(row) for row in standings.comparisons(found)]
  yield f"Is {ours} ahead? (mean r* of the best until a KL)", AHEAD, rows
  if trend := standings.trend(found):
    yield f"Does {trend['field']} control the KL?", *_trend(trend)
  yield "Where each setting ends", *_ends(found)


def _ahead(row):
  """A comparison as the strings of AHEAD."""
  name = methods.shown(row["against"])
  if "each" not in row:
    return [name, *["–"] * (len(AHEAD) - 1)]
  shares = [
    f"{row[key]:.0%}" if key in row else "–"
    for key in ("dominated", "dominates")
  ]
  return [
    name,
    f"{row['until']:.2f}",
    _with_error(row["ours"], 3),
    _with_error(row["theirs"], 3),
    _with_error(row["difference"], 3, sign="+"),
    ", ".join(f"{d:+.3f}" for d in row["each"]),
    f"{sum(d > 0 for d in row['each'])} of {len(row['each'])} seeds",
    *shares,
  ]


def _with_error(value, decimals, sign=""):
  mean = f"{value['mean']:{sign}.{decimals}f}"
  if value["se"] is None:
    return mean
  return f"{mean} ± {value['se']:.{decimals}f}"


def _trend(trend):
  columns = np.transpose(trend["kl"])
  heads = [trend["field"], "final KL of each seed, nats"]
  body = [
    [f"{value:g}", ", ".join(f"{kl:.2f}" for kl in column)]
    for value, column in zip(trend["values"], columns, strict=True)
  ]
  told = f"rises at every step in {trend['strict']} of {len(trend['kl'])} seeds"
  if trend["p"] is not None:
    told += f"; Page's p {trend['p']:.1g}"
  return heads, [*body, ["KL", told]]


def _ends(found):
  rows, columns = standings.ends(found), []
  keys = {"reward": found.reward}
  for key, _, decimals in ENDS:
    values = [row.get(keys.get(key, key)) for row in rows]
    texts = cells.column(values, [None] * len(values), decimals)
    columns.append([content.cell(each) for each in texts])
  names = [
    [
      methods.shown(row["method"]),
      row["setting"] or "–",
      str(len(row["seeds"])),
    ]
    for row in rows
  ]
  heads = ["method", "setting", "seeds", *(head for _, head, _ in ENDS)]
  body = [
    [*name, *texts]
    for name, texts in zip(names, zip(*columns, strict=True), strict=True)
  ]
  return heads, body


def draw(found, wide):
  """The figure of a Compared."""
  size = 11 if wide else 9.5
  fig, (ax,) = figures.frame((7.5, 5.0) if wide else (3.85, 4.4), 1, 1, size)
  ax.set_title(
    f"mean r* ({found.reward.removeprefix('reward/')}) of the samples",
    loc="left",
    color=figures.INK,
    fontsize=size,
  )
  ax.set_xlabel("sequence KL from the reference, nats", fontsize=size)
  colors = dict(zip(found.methods, methods.COLORS, strict=False))
  for name in reversed(found.methods):  # ours above the others
    if name == compared.BEST_OF:
      _best_of(ax, found, colors[name])
    elif found.curves.get(name):
      _method(ax, found, name, colors[name])
  starts = [compared.start(found, seed).reward[0] for seed in found.seeds]
  ax.plot(
    [0], [np.mean(starts)], "D", color=figures.INK, ms=6, label="reference"
  )
  methods.legend(fig, ax, columns=4 if wide else 2, size=size)
  return fig


def _method(ax, found, name, color):
  curves = found.curves[name]
  dots = np.transpose([(s.kl[0], s.reward[0]) for c in curves for s in c.spots])
  dot = {"color": color, "ms": 2.6, "alpha": 0.45, "mew": 0}
  ax.plot(*dots, "o", **dot)
  for setting in dict.fromkeys(c.setting for c in curves):
    last = [c.spots[-1] for c in curves if c.setting == setting]
    places = np.array([(s.kl[0], s.reward[0]) for s in last])
    error = np.zeros(2)
    if len(places) > 1:
      error = places.std(axis=0, ddof=1) / len(places) ** 0.5
    (kl, reward), (kl_se, reward_se) = places.mean(axis=0), error
    ends = {"xerr": [kl_se], "yerr": [reward_se], "elinewidth": 1.3}
    ax.errorbar([kl], [reward], **ends, fmt="none", color=color, capsize=2)
  seeds = [s for s in found.seeds if any(c.seed == s for c in curves)]
  points = [compared.spots(found, name, seed) for seed in seeds]
  kls = np.linspace(0, min(map(compared.furthest, points)), standings.KLS)
  each = np.array([compared.envelope(own, kls) for own in points])
  methods.band(ax, kls, each, color, methods.shown(name))


def _best_of(ax, found, color):
  points = [compared.best_of_points(found, seed) for seed in found.best_of]
  if points:
    _, kl, reward = np.mean(points, axis=0).T
    mark = {"color": color, "mfc": figures.PAPER, "ms": 5.5}
    ax.plot(kl, reward, "s", **mark, label=methods.shown(compared.BEST_OF))
