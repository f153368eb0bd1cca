"""The run as one page: build, restore, step, evaluate, save."""

import contextlib
import functools
import itertools
import json
from typing import NamedTuple

import jax
from etils import epath

from dpo_jax import assembly, tree
from dpo_jax.data import loader as loader_lib
from dpo_jax.eval import preference
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.train import checkpoint, health, log
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


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


def fit(config, workdir):
  """Trains as `config` says, resuming what `workdir` holds.

  Args:
    config: locked ConfigDict with the fields of configs/base.py.
    workdir: run folder; gets config.json, metrics.jsonl and checkpoints/.
  Returns: Result.
  Raises: ValueError for what the user can mend, before anything is written
    over; FloatingPointError when train.max_skipped updates in a row were not
    finite.
  """
  first = jax.process_index() == 0
  lock = health.lock(workdir) if first else contextlib.nullcontext()
  with lock, health.stop_on_signal() as stop:
    run = assembly.prepare(config)
    state = assembly.initial_state(run)
    keep = config.checkpoint.keep
    with checkpoint.Checkpointer(workdir, keep=keep) as checkpoints:
      restored = checkpoints.restore(state, run.identity)
      state = state if restored is None else restored
      return _train(run, state, checkpoints, workdir, stop)


def _train(run, state, checkpoints, workdir, stop):
  config, start, total = run.config, int(state.step), run.total
  logger = log.Logger(
    workdir,
    every=config.log.every,
    total=total,
    start=start,
    loud=jax.process_index() == 0,
  )
  if jax.process_index() == 0:
    resolved = json.dumps(config.to_dict(), indent=2) + "\n"
    (epath.Path(workdir) / "config.json").write_text(resolved)
  logger.say(run.about)
  logger.say(
    f"{tree.size(state.params):,} parameters on {run.mesh.devices.size} "
    f"{jax.devices()[0].platform} device(s), mesh {mesh_lib.sizes(run.mesh)}, "
    f"{run.mode}; steps {start} to {total}"
  )
  logger.status("compiling the first step …")
  step = assembly.compile_step(run, state)
  evaluate = _evaluator(run, logger)
  evaluation, number = None, start

  def check(logged):
    if logged and logged["skipped"] >= config.train.max_skipped:
      raise FloatingPointError(
        f"{logged['skipped']:.0f} updates in a row were not finite; the last "
        f"checkpoint is kept in {workdir}"
      )

  batches = loader_lib.prefetch(
    functools.partial(assembly.place_batch, run, run.loader),
    range(start, total),
  )
  with contextlib.closing(batches):
    for number, (batch, stats) in zip(itertools.count(start + 1), batches):
      state, metrics = step(state, batch, run.hparams)
      check(
        logger.step(number, metrics, stats, assembly.step_flops(run, stats))
      )
      last = number == total or bool(stop)
      if evaluate and (number % config.eval.every == 0 or number == total):
        check(logger.flush())
        with logger.paused():
          evaluation = evaluate(state)
        logger.evaluation(number, evaluation)
      if number % config.checkpoint.every == 0 or last:
        check(logger.flush())
        with logger.paused():
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
  if run.config.data.eval is None:
    return None
  loader, about = assembly.build_loader(
    run.config,
    run.tokenizer,
    run.config.data.eval,
    training=False,
    row_multiple=mesh_lib.row_parallelism(run.mesh),
  )
  logger.say(f"eval {about}")
  sums = run_lib.evaluator(
    step_lib.sums(run.algorithm, axis_name=run_lib.axis_name(run.mode)),
    run.mesh,
    run.mode,
  )

  def evaluate(state):
    batches = (
      assembly.place_batch(run, loader, n)[0] for n in range(loader.steps)
    )
    return preference.evaluate(sums, state, run.hparams, batches)

  return evaluate
