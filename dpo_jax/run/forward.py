"""Forward passes over whole data sets: log-probs of any parameters, KL."""

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax import progress, store
from dpo_jax.algos import base, reward
from dpo_jax.models import config as model_config
from dpo_jax.ops import distributions
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import feed, reference
from dpo_jax.train import health
from dpo_jax.train import state as state_lib


def loader_of(setup, examples):
  """A Loader of one pass over examples, in their order."""
  ways = mesh_lib.row_parallelism(setup.mesh)
  return feed.in_batches(setup, examples, ways)


def token_logps(setup, params, loader, numbers=None):
  """Yields (example index, f32[scored tokens of it] in nats), once each.

  Args:
    params: placed, of the model of `setup`.
    loader: an in-order Loader.
    numbers: of the batches to go over; None is all of them.
  """
  compiled = setup.programs.token_logps
  return _over(setup, compiled, loader, (params,), numbers)


def kl(apply, params, ref, batch):
  """(token KL, policy logps, ref logps), f32[R, S] each, see `token_kl`."""
  outputs, ref_outputs = apply(params, batch), apply(ref, batch)
  where = batch["source_index"], base.scored_mask(batch)
  per_token = distributions.token_kl(*outputs, *ref_outputs, *where)
  both = (base.head_logps(each, batch) for each in (outputs, ref_outputs))
  return per_token, *both


def token_kl(setup, params, ref, loader):
  """What a policy and its reference say about the scored tokens.

      kl_t = Σ_v π(v | …) [log π(v | …) − log π_ref(v | …)]

  Summed over a completion that was sampled from π this is an unbiased estimate
  of the sequence KL(π ‖ π_ref) with less variance than the plain log-ratio.
  Source: arXiv:2305.18290 footnote 3.

  Args: as `token_logps`, with two sets of parameters.
  Yields: (example index, kl, policy logps, ref logps), f32[scored tokens] each.
  """
  return _over(setup, setup.programs.token_kl, loader, (params, ref))


def of_examples(setup, compiled, loader, trees):
  """{name: list of f32[scored tokens], by example} of a whole in-order pass.

  Args: as `_over`; `compiled` returns {name: f32[R, S]}.
  """
  columns = {}
  for number in range(loader.steps):
    batch, _ = feed.place(loader, number, setup.mesh, "jit")
    for name, values in compiled(*trees, batch).items():
      by_example = columns.setdefault(name, [None] * loader.size)
      for index, value in loader.unpack(number, np.asarray(values)):
        by_example[index] = value
  return columns


def of_completions(setup, compiled, loader):
  """List of f32[completions], by example, of a whole in-order pass.

  Args: as `_over`; `compiled` is batch -> f32[R, P, C].
  """
  out = [None] * loader.size
  for index, values in _over(
    setup, compiled, loader, (), unpack=loader.unpack_completions
  ):
    out[index] = values
  return out


def of_slots(apply, params, batch):
  """Rewards f32[R, P, C] of all completions, see algos.reward.rewards."""
  shape = batch["completion_weights"].shape
  return reward.rewards(apply, params, batch).reshape(shape)


def rewards(setup, params, loader, numbers=None):
  """Yields (example index, f32[completions of it]) of a reward model.

  Args: as `token_logps`; params are of the Trained's `policy`: of the model and
    of its reward head.
  """
  unpack = loader.unpack_completions
  args = setup, setup.programs.rewards, loader, (params,), numbers
  return _over(*args, unpack=unpack)


def _over(setup, compiled, loader, trees, numbers=None, unpack=None):
  """Yields (example index, values…) of compiled(*trees, batch) over batches."""
  unpack = loader.unpack if unpack is None else unpack
  for number in range(loader.steps) if numbers is None else numbers:
    batch, _ = feed.place(loader, number, setup.mesh, "jit")
    out = jax.tree.leaves(compiled(*trees, batch))
    columns = [dict(unpack(number, np.asarray(x))) for x in out]
    for index in columns[0]:
      yield index, *(column[index] for column in columns)


