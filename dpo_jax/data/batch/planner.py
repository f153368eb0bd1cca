"""The planner: a few shapes that hold all batches, with little padding."""

import numpy as np

from dpo_jax.data.batch import rows


def plan_shapes(needed, layout, *, budget, multiple):
  """Chooses at most `budget` shapes for batches that need these.

  Sorts by T and cuts the order into groups, each with the largest sizes of its
  members, so that the padded positions Σ T are fewest (by dynamic programming;
  exact up to 256 distinct T, over their quantiles beyond).

  Args:
    needed: rows.Shape of each sampled batch, all with the same R.
    layout: rows.Layout.
    budget: compilations allowed, ≥ 1.
    multiple: T, S and E are multiples of this.
  Returns: list of rows.Shape, smallest first.
  """
  assert len({s.rows for s in needed}) == 1, "one R a run"
  needed = sorted(
    (rows.rounded(s, multiple, layout) for s in needed), key=lambda s: s.length
  )
  lengths = np.asarray([s.length for s in needed])
  tops = np.unique(lengths)
  if len(tops) > 256:
    quantiles = np.linspace(0, 1, 256)
    tops = np.unique(np.quantile(tops, quantiles, method="higher"))
  ends = np.searchsorted(lengths, tops, side="right")  # batches of T <= top
  before = np.concatenate([[0], ends])
  cost = np.full((budget + 1, len(tops) + 1), np.inf)
  cut = np.zeros((budget + 1, len(tops) + 1), int)
  cost[:, 0] = 0
  for k in range(1, budget + 1):
    for end in range(1, len(tops) + 1):
      group = (before[end] - before[:end]) * tops[end - 1]
      total = cost[k - 1, :end] + group
      cut[k, end] = int(np.argmin(total))
      cost[k, end] = total[cut[k, end]]
  shapes, end, k = [], len(tops), budget
  while end > 0:
    start = cut[k, end]
    group = needed[before[start] : before[end]]
    shapes.append(_largest(group))
    end, k = start, k - 1
  return shapes[::-1]


def fit_shape(needed, planned, layout, multiple):
  """The smallest planned shape that holds `needed`, or one beyond the plan.

  A pure function of the batch and the plan, so that a resumed run pads as the
  first one did. Shapes beyond the plan grow in steps of an eighth of the
  largest planned sizes, so that they are few.
  """
  for shape in planned:
    if shape.fits(needed):
      return shape
  largest = _largest([s for s in planned if s.rows == needed.rows] or [needed])
  grown = [
    have if have >= need else rows.round_up(need, max(1, have // 8))
    for need, have in zip(needed, largest, strict=True)
  ]
  return rows.rounded(
    rows.Shape(*grown)._replace(rows=needed.rows), multiple, layout
  )


def _largest(shapes):
  return rows.Shape(*(max(sizes) for sizes in zip(*shapes, strict=True)))
