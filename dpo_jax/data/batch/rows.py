"""Rows of prompt trees: the one batch layout, its planner and its builder.

An example is a prompt with up to C completions; a row has T positions and
holds up to P examples. Inside an example: prompt, completion 1, completion 2,
… Pair data: completion 1 is chosen, 2 rejected, always.

    tokens              i32[R, T]     token ids
    positions           i32[R, T]     restart at each example; every completion
                                      continues from the prompt's end
    segment_ids         i32[R, T]     1..P example in this row, 0 padding
    branch_ids          i32[R, T]     0 prompt, 1..C completion
    example_index       i32[R, P, E]  row positions of example p; T = padding
    target_index        i32[R, S]     position of a scored token
    source_index        i32[R, S]     position that predicts it: its predecessor
                                      in the branch, or the prompt's last token
    target_slot         i32[R, S]     p·C + c; P·C = padding
    pairs               i32[R, Q, K]  slots of each comparison: winner, loser
                                      (K = 2), see data.comparisons
    weights             f32[R, Q]     1 for a comparison, 0 for padding
    labels              f32[R, Q]     of single completions, where there are
    completion_weights  f32[R, P, C]  1 for a completion, 0 for padding
    ended               f32[R, P, C]  1 for a completion that was not cut
    scores              f32[R, P, C]  of the completions, where there are
    example_id, source  i32[R, P]     identity; which data set
    ref_token_logps     f32[R, S]     of the reference in nats, where cached

Without prompt sharing the layout is the same with no branch 0: each branch
repeats the prompt. The shift by one lives in `source_index` and nowhere else.
"""

import heapq
from typing import NamedTuple

import numpy as np

from dpo_jax.data.tokens import examples as examples_lib


class Shape(NamedTuple):
  """The static sizes of a batch; one compilation each.

  Attributes:
    rows, length, scored: R, T, S.
    per_row, completions, tile, pairs, compared: P, C, E, Q, K.
  """

  rows: int
  length: int
  scored: int
  per_row: int
  completions: int
  tile: int
  pairs: int
  compared: int

  def fits(self, other):
    """Whether a batch that needs `other` fits into this shape."""
    return all(a >= b for a, b in zip(self, other, strict=True))


class Layout(NamedTuple):
  """How examples become rows.

  Attributes:
    packed: several examples share a row; else each has its own.
    shared: completions share one copy of the prompt; else each repeats it.
    row_multiple: R is a multiple of this (data × fsdp × accumulation).
    max_row_length: packed batches get enough rows to stay within this, unless
      one example is longer; None packs into the fewest rows.
  """

  packed: bool
  shared: bool
  row_multiple: int
  max_row_length: int | None


class Need(NamedTuple):
  """What each of N examples occupies, as i32[N]."""

  length: np.ndarray
  scored: np.ndarray
  completions: np.ndarray
  pairs: np.ndarray
  compared: np.ndarray


def needs(examples, layout):
  """The Need of examples.Examples, or of a list, under a layout."""
  c = examples_lib.of(examples).columns
  if layout.shared:
    length = c.prompt + c.scored
  elif layout.packed:
    length = c.prompt * c.completions + c.scored
  else:  # C equal branches, so that a row reshapes to [C, T / C]
    length = c.completions.max() * (c.prompt + c.longest)
  return Need(length, c.scored, c.completions, c.pairs, c.compared)


def assign(lengths, layout, count=None):
  """Spreads the examples of one batch over rows.

  Longest first, each to the row that is emptiest so far. A pure function of
  the lengths, so every process finds the same rows.

  Args:
    lengths: positions each example needs.
    layout: Layout.
    count: R; None takes the fewest rows that respect the layout.
  Returns: list of R lists of indices into `lengths`, each in rising order.
  """
  if not layout.packed:
    fewest = round_up(len(lengths), layout.row_multiple)
    return [
      [i] if i < len(lengths) else [] for i in range(max(fewest, count or 0))
    ]
  longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  limit = layout.max_row_length
  limit = None if limit is None else max(limit, int(max(lengths)))
  fixed, count = count is not None, count or layout.row_multiple
  while True:
    heap = [(0, row) for row in range(count)]
    rows = [[] for _ in range(count)]
    for i in longest_first:
      load, row = heap[0]
      heapq.heapreplace(heap, (load + int(lengths[i]), row))
      rows[row].append(i)
    if fixed or limit is None or max(heap)[0] <= limit:
      return [sorted(row) for row in rows]
    count += layout.row_multiple


def needed_shape(need, rows):
  """The smallest Shape that holds these rows."""

  def largest(values):
    return max((int(values[row].sum()) for row in rows if row), default=0)

  everything = [i for row in rows for i in row]
  completions = int(need.completions.max())
  per_row = max(map(len, rows))
  most_pairs = int(need.pairs[everything].max())
  return Shape(
    rows=len(rows),
    length=largest(need.length),
    scored=largest(need.scored),
    per_row=per_row,
    completions=completions,
    tile=int(need.length[everything].max()),
    pairs=per_row * most_pairs,
    compared=int(need.compared.max()),
  )


