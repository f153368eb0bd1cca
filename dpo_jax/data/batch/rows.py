"""Rows of prompt trees: the one batch layout, and its builder.

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
    completion_weights  f32[R, P, C]  1 for a completion, 0 for padding
    ended               f32[R, P, C]  1 for a completion that was not cut
    example_id, source  i32[R, P]     number of the record; which data set

and those of EXTRAS that there are, f32 with 0 for padding.

Without prompt sharing the layout is the same with no branch 0: each branch
repeats the prompt. The shift by one lives in `source_index` and nowhere else.
"""

import heapq
from typing import NamedTuple

import numpy as np

from dpo_jax import lookup
from dpo_jax.data.tokens import examples as examples_lib

# What an extra array has a value of; named by the array that has its axes.
TOKEN, COMPLETION, COMPARISON = "target_index", "completion_weights", "weights"
EXTRAS = {
  "ref_token_logps": TOKEN,  # of the reference, in nats
  "old_logps": TOKEN,  # of the policy that drew it, in nats
  "advantages": TOKEN,
  "returns": TOKEN,
  "values": TOKEN,
  "token_weights": TOKEN,
  "scores": COMPLETION,
  "gaps": COMPLETION,  # largest |log-prob as sampled − in training|, in nats
  "ended": COMPLETION,
  "labels": COMPARISON,  # of single completions
  "identical": COMPARISON,  # 1 where what is compared is the same
  "tied": COMPARISON,  # 1 where it has the same score
}


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
  per_row = max(map(len, rows))
  return Shape(
    rows=len(rows),
    length=largest(need.length),
    scored=largest(need.scored),
    per_row=per_row,
    completions=int(need.completions.max()),
    tile=int(need.length[everything].max()),
    pairs=per_row * int(need.pairs[everything].max()),
    compared=int(need.compared.max()),
  )


def limits_shape(
  layout,
  *,
  rows,
  per_row,
  completions,
  prompt,
  completion,
  pairs,
  multiple,
  compared=2,
):
  """The Shape of all batches that keep to some limits, such as rollouts.

  Args:
    layout: Layout.
    rows: R, at least.
    per_row: P, examples in a row.
    completions: C, of an example.
    prompt, completion: tokens of each, at most.
    pairs: comparisons of an example.
    multiple: T, S and E are multiples of this.
    compared: completions of a comparison.
  """
  prompts = 1 if layout.shared else completions
  tile = prompts * prompt + completions * completion
  shape = Shape(
    rows=round_up(rows, layout.row_multiple),
    length=per_row * tile,
    scored=per_row * completions * completion,
    per_row=per_row,
    completions=completions,
    tile=tile,
    pairs=per_row * pairs,
    compared=compared,
  )
  return rounded(shape, multiple, layout)