def attach_reference(setup, params, loader, folder, stop=None):
  """Gives a loader's examples the log-probs of the reference.

  Taken from the store as far as they are there; the rest is computed and
  stored, block by block, so that what is interrupted goes on where it was.
  All processes call this together; each writes a share of the blocks.

  Args:
    params: of the reference.
    loader: Loader, for training or of one pass.
    folder: of the store; all processes see the same one.
    stop: health.Stop, or None.
  Raises: ValueError if the folder of the entry holds something else;
    health.Stopped after a signal, in a single process.
  """
  if loader.has_reference:
    return
  in_order = loader.in_order()
  entry = reference.entry(
    folder, _made_of(setup, params, in_order), in_order.counts
  )
  described, first = reference.check(entry), jax.process_index() == 0
  if first and not described:
    store.describe(entry.path, entry.about)
  # What one process sees decides for all: they must compute the same batches.
  stored = _shared(reference.find(entry) if first else {}, len(entry.blocks))
  if len(stored) < len(entry.blocks):
    written = _compute(setup, params, in_order, entry, stored, stop)
    stored |= _shared(written, len(entry.blocks))
  loader.set_reference(reference.load(entry, stored))


def _made_of(setup, params, loader):
  """What determines reference log-probs up to rounding, as plain values.

  Nothing of the loss, of what is compared, of the order or of the layout of
  batches; of a model not what only says how it is computed.
  """
  how = set(model_config.RUNTIME) - {"dtype"}
  fields = dataclasses.asdict(setup.model.config).items()
  return {
    "data": loader.token_fingerprint,
    "params": state_lib.fingerprint(params),
    "model": {name: value for name, value in fields if name not in how},
    "vocab_size": setup.model.vocab_size,
    "precision": setup.precision,
  }


def _compute(setup, params, loader, entry, stored, stop):
  """Computes the blocks that were not stored, and writes this process's share.

  Args: as for `attach_reference`, and
    loader: in-order Loader of all examples, not of the missing ones: so the
      batches are those of a run that was not interrupted, to the bit.
    stored: blocks of the reference.Entry that are there.
  Returns: {number: checksum} of the blocks that this process wrote.
  """
  per_block = len(entry.blocks[0])
  missing = [n for n in range(len(entry.blocks)) if n not in stored]
  numbers = [
    n
    for n in range(loader.steps)
    if np.isin(loader.indices(n) // per_block, missing).any()
  ]
  # Every process, whether it writes or not: one on a network file system may
  # remember for a while that the folder was not there.
  entry.path.mkdir(parents=True, exist_ok=True)
  mine = missing[jax.process_index() :: jax.process_count()]
  waiting, written = {n: {} for n in mine}, {}
  for index, values in progress.over(
    token_logps(setup, params, loader, numbers),
    sum(len(loader.indices(n)) for n in numbers),
    "reference log-probs" + (" still missing" if stored else ""),
    unit="examples",
    loud=jax.process_index() == 0,
  ):
    if stop and jax.process_count() == 1:
      raise health.Stopped(stop.exit_code)
    number = index // per_block
    if number not in waiting:
      continue
    waiting[number][index] = values
    if len(waiting[number]) == len(entry.blocks[number]):
      block = waiting.pop(number)
      ordered = [block[i] for i in entry.blocks[number]]
      written[number] = reference.write(entry, number, ordered)
  assert not waiting, "a pass has every example"
  return written


def _shared(checksums, blocks):
  """The {block: checksum} of all processes together, in each of them.

  Also waits for all processes.
  """
  table = np.zeros((2, blocks), np.uint32)
  for number, checksum in checksums.items():
    table[:, number] = 1, checksum
  # [processes, 2, blocks]; a block is in the table of one process at most.
  known, sums = multihost_utils.process_allgather(table).max(axis=0)
  return {int(n): int(sums[n]) for n in np.flatnonzero(known)}
