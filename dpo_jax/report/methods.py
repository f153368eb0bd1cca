"""The figure of a study: reward over KL, one colour a method.

Dots are checkpoints of all seeds and settings, lines the envelopes' means over
seeds with a band of a standard error, and the black line the best there can be.
"""

import numpy as np

from dpo_jax.eval import statistics
from dpo_jax.report import claims, figures

# Colours that differ for the colour-blind too (Okabe and Ito), ours first.
COLORS = (
  *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00"),
  *("#56b4e9", "#8c6bb1", "#6b6b6b", "#a6761d", "#1b9e77"),
)
NAMES = {
  "dpo": "DPO",
  "ipo": "IPO",
  "cdpo": "cDPO",
  "ppo": "PPO, learned reward",
  "ppo_gt": "PPO, true reward",
  "rloo": "RLOO, learned reward",
  "unlikelihood": "Unlikelihood",
  "preferred_ft": "Preferred-FT",
  "best_of": "Best of N",
}
LABELS = {
  "bradley_terry": "labels drawn by Bradley–Terry",
  "deterministic": "the higher reward wins",
}
_KLS = 60  # points of an envelope's line


def shown(name):
  """A method's name for a reader."""
  return NAMES.get(name, name)


def draw(study, wide):
  """The figure of a claims.Study, or None if no method is done.

  Args:
    wide: panels side by side, else one below the other.
  """
  every = study.options["labels"]
  methods = [study.claims["method"], *study.claims["against"]]
  there = [m for m in methods if _points(study, every[0], m) is not None]
  if not there:
    return None
  count, size = len(every), 11 if wide else 9.5
  shape = (1, count) if wide else (count, 1)
  inches = (4.6 * count, 4.4) if wide else (3.85, 3.6 * count)
  fig, axes = figures.frame(inches, *shape, size)
  colors = dict(zip(methods, COLORS, strict=False))
  for ax, labels in zip(axes, every, strict=True):
    ax.set_title(
      LABELS.get(labels, labels), loc="left", color=figures.INK, fontsize=size
    )
    ax.set_xlabel("sequence KL from the reference, nats", fontsize=size)
    _panel(ax, study, labels, {name: colors[name] for name in there})
  axes[0].set_ylabel("mean reward r*", color=figures.MUTED, fontsize=size)
  legend(fig, axes[0], columns=5 if wide else 2, size=size)
  return fig


def legend(fig, ax, *, columns, size):
  """Names of what an axis shows, below the figure."""
  fig.legend(
    *ax.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    fontsize=size - 1,
    labelcolor=figures.INK,
  )


def _points(study, labels, name):
  return claims.points_of(study, labels, name)


def _panel(ax, study, labels, colors):
  """Draws what was trained under one labelling."""
  furthest = 1.25 * max(study.claims["grid"])
  kls = np.linspace(0, furthest, _KLS)
  worlds = study.about["worlds"]
  exact = np.mean(
    [
      np.interp(kls, w["frontier"]["kl"], w["frontier"]["reward"])
      for w in worlds
    ],
    axis=0,
  )
  ax.plot(kls, exact, color=figures.INK, lw=1.6, label="exact frontier")
  for name, color in reversed(colors.items()):  # ours above the others
    points = _points(study, labels, name)
    if points is None:
      continue
    if name == claims.BEST_OF:
      kl, reward = np.mean([(k[2:], r[2:]) for k, r in points], axis=0)
      ax.plot(kl, reward, "s", color=color, mfc=figures.PAPER, ms=5.5)
      ax.plot([], [], "s", color=color, mfc=figures.PAPER, label=shown(name))
      continue
    for kl, reward in points:
      dot = {"color": color, "ms": 2.2, "alpha": 0.25, "mew": 0}
      # Thousands: as elements of a page they would be megabytes.
      ax.plot(kl, reward, ".", **dot, rasterized=True)
    _envelope(ax, points, kls, color, shown(name))
  start = np.mean([world["reference"]["reward"] for world in worlds])
  ax.plot([0], [start], "D", color=figures.INK, ms=6, label="reference")
  ax.set_xlim(-0.03 * furthest, furthest)


def _envelope(ax, points, kls, color, label):
  """The mean over seeds up to the KL that all of them reach, and a band."""
  reached = min(kl.max() for kl, _ in points)
  kls = kls[kls <= reached]
  each = np.array([statistics.envelope(*own, kls) for own in points])
  band(ax, kls, each, color, label)


def band(ax, kls, each, color, label):
  """A line of the mean over seeds, and a band of its standard error.

  Args: each: f64[seeds, KLs].
  """
  mean = each.mean(axis=0)
  error = each.std(axis=0, ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0
  ends = mean - error, mean + error
  ax.fill_between(kls, *ends, color=color, alpha=0.18, lw=0)
  ax.plot(kls, mean, color=color, lw=1.5, label=label)