def plan_shapes(needed, layout, *, budget, multiple):
  """Chooses at most `budget` shapes for batches that need these.

  Sorts by T and cuts the order into groups, each with the largest sizes of its
  members, so that the padded positions Σ T are fewest (by dynamic programming;
  exact up to 256 distinct T, over their quantiles beyond).

  Args:
    needed: Shape of each sampled batch, all with the same R.
    layout: Layout.
    budget: compilations allowed, ≥ 1.
    multiple: T, S and E are multiples of this.
  Returns: list of Shape, smallest first.
  """
  assert len({s.rows for s in needed}) == 1, "one R a run"
  needed = sorted(
    (_rounded(s, multiple, layout) for s in needed), key=lambda s: s.length
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
    have if have >= need else round_up(need, max(1, have // 8))
    for need, have in zip(needed, largest, strict=True)
  ]
  return _rounded(Shape(*grown)._replace(rows=needed.rows), multiple, layout)


def _largest(shapes):
  return Shape(*(max(sizes) for sizes in zip(*shapes, strict=True)))


def round_up(x, multiple):
  """The smallest multiple of `multiple` that is at least x."""
  return -(-x // multiple) * multiple


def _rounded(shape, multiple, layout):
  """Sizes up to a multiple, so that near-equal batches share a shape."""
  apart = not (layout.packed or layout.shared)
  length = round_up(
    shape.length, multiple * (shape.completions if apart else 1)
  )
  return shape._replace(
    length=length,
    scored=round_up(shape.scored, multiple),
    tile=min(round_up(shape.tile, multiple), length),
  )


def _branches(example, shared, stride):
  """An example as arrays of its own positions, from 0.

  Args:
    example: comparisons.Example.
    shared: one prompt for all branches, or one each.
    stride: start of branch c is c · stride; None places them end to end.
  Returns: (offset, tokens, positions, branch) per position, and
    (target, source, completion) per scored token, as arrays.
  """
  at, tokens, positions, branch = [], [], [], []
  target, source, completion = [], [], []
  prompt = example.prompt
  cursor = 0

  def place(ids, first_position, branch_id):
    nonlocal cursor
    at.extend(range(cursor, cursor + len(ids)))
    tokens.extend(ids)
    positions.extend(range(first_position, first_position + len(ids)))
    branch.extend([branch_id] * len(ids))
    cursor += len(ids)

  if shared:
    place(prompt, 0, 0)
  for c, ids in enumerate(example.completions):
    if not shared:
      cursor = cursor if stride is None else c * stride
      place(prompt, 0, c + 1)
    last = len(prompt) - 1 if shared else cursor - 1
    target.extend(range(cursor, cursor + len(ids)))
    source.extend([last, *range(cursor, cursor + len(ids) - 1)])
    completion.extend([c] * len(ids))
    place(ids, len(prompt), c + 1)
  per_position = (at, tokens, positions, branch)
  per_target = (target, source, completion)
  return [np.asarray(x) for x in per_position + per_target]


def build(rows, shape, layout, extras=()):
  """The batch of rows of examples, as a dict of numpy arrays.

  Args:
    rows: list of lists of comparisons.Example; may be a slice of all R rows.
    shape: Shape.
    layout: Layout.
    extras: arrays that all these examples have, of comparisons.EXTRAS.
  Returns: the arrays of the module docstring, with len(rows) for R.
  """
  R, T, S, P = len(rows), shape.length, shape.scored, shape.per_row
  C, E, Q = shape.completions, shape.tile, shape.pairs
  batch = {
    "tokens": np.zeros((R, T), np.int32),
    "positions": np.zeros((R, T), np.int32),
    "segment_ids": np.zeros((R, T), np.int32),
    "branch_ids": np.zeros((R, T), np.int32),
    "example_index": np.full((R, P, E), T, np.int32),
    "target_index": np.zeros((R, S), np.int32),
    "source_index": np.zeros((R, S), np.int32),
    "target_slot": np.full((R, S), P * C, np.int32),
    "pairs": np.full((R, Q, shape.compared), P * C, np.int32),
    "weights": np.zeros((R, Q), np.float32),
    "completion_weights": np.zeros((R, P, C), np.float32),
    "ended": np.zeros((R, P, C), np.float32),
    "example_id": np.zeros((R, P), np.int32),
    "source": np.zeros((R, P), np.int32),
  }
  sizes = {"ref_token_logps": (R, S), "labels": (R, Q), "scores": (R, P, C)}
  batch |= {name: np.zeros(sizes[name], np.float32) for name in extras}
  stride = None
  if not (layout.packed or layout.shared):
    stride = T // C
  for r, row in enumerate(rows):
    start = scored = compared = 0
    for p, example in enumerate(row):
      at, tokens, positions, branch, target, source, completion = _branches(
        example, layout.shared, stride
      )
      at = at + start
      batch["tokens"][r, at] = tokens
      batch["positions"][r, at] = positions
      batch["segment_ids"][r, at] = p + 1
      batch["branch_ids"][r, at] = branch
      batch["example_index"][r, p, : len(at)] = at
      here = slice(scored, scored + len(target))
      batch["target_index"][r, here] = target + start
      batch["source_index"][r, here] = source + start
      batch["target_slot"][r, here] = p * C + completion
      if "ref_token_logps" in extras:
        batch["ref_token_logps"][r, here] = example.ref_logps
      for number, (*compares, weight) in enumerate(example.pairs):
        slots = p * C + np.asarray(compares)
        batch["pairs"][r, compared, : len(slots)] = slots
        batch["weights"][r, compared] = weight
        if "labels" in extras:
          batch["labels"][r, compared] = example.labels[number]
        compared += 1
      here = r, p, slice(len(example.completions))
      batch["completion_weights"][here] = 1
      batch["ended"][here] = 1 if example.ended is None else example.ended
      if "scores" in extras:
        batch["scores"][here] = example.scores
      batch["example_id"][r, p] = example.example_id
      batch["source"][r, p] = example.source
      start = int(at[-1]) + 1
      scored += len(target)
  return batch