def round_up(x, multiple):
  """The smallest multiple of `multiple` that is at least x."""
  return -(-x // multiple) * multiple


def rounded(shape, multiple, layout):
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


def build(examples, rows, shape, layout, extras=None):
  """The batch of rows of examples, as a dict of numpy arrays.

  Args:
    examples: sequence of comparisons.Example.
    rows: list of lists of indices into it; may be a slice of all R rows.
    shape: Shape.
    layout: Layout.
    extras: {name of EXTRAS: sequence of the values of each example}.
  Returns: the arrays of the module docstring, with len(rows) for R.
  """
  extras = extras or {}
  batch = _padding(len(rows), shape)
  for name in extras:
    lookup.lookup(EXTRAS, name, "the extra array")
    batch[name] = np.zeros(batch[EXTRAS[name]].shape, np.float32)
  stride = None
  if not (layout.packed or layout.shared):
    stride = shape.length // shape.completions
  for r, row in enumerate(rows):
    arrays = {name: array[r] for name, array in batch.items()}
    start = scored = compared = 0
    for p, index in enumerate(row):
      example = examples[index]
      places = {
        TOKEN: slice(scored, scored + sum(map(len, example.completions))),
        COMPLETION: (p, slice(len(example.completions))),
        COMPARISON: slice(compared, compared + len(example.pairs)),
      }
      start = _place(arrays, p, example, start, scored, layout.shared, stride)
      for number, (*members, weight) in enumerate(example.pairs, compared):
        slots = [p * shape.completions + k for k in members]
        arrays["pairs"][number, : len(slots)] = slots
        arrays["weights"][number] = weight
      arrays["completion_weights"][places[COMPLETION]] = 1
      ended = 1 if example.ended is None else example.ended
      arrays["ended"][places[COMPLETION]] = ended
      arrays["example_id"][p] = example.example_id
      arrays["source"][p] = example.source
      for name, values in extras.items():
        arrays[name][places[EXTRAS[name]]] = values[index]
      scored, compared = places[TOKEN].stop, places[COMPARISON].stop
  return batch


def _padding(count, shape):
  """The arrays of a batch of `count` rows that hold nothing."""
  of_rows = count, shape.length
  of_tokens = count, shape.scored
  of_completions = count, shape.per_row, shape.completions
  slots = shape.per_row * shape.completions
  return {
    "tokens": np.zeros(of_rows, np.int32),
    "positions": np.zeros(of_rows, np.int32),
    "segment_ids": np.zeros(of_rows, np.int32),
    "branch_ids": np.zeros(of_rows, np.int32),
    "example_index": np.full(
      (count, shape.per_row, shape.tile), shape.length, np.int32
    ),
    "target_index": np.zeros(of_tokens, np.int32),
    "source_index": np.zeros(of_tokens, np.int32),
    "target_slot": np.full(of_tokens, slots, np.int32),
    "pairs": np.full((count, shape.pairs, shape.compared), slots, np.int32),
    "weights": np.zeros((count, shape.pairs), np.float32),
    "completion_weights": np.zeros(of_completions, np.float32),
    "ended": np.zeros(of_completions, np.float32),
    "example_id": np.zeros(of_completions[:2], np.int32),
    "source": np.zeros(of_completions[:2], np.int32),
  }


def _place(arrays, p, example, start, scored, shared, stride):
  """Writes the tokens of an example into its row.

  Args:
    arrays: of the row, by name.
    p: place of the example in the row.
    example: comparisons.Example.
    start: position in the row that it begins at.
    scored: tokens of the row that are scored already.
    shared: one prompt for all branches, or one each.
    stride: start of branch c is c · stride; None places them end to end.
  Returns: the position in the row behind it.
  """
  count = np.arange(len(arrays["tokens"]))
  completions, prompt = arrays["completion_weights"].shape[1], example.prompt
  listed, behind = 0, start  # positions in example_index; the next one

  def write(ids, position, branch):
    nonlocal listed, behind
    here = slice(behind, behind + len(ids))
    arrays["tokens"][here] = ids
    arrays["positions"][here] = count[position : position + len(ids)]
    arrays["segment_ids"][here] = p + 1
    arrays["branch_ids"][here] = branch
    arrays["example_index"][p, listed : listed + len(ids)] = count[here]
    listed, behind = listed + len(ids), here.stop

  if shared:
    write(prompt, 0, 0)
  for c, ids in enumerate(example.completions):
    if not shared:
      behind = behind if stride is None else c * stride
      write(prompt, 0, c + 1)
    # Of the first token of a completion: the last one of its prompt.
    source = start + len(prompt) - 1 if shared else behind - 1
    here = slice(scored, scored + len(ids))
    arrays["target_index"][here] = count[behind : behind + len(ids)]
    arrays["source_index"][here] = count[behind - 1 : behind + len(ids) - 1]
    arrays["source_index"][scored] = source
    arrays["target_slot"][here] = p * completions + c
    scored = here.stop
    write(ids, len(prompt), c + 1)
  return behind
