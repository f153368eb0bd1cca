"""The run as one page: build, restore, step, evaluate, save."""

import contextlib

import jax
from etils import epath

from dpo_jax.parallel import processes
from dpo_jax.run import build, feed, forward, recorder, trained
from dpo_jax.train import checkpoint, health
from dpo_jax.train import state as state_lib


def fit(config, workdir, run=None):
  """Trains as `config` says, resuming what `workdir` holds.

  Args:
    config: locked ConfigDict with the fields of configs/base.py.
    workdir: run folder; gets config.json, metrics.jsonl and checkpoints/.
    run: base.Run of this config, where it is already built.
  Returns: recorder.Result.
  Raises: ValueError for what the user can mend, before anything is written
    over; FloatingPointError when train.max_skipped updates in a row were not
    finite.
  """
  # ── Build ──────────────────────────────────────────────────────────────────
  # Mistakes first: nothing is locked, loaded or written for a config that no
  # run can have, and a signal leaves the folder as it is.
  build.check(config)
  with held([workdir]) as stop:
    with stop.at_once():
      run = build.prepare(config) if run is None else run
    result = fit_run(run, workdir, stop)
  if result.failure is not None:
    raise result.failure
  return result


def fit_run(run, workdir, stop):
  """The recorder.Result of a run that is built, in a folder that is held."""
  with contextlib.ExitStack() as opened:
    # ── Restore ──────────────────────────────────────────────────────────────
    # The state at step 0 is made in any case: it has the shapes, the shardings
    # and the frozen part of what is restored, which a checkpoint never holds.
    run, state, checkpoints = restore(run, workdir, stop, opened)
    start = within(int(state.step), run.total, workdir)
    record = recorder.Recorder(run, workdir, checkpoints, start)
    result = train(run, run.step, run.hparams, state, record, start, stop)
    finish(run, result)
    return result


def finish(run, result):
  """What is left to do of a run that is at its last step."""
  steps = int(result.state.step)
  if run.finish and steps == run.total and result.failure is None:
    state = result.state
    run.finish(state.params, state.frozen, steps, result.workdir)


def train(run, step, hparams, state, record, start, stop):
  """Steps from `start` to the end, or until a signal.

  Args:
    run: base.Run.
    step: (state, batch, hparams) -> (state, metrics); donates its state.
    hparams: traced scalars.
    state: TrainState. With `step` and `hparams` it may be that of several runs.
    record: recorder.Recorder, or together.Recorders of several runs.
    start: steps done.
    stop: health.Stop.
  Returns: what record.end does.
  """
  record.describe(state, start)
  with contextlib.ExitStack() as closing:
    closing.enter_context(contextlib.closing(record))
    traced = closing.enter_context(contextlib.closing(record.trace(start)))
    batch_of = closing.enter_context(feed.opened(run.feed, start, run.total))
    number, saved, leaving = start, start, start == run.total
    while not leaving:
      # ── Step ───────────────────────────────────────────────────────────────
      # The feed may look at the state: a loader does not, and has its batches
      # ready; a rollout samples with the policy as it is now.
      batch, stats = batch_of(number, state)
      number += 1
      traced.before(number)
      state, metrics = step(state, batch, hparams)
      record.step(number, metrics, stats)
      traced.after(number, state)

      # ── Evaluate and save ──────────────────────────────────────────────────
      # Only where the feed can start again: what is drawn between boundaries is
      # in memory alone, so a checkpoint there would lose it. A signal is
      # therefore obeyed at the next one (a loader has one at every step), where
      # all processes ask whether any has one; a run that failed saves nothing
      # and leaves at once.
      last = number == run.total
      boundary = run.feed.boundary(number)
      stopping = boundary and stop.agreed(number, last=last)
      leaving = last or stopping or record.failed
      evaluates = run.held_out is not None and (
        last or number % run.rhythm.evaluate == 0
      )
      due = number // run.rhythm.save > saved // run.rhythm.save
      saves = leaving or (boundary and due)
      if evaluates or saves:
        record.pause(
          number, state, evaluates=evaluates, saves=saves, last=leaving
        )
        saved = number if saves else saved
    return record.end(number, state, stop)


def restore(run, workdir, stop, opened):
  """A run as its folder has it, or as it begins.

  Args:
    run: base.Run.
    workdir: run folder.
    stop: health.Stop, or None.
    opened: ExitStack that waits for the last save.
  Returns: (the Run that knows its reference, TrainState, Checkpointer).
  """
  run, state = begin(run, workdir, stop)
  checkpoints = opened.enter_context(
    checkpoint.Checkpointer(workdir, keep=run.rhythm.keep)
  )
  saved = checkpoints.restore(state, run.identity)
  return run, state if saved is None else saved, checkpoints


def begin(run, workdir, stop=None):
  """(The Run that knows its reference, TrainState at step 0).

  Args:
    run: base.Run.
    workdir: gets the reference's log-probs, if they are cached.
    stop: health.Stop; a signal ends that pass, and what it has is kept.
  """
  initial = trained.initial(run.setup)
  if run.reference.cached:
    store = run.reference.store or epath.Path(workdir) / "ref_logps"
    loaders = [run.feed.loader]
    if run.held_out is not None:
      loaders.append(run.held_out.loader()[0])
    for loader in loaders:
      forward.attach_reference(run.setup, initial, loader, store, stop)
  if run.reference.kept:
    reference = {"reference": state_lib.fingerprint(initial)}
    run = run._replace(identity=run.identity | reference)
  return run, build.initial_state(run, initial)


@contextlib.contextmanager
def held(workdirs):
  """Holds run folders for this process and those with it.

  Yields the health.Stop. Of several processes the first holds the folders, and
  what it is refused the others are too: they would wait for it.
  """
  with contextlib.ExitStack() as locks:
    refused = None
    if jax.process_index() == 0:
      try:
        for workdir in workdirs:
          locks.enter_context(health.lock(workdir))
      except BaseException as error:  # said once the others know of it
        refused = error
    if processes.largest(refused is not None):
      raise refused or ValueError(
        f"the first process cannot hold --workdir {workdirs[0]}: see there"
      )
    yield locks.enter_context(health.stop_on_signal())


def within(step, total, workdir):
  """`step`; ValueError if it is beyond the last."""
  if step > total:
    raise ValueError(
      f"{workdir} is at step {step} already, and the config asks for "
      f"{total}; raise train.steps or train.epochs, or use a new --workdir"
    )
  return step
