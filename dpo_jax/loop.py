"""The run as one page: build, restore, step, evaluate, save."""

import contextlib
import functools
import itertools
import json
from typing import NamedTuple

import jax
from etils import epath

from dpo_jax import assembly, scoring, tree, weights
from dpo_jax.data import loader as loader_lib
from dpo_jax.eval import preference
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.train import (
  checkpoint,
  health,
  invariants,
  log,
  settings,
  trackers,
)
from dpo_jax.train import state as state_lib


class Result(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: the last TrainState.
    evaluation: metrics of the last evaluation, or None.
    exit_code: 0, or the code of the signal that stopped it.
  """

  state: state_lib.TrainState
  evaluation: dict | None
  exit_code: int


def fit(config, workdir, run=None):
  """Trains as `config` says, resuming what `workdir` holds.

  Args:
    config: locked ConfigDict with the fields of configs/base.py.
    workdir: run folder; gets config.json, metrics.jsonl and checkpoints/.
    run: assembly.Run of this config, where it is already built.
  Returns: Result.
  Raises: ValueError for what the user can mend, before anything is written
    over; FloatingPointError when train.max_skipped updates in a row were not
    finite.
  """
  assembly.check(config)
  first = jax.process_index() == 0
  lock = health.lock(workdir) if first else contextlib.nullcontext()
  with lock, health.stop_on_signal() as stop:
    run = assembly.prepare(config) if run is None else run
    run, state = _start(run, workdir, stop)
    keep = config.checkpoint.keep
    with checkpoint.Checkpointer(workdir, keep=keep) as checkpoints:
      restored = checkpoints.restore(state, run.identity)
      state = state if restored is None else restored
      return _train(run, state, checkpoints, workdir, stop)


def _start(run, workdir, stop):
  """(Run with its reference, TrainState at step 0)."""
  setup, config = run.setup, run.setup.config
  params = weights.initial(setup)
  if config.ref == "cached":
    scoring.attach_reference(setup, params, run.loader, workdir, stop)
    if config.data.eval is not None:
      held_out, _ = assembly.held_out_loader(setup)
      scoring.attach_reference(setup, params, held_out, workdir, stop)
  if config.ref != "none" or config.lora is not None:
    reference = {"reference": state_lib.fingerprint(params)}
    run = run._replace(identity=run.identity | reference)
  return run, assembly.initial_state(run, params)


def _train(run, state, checkpoints, workdir, stop):
  setup, config = run.setup, run.setup.config
  start, total = int(state.step), run.total
  if start > total:
    raise ValueError(
      f"{workdir} is at step {start} already, and the config asks for {total}; "
      "raise train.steps or train.epochs, or use a new --workdir"
    )
  first = jax.process_index() == 0
  logger = log.Logger(
    workdir,
    every=config.log.every,
    total=total,
    start=start,
    loud=first,
    trackers=trackers.make(config, workdir, start) if first else (),
  )
  if first:
    resolved = json.dumps(config.to_dict(), indent=2) + "\n"
    (epath.Path(workdir) / "config.json").write_text(resolved)
  fields = settings.flatten(config.loss.to_dict())
  named = "".join(f", {k} {v}" for k, v in fields.items() if k != "name")
  logger.say(f"loss {config.loss.name}{named}; reference {config.ref}")
  logger.say(run.about)
  sizes = mesh_lib.sizes(setup.mesh)
  of = f" on {tree.size(state.frozen):,} frozen" if config.lora else ""
  logger.say(
    f"{tree.size(state.params):,} parameters{of} on {setup.mesh.devices.size} "
    f"{jax.devices()[0].platform} device(s), mesh {sizes}, {setup.mode}; "
    f"steps {start} to {total}"
  )
  logger.status("compiling the first step …")
  step = assembly.train_step(run, state)
  evaluate = _evaluator(run, logger)
  evaluation, number = None, start

  def check(logged):
    if logged and logged["skipped"] >= config.train.max_skipped:
      raise FloatingPointError(
        f"{logged['skipped']:.0f} updates in a row were not finite; the last "
        f"checkpoint is kept in {workdir}"
      )

  batches = loader_lib.prefetch(
    functools.partial(assembly.place_batch, setup, run.loader),
    range(start, total),
  )
  with contextlib.closing(batches), contextlib.closing(logger):
    for number, (batch, stats) in zip(itertools.count(start + 1), batches):
      state, metrics = step(state, batch, run.hparams)
      check(
        logger.step(number, metrics, stats, assembly.step_flops(run, stats))
      )
      if number == 1 and "rewards/largest" in metrics:
        bounds = functools.partial(run.algorithm.at_reference, run.hparams)
        limit = config.train.max_noise
        logger.say(invariants.first_step(metrics, bounds, limit))
      last = number == total or bool(stop)
      if evaluate and (number % config.eval.every == 0 or number == total):
        check(logger.flush())
        with logger.paused():
          evaluation = evaluate(state)
        logger.evaluation(number, evaluation)
      if number % config.checkpoint.every == 0 or last:
        check(logger.flush())
        with logger.paused():
          for params in state.frozen.values():
            invariants.reference_is(params, run.identity["reference"])
          checkpoints.save(state, run.identity, wait=last)
      if last:
        break
  if number < total:
    logger.say(
      f"stopped at step {number} of {total}, saved; the same command resumes"
    )
    return Result(state, evaluation, stop.exit_code)
  logger.say(f"done: {total} steps in {workdir}")
  return Result(state, evaluation, 0)


def _evaluator(run, logger):
  """Function state -> metrics on data.eval, or None without it."""
  setup = run.setup
  if setup.config.data.eval is None:
    return None
  logger.say(f"eval {assembly.held_out_loader(setup)[1]}")
  of = "policy" if setup.config.lora is None else "adapter"
  return lambda state: preference.evaluate(
    setup, run.algorithm, state, run.hparams, of
  )
