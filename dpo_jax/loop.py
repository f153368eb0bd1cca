"""The run as one page: build, restore, step, evaluate, save."""

import contextlib
import functools
import itertools
from typing import NamedTuple

import jax
from etils import epath

from dpo_jax.data.batch import loader as loader_lib
from dpo_jax.run import build, forward, recorder, together, trained
from dpo_jax.train import checkpoint, health
from dpo_jax.train import state as state_lib


class Result(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: the last TrainState.
    evaluation: metrics of the last evaluation, or None.
    exit_code: 0, or the code of the signal that stopped it.
    failure: FloatingPointError that ended it, or None.
  """

  state: state_lib.TrainState
  evaluation: dict | None
  exit_code: int
  failure: FloatingPointError | None


def fit(config, workdir, run=None):
  """Trains as `config` says, resuming what `workdir` holds.

  Args:
    config: locked ConfigDict with the fields of configs/base.py.
    workdir: run folder; gets config.json, metrics.jsonl and checkpoints/.
    run: build.Run of this config, where it is already built.
  Returns: Result.
  Raises: ValueError for what the user can mend, before anything is written
    over; FloatingPointError when train.max_skipped updates in a row were not
    finite.
  """
  build.check(config)
  with _held([workdir]) as stop:
    with stop.at_once():
      run = build.prepare(config) if run is None else run
    (result,) = _fit([run], [workdir], stop)
  if result.failure is not None:
    raise result.failure
  return result


def fit_together(runs, workdirs):
  """Trains the points of a group in one program, each into its own folder.

  Args:
    runs: list of Run, of together.beside.
    workdirs: a run folder for each, as `fit` leaves it; all at the same step.
  Returns: list of Result. A run whose updates are not finite fails alone.
  Raises: ValueError as `fit`, and if the folders are at different steps.
  """
  with _held(workdirs) as stop:
    return _fit(runs, workdirs, stop)


@contextlib.contextmanager
def _held(workdirs):
  """Holds run folders for this process; yields the health.Stop."""
  with contextlib.ExitStack() as held:
    if jax.process_index() == 0:
      for workdir in workdirs:
        held.enter_context(health.lock(workdir))
    yield held.enter_context(health.stop_on_signal())


def _fit(runs, workdirs, stop):
  """Results of one run, or of several in one program."""
  with contextlib.ExitStack() as opened:
    started, states, folders = [], [], []
    for run, workdir in zip(runs, workdirs, strict=True):
      run, state = _start(run, workdir, stop)
      keep = run.setup.config.checkpoint.keep
      folder = checkpoint.Checkpointer(workdir, keep=keep)
      restored = opened.enter_context(folder).restore(state, run.identity)
      started.append(run)
      states.append(state if restored is None else restored)
      folders.append(folder)
    start = _common_step(states, workdirs, runs[0].total)
    names = [f"{epath.Path(w).name}: " for w in workdirs]
    recorders = [
      recorder.Recorder(*each, start, name=name if len(runs) > 1 else "")
      for *each, name in zip(started, workdirs, folders, names, strict=True)
    ]
    del state, restored
    return _train(recorders, together.program(started, states), start, stop)


def _common_step(states, workdirs, total):
  """The step that all runs are at.

  Raises: ValueError if they are at different ones, or beyond the last.
  """
  steps = [int(state.step) for state in states]
  if len(set(steps)) > 1:
    at = zip(workdirs, steps, strict=True)
    raise ValueError(
      "runs that train together must be at the same step, but "
      + ", ".join(f"{workdir} is at {step}" for workdir, step in at)
      + "; train them one by one: --config.sweep.together=1"
    )
  if steps[0] > total:
    raise ValueError(
      f"{workdirs[0]} is at step {steps[0]} already, and the config asks for "
      f"{total}; raise train.steps or train.epochs, or use a new --workdir"
    )
  return steps[0]


def _start(run, workdir, stop):
  """(Run with its reference, TrainState at step 0)."""
  setup, config = run.setup, run.setup.config
  params = trained.initial(setup)
  if config.ref == "cached":
    forward.attach_reference(setup, params, run.loader, workdir, stop)
    if config.data.eval is not None:
      held_out, _ = build.held_out_loader(setup)
      forward.attach_reference(setup, params, held_out, workdir, stop)
  if config.ref != "none" or config.lora is not None:
    reference = {"reference": state_lib.fingerprint(params)}
    run = run._replace(identity=run.identity | reference)
  return run, build.initial_state(run, params)


def _train(recorders, program, start, stop):
  """Steps all runs at once; what each step brings goes to each run's folder."""
  lead, state, number = recorders[0].run, program.state, start
  config, total = lead.setup.config, lead.total
  recorders[0].describe(state, start, len(recorders))
  batches = loader_lib.prefetch(
    functools.partial(build.place_batch, lead.setup, lead.loader),
    range(start, total),
  )
  with contextlib.ExitStack() as closing:
    closing.enter_context(contextlib.closing(batches))
    for each in recorders:
      closing.enter_context(contextlib.closing(each.logger))
    traced = closing.enter_context(contextlib.closing(recorders[0].profile()))
    for number, (batch, stats) in zip(itertools.count(start + 1), batches):
      traced.before(number)
      state, metrics = program.step(state, batch, program.hparams)
      for each, found in zip(recorders, metrics, strict=True):
        each.step(number, found, stats)
      traced.after(number, state)
      last = number == total or bool(stop)
      evaluates = number % config.eval.every == 0 or number == total
      evaluates = evaluates and config.data.eval is not None
      saves = number % config.checkpoint.every == 0 or last
      if evaluates or saves:
        with _paused(recorders):
          for each, part in zip(recorders, program.parts(state), strict=True):
            if evaluates:
              each.evaluate(number, part)
            if saves:
              each.save(part, wait=last)
      if last or all(each.failure for each in recorders):
        break
  stopped = bool(stop) and number < total
  code = stop.exit_code if stop else 0  # a sweep must not go on to others
  results = []
  for each, part in zip(recorders, program.parts(state), strict=True):
    each.end(number, stopped)
    results.append(Result(part, each.evaluation, code, each.failure))
  return results


@contextlib.contextmanager
def _paused(recorders):
  """What happens inside does not count as training time of any."""
  for each in recorders:
    each.flush()
  with contextlib.ExitStack() as paused:
    for each in recorders:
      paused.enter_context(each.logger.paused())
    yield


def program(runs, workdir):
  """The together.Program of runs at step 0; nothing is trained or saved.

  Args:
    runs: of together.beside.
    workdir: gets the reference's log-probs, if they are cached.
  Returns: (Run of the first, Program).
  """
  started = [_start(run, workdir, stop=None) for run in runs]
  runs, states = map(list, zip(*started, strict=True))
  del started
  return runs[0], together.program(runs, states)
