"""The figures of a sweep's report: reward over KL, and training curves.

Drawn with matplotlib's Figure objects, without pyplot's global state. Each
comes wide (desktop, PNG) or narrow (phone): scaling one would leave its text
too small to read on the other.
"""

import io
import itertools
import re
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, figure, lines
from matplotlib.backends import backend_agg

from dpo_jax.report import labels

INK, MUTED = labels.INK, labels.MUTED
GRID, PAPER = "#dde1e6", "#fefefe"
# Share of a run's logged steps that one smoothed value averages.
SMOOTHING = 0.05
# More points than a figure has pixels only make its file bigger.
MOST_POINTS = 600
PANELS = (
  ("training loss", ("loss",)),
  ("score of what the policy samples", ("objective/scores",)),
  ("sequence KL of what it samples, nats", ("objective/kl",)),
  ("held-out loss", ("held_out/loss",)),
  ("reward accuracy on training pairs", ("rewards/accuracies",)),
  ("reward accuracy on held-out pairs", ("held_out/rewards/accuracies",)),
  ("reward margin on training pairs", ("rewards/margins",)),
  (
    "log π/π_ref, nats: chosen solid, rejected dashed",
    ("drift/chosen", "drift/rejected"),
  ),
)
# Of losses that read no reference.
RAW = (
  "log-prob, nats: chosen solid, rejected dashed",
  ("logps/chosen", "logps/rejected"),
)


class Mark(NamedTuple):
  """A policy between reward and KL; standard errors are NaN if unknown.

  seeds: (kl, reward) of each run that it is the mean of; trail: of checkpoints
  on the way there.
  """

  name: str
  kl: float
  reward: float
  kl_se: float
  reward_se: float
  color: str
  seeds: tuple = ()
  trail: tuple = ()


class Line(NamedTuple):
  """A run's training curves; metrics: {name: (steps, values)}, NaN = gap."""

  name: str
  color: str
  metrics: dict


def palette(count):
  """`count` ordered colours as (on white, on black) hex strings.

  Parts of matplotlib's plasma, whose order survives colour blindness and grey
  print; each part keeps clear of its background.
  """
  plasma = matplotlib.colormaps["plasma"]
  # Plasma's dark end changes slowest: larger steps there.
  place = np.linspace(0, 1, count) ** 0.85
  light, dark = 0.72 * place, 0.36 + 0.6 * place
  return [
    (colors.to_hex(plasma(x)), colors.to_hex(plasma(y)))
    for x, y in zip(light, dark, strict=True)
  ]


def smooth(values):
  """Centred rolling mean over SMOOTHING of the values; NaNs stay gaps."""
  values = np.asarray(values, float)
  half = max(1, round(SMOOTHING * len(values))) // 2
  there, window = np.isfinite(values), np.ones(2 * half + 1)
  sums = np.convolve(np.where(there, values, 0.0), window, "same")
  counts = np.convolve(there, window, "same")
  return np.where(there, sums / np.maximum(counts, 1), np.nan)


def frontier(marks, reference, title, *, joined, wide, best_of=()):
  """Mean reward over sequence KL, error bars ± 1 SE, each policy named.

  Args:
    marks: list of Mark.
    reference: Mark of the policy that all start from, or None.
    title: what the vertical axis shows.
    joined: whether to join the marks in their order.
    wide: 540 x 310 pt, else 277 x 270 pt.
    best_of: list of Mark, hollow squares joined from the reference on.
  Returns: matplotlib Figure, or None if there is no mark.
  """
  if not marks and not reference:
    return None
  size = 11 if wide else 9.5
  fig, (ax,) = frame((7.5, 4.3) if wide else (3.85, 3.75), 1, 1, size)
  ax.set_title(title, loc="left", color=INK, fontsize=size)
  below = "\n(squares: an upper bound)" if best_of else ""
  ax.set_xlabel(f"sequence KL from the reference, nats{below}", fontsize=size)
  paths = [marks] if joined else []
  if best_of:
    paths.append([*([reference] if reference else []), *best_of])
  for path in paths:
    style = "-" if path is marks else (0, (4, 2))
    place = [m.kl for m in path], [m.reward for m in path]
    ax.plot(*place, color=MUTED, lw=1, ls=style, zorder=1)
  if reference:
    ax.axhline(reference.reward, color=MUTED, lw=0.8, ls=(0, (1, 3)), zorder=1)
  marks = [*marks, *best_of, *([reference] if reference else [])]
  for mark in marks:
    hollow = any(mark is other for other in best_of)
    for spots, size in ((mark.seeds, 4), (mark.trail, 2.6)):
      for spot in spots:
        dot = {"color": mark.color, "ms": size, "alpha": 0.8, "mew": 0}
        ax.plot(*spot, "o", **dot, zorder=2)
    shape, width = ("D", 6) if mark is reference else ("o", 6.5)
    if hollow:
      shape, width = "s", 5.5
    ax.errorbar(
      [mark.kl],
      [mark.reward],
      xerr=None if np.isnan(mark.kl_se) else [mark.kl_se],
      yerr=None if np.isnan(mark.reward_se) else [mark.reward_se],
      fmt=shape,
      color=mark.color,
      ms=width,
      mfc=PAPER if hollow else mark.color,
      mec=mark.color if hollow else PAPER,
      mew=1.1 if hollow else 0.6,
      elinewidth=1.3,
      capsize=2.5,
      zorder=3,
    )
  ax.margins(0.09, 0.16)
  _widen(ax)
  fig.draw_without_rendering()
  labels.write(fig, ax, marks, paths, reference, size)
  return fig


