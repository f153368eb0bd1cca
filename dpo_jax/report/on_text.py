"""The report of methods compared on text: the figure and its tables."""

import functools
import itertools

import numpy as np

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
  "own samples over their sequence KL(π‖π_ref), with an error over prompts of "
  "{reward:.3f} in reward and {kl:.2f} nats (medians). Crosses are where "
  "settings end{errors}. Lines are what a method reaches at a KL: the concave "
  "hull of its checkpoints, as drawing one of two policies for each prompt "
  "has it, chosen on half of the prompts and measured on the other{bands}. "
  "Squares: Best of N, at the bound of its KL, log N − (N − 1)/N. All policies "
  "continue the same beginnings, so that errors in the tables are over seeds "
  "alone."
)
AHEAD = (
  *("against", "checkpoints", "KL, nats", "r*", "their r*", "difference"),
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


def page(workdir):
  """The tables.Page of a folder of compared sweeps."""
  found = compared.read(workdir)
  spots = [s for cs in found.curves.values() for c in cs for s in c.spots]
  medians = {
    key: np.nanmedian(np.array([getattr(s, key)[1] for s in spots], float))
    for key in ("reward", "kl")
  }
  several = len(found.seeds) > 1
  return tables.Page(
    title=TITLE,
    caption=CAPTION.format(
      **medians,
      errors=f", ± 1 standard error over {len(found.seeds)} seeds on both axes"
      if several
      else "",
      bands="; mean over seeds, with a band of one standard error"
      if several
      else "",
    ),
    remarks=found.missing,
    sections=list(_sections(found)),
    draw=functools.partial(draw, found),
    made_with=compared.made_with(found),
    summary=standings.summary(found),
  )


def _sections(found):
  """Yields (title, heads, rows of strings)."""
  ours = methods.shown(found.options["method"])
  rows = [_ahead(found, row) for row in standings.comparisons(found)]
  yield f"Is {ours} ahead? (mean r* at equal KL)", AHEAD, rows
  if trend := standings.trend(found):
    yield f"How the KL follows {trend['field']}", *_trend(trend)
  yield "Where each setting ends", *_ends(found)


def _ahead(found, row):
  """A comparison as the strings of AHEAD."""
  name = methods.shown(row["against"])
  if "each" not in row:
    return [name, "–", "none in common", *["–"] * (len(AHEAD) - 3)]
  counts = [
    sum(len(curve.spots) for curve in found.curves.get(method, ()))
    for method in (found.options["method"], row["against"])
  ]
  shares = [
    f"{row[key]:.0%}" if key in row else "–"
    for key in ("dominated", "dominates")
  ]
  count = len(row["each"])
  return [
    name,
    " and ".join(str(count or "–") for count in counts),
    f"{row['since']:.2f} to {row['until']:.2f}",
    _with_error(row["ours"], 3),
    _with_error(row["theirs"], 3),
    _with_error(row["difference"], 3, sign="+"),
    ", ".join(f"{d:+.3f}" for d in row["each"]),
    f"{sum(d > 0 for d in row['each'])} of {count} seed{'s' * (count > 1)}",
    *shares,
  ]


def _with_error(value, decimals, sign=""):
  mean = f"{value['mean']:{sign}.{decimals}f}"
  if value["se"] is None:
    return mean
  return f"{mean} ± {value['se']:.{decimals}f}"


def _trend(trend):
  heads = [trend["field"], "learning rate", "final KL of each seed, nats"]
  columns = np.transpose(trend["kl"])
  body = [
    [
      f"{value:g}",
      ", ".join(f"{rate:g}" for rate in rates),
      ", ".join(f"{kl:.2f}" for kl in column),
    ]
    for value, rates, column in zip(
      trend["values"], trend["rates"], columns, strict=True
    )
  ]
  told = f"rises at every step in {trend['strict']} of {len(trend['kl'])} seeds"
  if trend["p"] is not None:
    told += f"; Page's p {trend['p']:.1g}"
  return heads, [*body, ["KL", "", told]]


def _ends(found):
  body = []
  for name, rows in itertools.groupby(
    standings.ends(found), lambda row: row["method"]
  ):
    body += _ends_of(name, list(rows), {"reward": found.reward})
  heads = ["method", "setting", "seeds", *(head for _, head, _ in ENDS)]
  return heads, body


def _ends_of(name, rows, keys):
  """Lines of a method: losses of others are other functions, of other sizes."""
  columns = []
  for key, _, decimals in ENDS:
    values = [row.get(keys.get(key, key)) for row in rows]
    texts = cells.column(values, [None] * len(values), decimals)
    columns.append([content.cell(each) for each in texts])
  return [
    [methods.shown(name), row["setting"] or "–", str(len(row["seeds"])), *texts]
    for row, texts in zip(rows, zip(*columns, strict=True), strict=True)
  ]


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
    if len(places) > 1:
      kl_se, reward_se = places.std(axis=0, ddof=1) / len(places) ** 0.5
      ends = {"xerr": [kl_se], "yerr": [reward_se], "elinewidth": 1.3}
      middle = places.mean(axis=0)[:, None]
      ax.errorbar(*middle, **ends, fmt="none", color=color, capsize=2)
  seeds = [s for s in found.seeds if any(c.seed == s for c in curves)]
  points = [compared.spots(found, name, seed) for seed in seeds]
  furthest = min(compared.reach(own)[1] for own in points)
  kls = np.linspace(0, furthest, standings.KLS)
  each = np.array([compared.envelope(own, kls) for own in points])
  methods.band(ax, kls, each, color, methods.shown(name))


def _best_of(ax, found, color):
  points = {}
  for seed in found.best_of:
    for _, kl, reward in compared.best_of_points(found, seed):
      points.setdefault(kl, []).append(reward)
  if points:
    mark = {"color": color, "mfc": figures.PAPER, "ms": 5.5}
    place = list(points), [np.mean(rewards) for rewards in points.values()]
    ax.plot(*place, "s", **mark, label=methods.shown(compared.BEST_OF))
