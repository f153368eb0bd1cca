"""Batches by number: the whole state of the loader is one counter.

Batch n holds examples n·B … (n+1)·B − 1 of the endless stream
permutation(seed, 0), permutation(seed, 1), …; a batch may straddle two epochs.
In a mixture an epoch has each example of part k ⌊wₖ⌋ times, and a share
wₖ − ⌊wₖ⌋ of them, chosen for the epoch, once more.
`Loader.batch(n)` is a pure function of n, so resuming is exact on any number
of hosts.
"""

import collections
import itertools
from concurrent import futures
from typing import NamedTuple

import numpy as np

from dpo_jax.data.batch import order, planner
from dpo_jax.data.batch import rows as rows_lib
from dpo_jax.data.tokens import examples as examples_lib

_PLANNED_BATCHES = 4096  # whose sizes the planner looks at, at most


class Stats(NamedTuple):
  """Host-side counts of one global batch.

  Attributes:
    examples, comparisons: how many.
    tokens: positions that hold a token.
    scored: tokens with a log-prob.
    visible: (query, key) pairs that the attention rule admits, of all layers.
    fill: tokens / (R·T).
  """

  examples: int
  comparisons: int
  tokens: int
  scored: int
  visible: int
  fill: float


class Loader:
  """Examples in order, cut into batches of planned shapes.

  Attributes:
    size: examples per epoch.
    steps: batches per epoch, rounded up.
    shapes: the planned shapes.
    fill: expected tokens / positions over the sampled batches.
    fingerprint: "960 examples, 1f0e…": what a run that resumes must find again.
    token_fingerprint: the same of the tokens alone, whatever is compared.
  """

  def __init__(
    self,
    examples,
    layout,
    *,
    batch_size,
    seed,
    budget,
    multiple,
    steps=None,
    windows=(None,),
    weights=None,
    shapes=None,
  ):
    """See `rows.Layout` and `planner.plan_shapes`.

    Args:
      examples: examples.Examples, or a list of comparisons.Example.
      layout: rows.Layout.
      batch_size: examples per batch.
      seed: of the order; None is one pass in file order, whose last batch may
        hold fewer examples (evaluation).
      budget, multiple: of the planner.
      steps: batches that will be asked for, for the planner; None is one epoch.
      windows: of the model's layers (None sees all), for Stats.visible.
      weights: of the parts of a mixture, see `order.mixture`; needs a seed.
      shapes: of the batches; None has the planner choose them.
    """
    self._examples = examples = examples_lib.of(examples)
    self._layout, self._extras = layout, examples.extras
    self._batch_size, self._seed, self._multiple = batch_size, seed, multiple
    self._options = {
      "batch_size": batch_size,
      "budget": budget,
      "multiple": multiple,
      "windows": windows,
      "shapes": shapes,
    }
    self._parts = order.mixture(examples.source, weights)
    self.size = order.epoch_size(self._parts)
    weighted = self._parts != order.mixture(examples.source, None)
    if weighted and seed is None:
      raise ValueError(
        f"the weights {weights} of a mixture are for training; evaluation "
        "reads every record once: leave them out of data.eval"
      )
    self.fingerprint = examples.fingerprint(self._parts if weighted else None)
    self.token_fingerprint = examples.token_fingerprint
    self.steps = -(-self.size // batch_size)
    self._need = rows_lib.needs(examples, layout)
    self._windows = collections.Counter(windows)
    sampled = range(min(steps or self.steps, _PLANNED_BATCHES))
    self._rows = None
    if layout.max_row_length is not None or seed is None:
      self._rows = max(len(self._assign(n)) for n in sampled)
    assigned = [self._assign(n) for n in sampled]
    needed = [rows_lib.needed_shape(self._need, rows) for rows in assigned]
    self.shapes = shapes or planner.plan_shapes(
      needed, layout, budget=budget, multiple=multiple
    )
    used = [self._shape(shape) for shape in needed]
    tokens = sum(self._tokens(_flat(rows)) for rows in assigned)
    self.fill = tokens / sum(s.rows * s.length for s in used)

  def indices(self, number):
    """Example indices of batch `number`."""
    start, count = number * self._batch_size, self._batch_size
    if self._seed is None:
      count = min(count, self.size - start)
    return order.stream(start, count, self.size, self._seed, self._parts)

  def batch(self, number, row_slice=None):
    """Batch `number` as (dict of numpy arrays, Stats).

    Args:
      number: from 0.
      row_slice: function R -> slice of the rows this process builds; None
        builds all.
    """
    rows = self._assign(number)
    shape = self._shape(rows_lib.needed_shape(self._need, rows))
    everything = _flat(rows)
    tokens = self._tokens(everything)
    stats = Stats(
      examples=len(everything),
      comparisons=int(self._need.pairs[everything].sum()),
      tokens=tokens,
      scored=int(self._need.scored[everything].sum()),
      visible=self._visible(everything),
      fill=tokens / (shape.rows * shape.length),
    )
    if row_slice is not None:
      rows = rows[row_slice(len(rows))]
    args = self._examples, rows, shape, self._layout, self._extras
    return rows_lib.build(*args), stats

  def unpack(self, number, values):
    """What a per-token array of batch `number` holds of each example.

    Args:
      number: from 0.
      values: [R, S], aligned with target_index, all rows.
    Yields: (example index, [its scored tokens]).
    """
    for row, line in zip(self._assign(number), values, strict=True):
      start = 0
      for index in row:
        end = start + int(self._need.scored[index])
        yield index, line[start:end]
        start = end

  def unpack_completions(self, number, values):
    """What an array [R, P, C] of batch `number` holds of each example.

    Args: as `unpack`.
    Yields: (example index, [its completions]).
    """
    counts = self._examples.columns.completions
    for row, line in zip(self._assign(number), values, strict=True):
      for place, index in enumerate(row):
        yield index, line[place, : counts[index]]

  def prompts(self, indices):
    """Token ids of the prompts of some examples, a tuple each."""
    return [tuple(self._examples[i].prompt) for i in indices]

  def in_order(self):
    """A Loader of one pass over the same examples, in the order of the file."""
    return Loader(self._examples, self._layout, seed=None, **self._options)

  @property
  def counts(self):
    """Scored tokens of each example, i32[N]."""
    return self._need.scored

  @property
  def comparisons(self):
    """Comparisons of all examples."""
    return int(self._need.pairs.sum())

  @property
  def has_reference(self):
    """Whether `set_reference` was called."""
    return "ref_token_logps" in self._extras

  def set_reference(self, ref_logps):
    """Gives every example its reference log-probs, for all later batches.

    Args:
      ref_logps: sequence of f32[scored tokens], one an example; it is kept, and
        asked for those of a batch.
    """
    if len(ref_logps) != len(self._examples):
      raise ValueError(
        f"{len(ref_logps)} reference log-probs for {len(self._examples)} "
        "examples"
      )
    self.set_extras({"ref_token_logps": ref_logps})

  def set_extras(self, extras):
    """Gives every example arrays of rows.EXTRAS, for all later batches.

    Args:
      extras: {name: sequence of the values of each example}.
    """
    self._extras = {**self._extras, **extras}

  def _tokens(self, indices):
    """Positions that hold a token, of some examples."""
    c = self._examples.columns
    prompts = 1 if self._layout.shared else c.completions[indices]
    return int((prompts * c.prompt[indices] + c.scored[indices]).sum())

  def _visible(self, indices):
    """(query, key) pairs in the attention layers of some examples."""
    lengths = [self._examples.lengths(i).astype(int) for i in indices]
    counts = [len(n) - 1 for n in lengths]
    prompt = np.asarray([n[0] for n in lengths])
    before = np.repeat(prompt, counts)
    whole = before + np.concatenate([n[1:] for n in lengths])
    alone = self._seen(prompt) * (1 if self._layout.shared else counts)
    return int((self._seen(whole) - self._seen(before)).sum() + alone.sum())

  def _seen(self, lengths):
    """Keys that all queries of causal sequences see, in all layers."""
    total = np.zeros(len(lengths), int)
    for window, layers in self._windows.items():
      near = lengths if window is None else np.minimum(lengths, window)
      total += layers * (near * (near + 1) // 2 + (lengths - near) * near)
    return total

  def _assign(self, number):
    """Rows of batch `number`, each a list of example indices."""
    indices = self.indices(number)
    lengths = self._need.length[indices]
    rows = rows_lib.assign(lengths, self._layout, self._rows)
    return [[int(indices[i]) for i in row] for row in rows]

  def _shape(self, needed):
    return planner.fit_shape(needed, self.shapes, self._layout, self._multiple)


def _flat(rows):
  return np.asarray([i for row in rows for i in row])


def prefetch(fn, numbers, depth=2):
  """Yields fn(n) for n in `numbers`, prepared by a background thread.

  Close the generator (`contextlib.closing`) to end the thread early.
  """
  numbers = iter(numbers)

  def prepare():
    """A list of the next result; an empty one at the end."""
    return [fn(number) for number in itertools.islice(numbers, 1)]

  executor = futures.ThreadPoolExecutor(1)
  try:
    # One more than wait for their turn: it is being prepared.
    waiting = [executor.submit(prepare) for _ in range(depth + 1)]
    while results := waiting.pop(0).result():
      waiting.append(executor.submit(prepare))
      yield from results
  finally:
    # A thread inside JAX while the interpreter exits would abort the process.
    executor.shutdown(cancel_futures=True)
