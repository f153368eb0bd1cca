"""What a run leaves in its folder while it trains."""

import collections
import contextlib
import functools
import json
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dpo_jax import lines, store, tree
from dpo_jax.data.read import files
from dpo_jax.models import config as model_config
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import held_out
from dpo_jax.train import guard, health, log, profile, trackers
from dpo_jax.train import state as state_lib


class Result(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: the last TrainState.
    evaluation: metrics of the last evaluation, or None.
    exit_code: 0, the code of the signal that stopped it, or 1 if its last step
      could not be saved.
    failure: FloatingPointError that ended it, or None.
    workdir: its folder.
  """

  state: state_lib.TrainState
  evaluation: dict | None
  exit_code: int
  failure: FloatingPointError | None
  workdir: epath.Path

  @property
  def history(self):
    """What the folder's metrics.jsonl holds, see `history`."""
    return history(self.workdir)

  def __repr__(self):
    last = {row["kind"]: row for row in self.history}
    parts = []
    if "train" in last:
      row = last["train"]
      parts.append(f"step {row['step']}, {_shown(row)}")
    if "eval" in last:  # of a start before this one too
      parts.append(f"held out {_shown(last['eval'])}")
    return f"<{'; '.join([f'run {self.workdir}', *parts])}>"


def history(workdir):
  """The rows of a run folder's metrics.jsonl, a dict each; [] without one.

  "kind" is "train" for a training step and "eval" for the means of data.eval
  after it, "step" counts updates, the rest are metrics by their names. None is
  what was not finite. `pandas.DataFrame` takes the list as it is.
  """
  path = epath.Path(workdir) / "metrics.jsonl"
  rows = [row for _, row in files.jsonl(path)] if lines.exists(path) else []
  # A line that is none of a logger was cut short by a kill.
  return [r for r in rows if isinstance(r, dict) and {"step", "kind"} <= {*r}]


def _shown(metrics):
  """`loss 0.6123, accuracy 0.75` of metrics, as far as they are there."""
  names = {"loss": "loss", "rewards/accuracies": "accuracy"}
  values = {name: metrics.get(key) for key, name in names.items()}
  return ", ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)


class Recorder:
  """Logs, evaluates and saves one run, until it fails."""

  def __init__(self, run, workdir, checkpoints, start, *, name=""):
    """Args:
    run: base.Run, with what it must share to be resumed.
    workdir: run folder; gets config.json and metrics.jsonl.
    checkpoints: checkpoint.Checkpointer of it.
    start: step that it starts from.
    name: what tells its lines on the console from others', or "".
    """
    first, asked = jax.process_index() == 0, run.setup.asked
    followed = ()
    if first:
      followed = trackers.make(run.rhythm.reports, asked, workdir, start)
    self._run, self._workdir, self._checkpoints = run, workdir, checkpoints
    self._evaluation = self._failure = None
    self._unread = collections.deque()  # (number, metrics) of the last steps
    self._described = not first  # whether config.json is there
    self._unsaved = False  # whether the last step could not be saved
    self._name = name
    self._raised, self._alarmed = set(), set()  # last time, and so far
    before = history(workdir) if first and start else []
    steps = (row for row in before if row["kind"] == "train")
    self._first = next(steps, None)
    self._logger = log.Logger(
      workdir,
      every=run.rhythm.log,
      total=run.total,
      start=start,
      loud=first,
      name=name,
      trackers=followed,
    )
    self._write_config()
    self._logger.say(f"{name}{run.about[0]}")

  @property
  def failed(self):
    """Whether train.max_skipped updates in a row were not finite.

    A run that failed gets nothing more.
    """
    return self._failure is not None

  def _write_config(self):
    """Writes config.json unless it is there; a full disk ends no run."""
    if self._described:
      return
    path = epath.Path(self._workdir) / "config.json"
    text = json.dumps(self._run.setup.asked, indent=2) + "\n"
    try:
      store.write(path, text.encode())
      self._described = True
    except OSError as error:
      reason = error.strerror or error
      self._logger.say(
        f"{path} cannot be written ({reason}); tried again later"
      )

  def describe(self, state, start, count=1):
    """Says what is trained on what; `count` runs are, in one program."""
    run, setup, say = self._run, self._run.setup, self._logger.say
    say(run.about[1])
    frozen = f" on {tree.size(state.frozen):,} frozen"
    of = frozen if setup.trained.on_base else ""
    times = f"{count} × " if count > 1 else ""
    size, sizes = tree.size(state.params) // count, mesh_lib.sizes(setup.mesh)
    say(
      f"{times}{size:,} parameters{of} on {setup.mesh.devices.size} "
      f"{jax.devices()[0].platform} device(s), mesh {sizes}, {setup.mode}; "
      f"steps {start} to {run.total}"
    )
    if run.held_out is not None:
      say(f"eval {run.held_out.loader()[1]}")
    self._logger.status("compiling the first step …")

  def trace(self, start):
    """The profile.Profile of this run."""
    wanted, say = self._run.rhythm.reports.profile, self._logger.say
    steps = start, self._run.total
    return profile.Profile(self._workdir, *steps, say, wanted=wanted)

  def step(self, number, metrics, stats):
    """Takes the metrics of step `number`, counted from 1."""
    if self.failed:
      return
    run = self._run
    if number == 1 and "rewards/largest" in metrics:
      first = run.algorithm.first
      bounds = first and functools.partial(first, run.hparams)
      line = health.first_step(metrics, bounds, run.rhythm.max_noise)
      self._logger.say(f"{self._name}{line}")
    flops = step_flops(run, stats)
    self._check(self._logger.step(number, metrics, stats, flops))
    self._unread.append((number, metrics))
    self._judge(run_lib.AHEAD)

  @contextlib.contextmanager
  def paused(self):
    """What happens inside does not count as training time."""
    if not self.failed:
      self._check(self._logger.flush())
      self._judge(0)
    with self._logger.paused():
      yield

  def pause(self, number, state, *, evaluates, saves, last):
    """Evaluates and saves as `at`, outside of the training time."""
    with self.paused():
      self.at(number, state, evaluates=evaluates, saves=saves, last=last)

  def at(self, number, state, *, evaluates, saves, last):
    """Evaluates and saves after step `number`; waits for what is `last`."""
    run = self._run
    if evaluates and not self.failed:
      self._evaluation = held_out.evaluate(run.setup, run.held_out, state)
      self._logger.evaluation(number, self._evaluation)
    if saves and not self.failed:
      # Once the reference has proved to be what it was.
      for params in state.frozen.values():
        health.reference_is(params, run.identity["reference"])
      saved = self._checkpoints.save(state, run.identity, wait=last)
      self._unsaved = last and not saved
      self._write_config()

  def end(self, number, state, stop):
    """The Result after step `number`; says how the run ended."""
    line = f"done: {number} steps in {self._workdir}"
    if stop and number < self._run.total:
      of = f"{number} of {self._run.total}"
      line = f"stopped at step {of}, saved; the same command resumes"
    code = stop.exit_code if stop else 0  # a sweep must not go on to others
    if self._unsaved:
      saved = self._checkpoints.steps()
      kept = f"step {saved[0]} is kept" if saved else "nothing is"
      line = (
        f"step {number} could not be saved in {self._workdir}, {kept}; make "
        "room, and the same command goes on"
      )
      code = 1
    for lost in self._not_written():
      self._logger.say(f"{self._name}NOT WRITTEN: {lost}")
    if not self.failed:
      refused = guard.told(state.skipped)
      line += f"; {refused}" if refused else ""
      self._logger.say(f"{self._name}{line}")
    workdir = epath.Path(self._workdir)
    return Result(state, self._evaluation, code, self._failure, workdir)

  def _not_written(self):
    """What the disk did not take, a line each."""
    lines, saves = self._logger.unwritten, self._checkpoints.lost
    if lines:
      yield f"{lines} line{'s' * (lines > 1)} of metrics.jsonl"
    if saves:
      yield f"{saves} checkpoint{'s' * (saves > 1)}, each when it was due"
    if not self._described:
      yield "config.json"

  def close(self):
    """Waits until the trackers have written all."""
    self._logger.close()

  def _check(self, logged):
    if not logged:
      return
    self._first = self._first or logged
    alarms = self._run.algorithm.alarms(self._first, logged)
    # Twice in a row: a minibatch is few samples.
    lasting = alarms.keys() & self._raised
    for name in sorted(lasting - self._alarmed):
      self._logger.say(f"{self._name}LOOK: {alarms[name]}")
    self._raised, self._alarmed = set(alarms), self._alarmed | lasting

  def _judge(self, unread):
    """Fails after train.max_skipped refused updates in a row.

    It reads every step but the last `unread`, which may not be done: which ones
    follows from the number of the step alone, so all processes fail at one.
    """
    limit = self._run.rhythm.max_skipped
    while len(self._unread) > unread and not self.failed:
      number, metrics = self._unread.popleft()
      row = int(np.asarray(metrics["skipped"]))
      if row < limit:
        continue
      saved = self._checkpoints.steps()
      kept = f"step {saved[0]} is kept" if saved else "nothing was saved yet"
      total = int(np.asarray(metrics["skipped/total"]))
      self._failure = FloatingPointError(
        f"{row} updates in a row were not finite, up to step {number} ({total} "
        f"of all {number}); {kept} in {self._workdir}. Lower "
        "optim.learning_rate in a new --workdir, or go on from there with a "
        f"train.max_skipped above {limit}"
      )


def step_flops(run, stats):
  """FLOPs that a step needs, see models.config.step_flops."""
  scored = stats.scored if run.algorithm.logps else 0
  model = run.setup.model
  return model_config.step_flops(
    *(model.config, model.vocab_size, (stats.tokens, scored, stats.visible)),
    on_base=run.setup.trained.on_base,
    reference=run.reference.in_step,
  )
