"""Where the batches of a run come from, whether or not they need its policy."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dpo_jax import progress
from dpo_jax.data.batch import loader as loader_lib
from dpo_jax.data.batch import order, rows
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import corpus
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib

_AHEAD = 2  # batches that wait for their turn


class Feed(NamedTuple):
  """Batches by number, from 0.

  Attributes:
    batch: (number, state) -> (batch on the mesh, loader.Stats); numbers are
      asked for in their order, from one where `boundary` holds.
    ahead: how many may be made before their turn, by a thread, with None for
      the state; 0 where they depend on the policy.
    boundary: steps done -> whether a checkpoint may be taken there: whoever
      starts from it is given the same batches.
    about: a line for the log.
    shapes: rows.Shape of the batches.
    fingerprint: what a run that resumes must find again, in words.
    epoch: examples in a pass over the data.
    loader: loader.Loader of the data, where that is all there is; else None.
  """

  batch: Callable
  ahead: int
  boundary: Callable
  about: str
  shapes: list
  fingerprint: str
  epoch: int
  loader: Any = None


def of_loader(loader, about, mesh, mode):
  """The Feed of a Loader: a pure function of the number."""
  return Feed(
    batch=lambda number, state: place(loader, number, mesh, mode),
    ahead=_AHEAD,
    boundary=lambda done: True,
    about=about,
    shapes=loader.shapes,
    fingerprint=loader.fingerprint,
    epoch=loader.size,
    loader=loader,
  )


def place(loader, number, mesh, mode):
  """Batch `number` of a loader on the mesh, and its Stats."""
  batch, stats = loader.batch(
    number, functools.partial(mesh_lib.local_rows, mesh)
  )
  return run_lib.place_batch(batch, mesh, mode), stats


def load(setup, algorithm, spec, field, row_multiple, *, steps=None):
  """(Loader of a data set, a line that describes it).

  Args:
    algorithm: base.Algorithm; its `data` and `needs` are read.
    spec, field: the source and the field that names it.
    row_multiple: of the rows of a batch.
    steps: for training, which is shuffled and endless: function of the epoch's
      size -> batches that will be asked for. None is one pass in order.
  """
  options = setup.data
  policy = sources.Policy(options.bad_records)
  weights = tuple(weight for weight, _ in sources.parse(spec, field))
  examples, changed, cached = corpus.load(
    *(spec, field, algorithm.data, "scores" in algorithm.needs),
    *(setup.tokenizer, options, policy),
    loud=jax.process_index() == 0,
  )
  size = order.epoch_size(order.mixture(examples.source, weights))
  batches = None if steps is None else steps(size)
  loader = in_batches(setup, examples, row_multiple, batches, weights)
  notes = [f"{n} × {what}" for what, n in changed.items()]
  notes += [f"{n} skipped: {why}" for why, n in policy.skipped.items()]
  if size != len(examples):
    notes.append(f"{size} examples per epoch")
  count = f"{len(loader.shapes)} shape{'s' if len(loader.shapes) > 1 else ''}"
  about = (
    f"{spec}: {len(examples)} examples, {loader.comparisons} comparisons; "
    f"batches of {options.batch_size} in {count}, where "
    f"{loader.fill:.0%} of the computed positions hold tokens"
  )
  if progress.detailed:
    about += "; shapes " + ", ".join(
      f"R{s.rows} T{s.length} S{s.scored} P{s.per_row} E{s.tile}"
      for s in loader.shapes
    )
  if steps is not None and options.batch_size > size:
    about += (
      f"; data.batch_size = {options.batch_size} is more than the {size} "
      "examples of an epoch, so a batch holds some of them more than once"
    )
  if notes:
    about += "; " + ", ".join(notes)
  if len(weights) > 1:
    named = enumerate(part for _, part in sources.parse(spec, field))
    about += "; " + ", ".join(f"source{k} is {part}" for k, part in named)
  if cached is not None:
    about += f"; tokens in {cached}"
  return loader, about


def in_batches(setup, examples, row_multiple, steps=None, weights=None):
  """The Loader of examples: one pass in order, or `steps` shuffled batches."""
  options = setup.data
  return loader_lib.Loader(
    examples,
    rows.Layout(
      options.packed, options.shared, row_multiple, options.max_row_length
    ),
    batch_size=options.batch_size,
    seed=None if steps is None else options.seed,
    budget=options.max_shapes,
    multiple=options.shape_multiple,
    steps=steps,
    windows=setup.model.config.windows,
    weights=weights,
  )


@contextlib.contextmanager
def opened(feed, start, total):
  """Yields (number, state) -> (batch, Stats), for start … total − 1 in turn."""
  if not feed.ahead:
    yield feed.batch
    return
  batches = loader_lib.prefetch(
    lambda number: feed.batch(number, None), range(start, total), feed.ahead
  )
  with contextlib.closing(batches):
    yield lambda number, state: next(batches)