def curves(runs, *, wide, legend=False):
  """Training metrics over steps: the logged values thin, smoothed ones thick.

  Args:
    runs: list of Line.
    wide: two panels side by side, 720 pt; else below one another, 277 pt.
    legend: whether to draw the runs' names.
  Returns: matplotlib Figure, or None if no run has any of PANELS.
  """
  there = {name for line in runs for name in line.metrics}
  panels = (*PANELS[:-1], RAW) if not there & set(PANELS[-1][1]) else PANELS
  panels = [(t, names) for t, names in panels if there & set(names)]
  if not panels:
    return None
  size = 10.5 if wide else 9.5
  columns = min(2, len(panels)) if wide else 1
  rows = -(-len(panels) // columns)
  inches = (5 * columns, 2.95 * rows) if wide else (3.85, 2.5 * rows)
  fig, axes = frame(inches, rows, columns, size)
  for ax in axes[len(panels) :]:
    ax.remove()
  for ax, (title, names) in zip(axes, panels, strict=False):
    ax.set_title(title, loc="left", color=INK, fontsize=size)
    for line, (name, style) in itertools.product(
      runs, zip(names, ("-", (0, (4, 2))), strict=False)
    ):
      if name in line.metrics:
        _curve(ax, *line.metrics[name], line.color, style)
  # Few evaluations must not look like a whole run: the axes are the same.
  steps = [s for line in runs for s, _ in line.metrics.values() if len(s)]
  edges = min(s[0] for s in steps), max(s[-1] for s in steps)
  for ax, (_, names) in zip(axes, panels, strict=False):
    ax.update_datalim([(edge, 0) for edge in edges], updatey=False)
    ax.autoscale_view(scaley=False)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    if "rewards/accuracies" in names[0]:  # no share is above 1
      ax.set_ylim(top=min(ax.get_ylim()[1], 1.01))
    else:
      _widen(ax)
  for ax in axes[max(0, len(panels) - columns) : len(panels)]:
    ax.set_xlabel("training step", fontsize=size)
  if legend:
    colors_of = {line.name: line.color for line in runs}
    fig.legend(
      [lines.Line2D([], [], color=c, lw=2) for c in colors_of.values()],
      [labels.plain(name) for name in colors_of],
      loc="outside upper left",
      ncols=min(6, len(colors_of)),
      frameon=False,
      fontsize=size,
      labelcolor=INK,
    )
  return fig


def png(fig):
  """A figure as bytes of a PNG on white, 160 dpi."""
  file = io.BytesIO()
  fig.savefig(file, format="png", dpi=160, facecolor="white")
  return file.getvalue()


def svg(fig, prefix, label, variables):
  """A figure as an <svg> element to stand in a page, on no background.

  Args:
    fig: matplotlib Figure.
    prefix: its CSS class; makes its ids unique in the page.
    label: what it shows, for a screen reader.
    variables: {colour: CSS variable that replaces it}, hex to "--ink".
  """
  file = io.StringIO()
  about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  options = {"svg.fonttype": "none", "svg.hashsalt": prefix}
  with matplotlib.rc_context(options):
    fig.savefig(file, format="svg", facecolor="none", metadata=about)
  whole = file.getvalue()
  head, _, body = whole[whole.index("<svg") :].strip().partition(">")
  view = re.search(r'viewBox="[^"]*"', head).group()
  body = re.sub(r'\bid="', f'id="{prefix}-', body)
  body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
  # Hundredths of a point are enough, and half the size.
  body = re.sub(
    r'\bd="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d.group()), body
  )
  for color, name in variables.items():
    body = body.replace(color, f"var({name})")
  return f'<svg class="{prefix}" role="img" aria-label="{label}" {view}>{body}'


def frame(inches, rows, columns, size):
  """(Figure, its axes as a flat list), in the report's quiet style."""
  fig = figure.Figure(figsize=inches, layout="constrained")
  backend_agg.FigureCanvasAgg(fig)
  fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
  axes = list(fig.subplots(rows, columns, squeeze=False).flat)
  for ax in axes:
    ax.patch.set_visible(False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=size, labelcolor=MUTED, color=MUTED, length=3)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.label.set_color(MUTED)
    ax.locator_params(axis="x", nbins=6)
    ax.locator_params(axis="y", nbins=5)
  return fig, axes


def _widen(ax):
  """Values that differ by rounding alone are level, not a curve of noise."""
  low, high = ax.get_ylim()
  if high - low < 1e-5 * max(1, abs(low), abs(high)):
    ax.set_ylim(low - 0.5, high + 0.5)


def _curve(ax, steps, values, color, style):
  """One metric of one run: raw and thin, then smoothed."""
  stride = -(-len(steps) // MOST_POINTS)
  steps, thin = np.asarray(steps)[::stride], np.asarray(values)[::stride]
  thick = smooth(values)[::stride]
  ax.plot(steps, thin, color=color, lw=0.7, alpha=0.22)
  # A value between two gaps is no line: it shows as a dot.
  gap = np.pad(np.isnan(thick), 1, constant_values=True)
  alone = ~gap[1:-1] & gap[:-2] & gap[2:]
  ax.plot(steps[alone], thick[alone], ".", color=color, ms=6)
  ax.plot(steps, thick, color=color, lw=1.8, ls=style, solid_capstyle="round")
