"""Forward passes over whole data sets: log-probs of any parameters, KL."""

import dataclasses

import jax
import numpy as np
from etils import epath

from dpo_jax import assembly
from dpo_jax.algos import base
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import reference, rows
from dpo_jax.ops import logprobs
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.train import log
from dpo_jax.train import state as state_lib


def loader_of(setup, examples):
  """A Loader of one pass over examples, in their order."""
  data = setup.config.data
  return loader_lib.Loader(
    examples,
    rows.Layout(
      data.packed,
      data.shared,
      mesh_lib.row_parallelism(setup.mesh),
      data.max_row_length,
    ),
    batch_size=data.batch_size,
    seed=None,
    budget=data.max_shapes,
    multiple=data.shape_multiple,
    windows=setup.model.config.windows,
  )


def token_logps(setup, params, loader):
  """Yields (example index, f32[scored tokens of it] in nats), once each.

  Args:
    setup: assembly.Setup.
    params: placed parameters of its model.
    loader: an in-order Loader.
  """
  apply, chunk = setup.model.apply, setup.config.head_chunk

  def logps(params, batch):
    return base.token_logps(apply, params, batch, chunk)

  for values in _over(setup, "token logps", logps, loader, params):
    yield values[0], values[1]


def token_kl(setup, params, ref, loader):
  """What a policy and its reference say about the scored tokens.

      kl_t = Σ_v π(v | …) [log π(v | …) − log π_ref(v | …)]

  Summed over a completion that was sampled from π this is an unbiased estimate
  of the sequence KL(π ‖ π_ref) with less variance than the plain log-ratio.
  Source: arXiv:2305.18290 footnote 3.

  Args: as `token_logps`, with two sets of parameters.
  Yields: (example index, kl, policy logps, ref logps), f32[scored tokens] each.
  """
  apply, chunk = setup.model.apply, setup.config.head_chunk

  def values(params, ref, batch):
    kl = logprobs.token_kl(
      *apply(params, batch),
      *apply(ref, batch),
      batch["source_index"],
      base.scored_mask(batch),
      chunk=chunk,
    )
    policy = base.token_logps(apply, params, batch, chunk)
    return kl, policy, base.token_logps(apply, ref, batch, chunk)

  yield from _over(setup, "token kl", values, loader, params, ref)


def _over(setup, name, fn, loader, *trees):
  """Yields (example index, values…) of fn(*trees, batch) over a loader."""
  compiled = setup.once(name, lambda: run_lib.forward(fn, setup.mesh))
  for number in range(loader.steps):
    batch, _ = assembly.place_batch(setup._replace(mode="jit"), loader, number)
    out = jax.tree.leaves(compiled(*trees, batch))
    columns = [dict(loader.unpack(number, np.asarray(x))) for x in out]
    for index in columns[0]:
      yield index, *(column[index] for column in columns)


def attach_reference(setup, params, loader, workdir):
  """Gives a loader's examples the log-probs of the reference.

  Taken from the store where they are, else computed and stored.

  Args:
    setup: assembly.Setup.
    params: of the reference.
    loader: Loader, for training or of one pass.
    workdir: run folder, which holds the store unless config.ref_store says
      where it is.
  """
  if loader.has_reference:
    return
  if jax.process_count() > 1:
    raise ValueError("ref = 'cached' runs in one process; set ref = 'frozen'")
  folder = setup.config.ref_store or epath.Path(workdir) / "ref_logps"
  in_order = loader.in_order()
  parts = {
    "data": loader.fingerprint,
    "params": state_lib.fingerprint(params),
    "model": dataclasses.asdict(setup.model.config),
    "vocab_size": setup.model.vocab_size,
    "precision": setup.config.precision,
  }
  values = reference.load(folder, parts, in_order.counts)
  if values is None:
    found = dict(
      log.progress(
        token_logps(setup, params, in_order),
        in_order.size,
        "reference log-probs",
        loud=jax.process_index() == 0,
      )
    )
    values = [found[i] for i in range(in_order.size)]
    if jax.process_index() == 0:
      reference.save(folder, parts, values)
  loader.set_reference(values)
