"""Names beside the marks of a figure, where they hide nothing."""

import itertools

import numpy as np
from matplotlib import text

INK, MUTED = "#1b1f24", "#5c6571"


def write(fig, ax, marks, paths, reference, size):
  """Names the marks where they hide no mark, line, error bar or other name."""
  renderer = fig.canvas.get_renderer()
  point = fig.dpi / 72
  frame = ax.get_window_extent(renderer)
  taken = _drawn(ax, marks, paths, point)
  spots = ax.transData.transform([(m.kl, m.reward) for m in marks])
  if reference:
    y = spots[-1][1]
    taken = np.vstack([taken, [frame.x0, y - 1, frame.x1, y + 1, 2]])
  sides = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 17)[:-1]]
  apart = np.hypot(*(spots[:, None] - spots).T) + np.diag([np.inf] * len(marks))
  # Those with the least room choose first.
  for i in np.argsort(apart.min(axis=0)):
    mark, best = marks[i], None
    for far, (right, up) in itertools.product((9, 18, 32, 50), sides):
      leader = {"arrowstyle": "-", "color": MUTED, "lw": 0.7, "shrinkB": 5}
      name = ax.annotate(
        plain(mark.name),
        (mark.kl, mark.reward),
        (right * far, up * far),
        textcoords="offset points",
        ha=("right", "center", "left")[round(1.2 * right) + 1],
        va=("top", "center", "bottom")[round(1.2 * up) + 1],
        fontsize=size,
        color=INK,
        zorder=4,
        arrowprops=leader if far > 9 else None,
      )
      name.set_in_layout(False)
      # Of the text alone: an Annotation's own extent has the leader in it.
      name.update_positions(renderer)
      box = text.Text.get_window_extent(name, renderer)
      cost = _cost(box, taken, frame, point) + far / 8 + 0.1 * (up < 0.3)
      # A name nearer to another mark reads as that mark's.
      cost += 4 * (np.argmin(_distances(box, spots)) != i)
      end = spots[i] + np.asarray([right, up]) * far * point
      leads = (
        np.linspace(spots[i], end, 20)[6:] if far > 9 else np.empty((0, 2))
      )
      cost += _crossed(leads, taken)
      if best is None or cost < best[0]:
        if best:
          best[1].remove()
        best = cost, name, box, leads
      else:
        name.remove()
    _, _, box, leads = best
    leads = [(x - 1, y - 1, x + 1, y + 1, 2) for x, y in leads]
    taken = np.vstack([taken, [*box.extents, 30], *leads])


def _drawn(ax, marks, paths, point):
  """Boxes f64[n, 5] in pixels of all that is drawn: x0, y0, x1, y1, cost."""
  at = ax.transData.transform
  boxes = []
  for mark in marks:
    x, y = at((mark.kl, mark.reward))
    half = 5 * point
    boxes.append((x - half, y - half, x + half, y + half, 10))
    dx, dy = np.nan_to_num([mark.kl_se, mark.reward_se])
    left, low = at((mark.kl - dx, mark.reward - dy))
    right, high = at((mark.kl + dx, mark.reward + dy))
    boxes += [(left, y - 2, right, y + 2, 3), (x - 2, low, x + 2, high, 3)]
    for x, y in map(at, mark.seeds):
      boxes.append((x - half / 2, y - half / 2, x + half / 2, y + half / 2, 3))
  for path in paths:
    for a, b in itertools.pairwise(at((m.kl, m.reward)) for m in path):
      dots = np.linspace(a, b, 60)
      boxes += [(x - 1, y - 1, x + 1, y + 1, 1) for x, y in dots]
  return np.asarray(boxes)


def _distances(box, spots):
  """Pixels from each spot to a box."""
  outside = np.maximum(box.min - spots, spots - box.max)
  return np.hypot(*np.maximum(0, outside).T)


def _crossed(dots, taken):
  """What a leader, as points f64[n, 2], would cross: marks, bars and names."""
  dots = dots[:, None]
  inside = (dots > taken[:, :2]) & (dots < taken[:, 2:4])
  return np.sum(taken[:, 4], where=inside.all(axis=2).any(axis=0))


def _cost(box, taken, frame, point):
  """How badly a name's box sits: what it covers, and what leaves the frame."""
  low, high = box.min - point, box.max + point
  meets = (low < taken[:, 2:4]) & (high > taken[:, :2])
  covered = np.sum(taken[:, 4], where=meets.all(axis=1))
  outside = max(0, *(frame.min - low), *(high - frame.max))
  return covered + 4 * outside / point


def plain(name):
  """A name in which matplotlib sees no formula."""
  return name.replace("$", r"\$")
