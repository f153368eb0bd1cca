"""What a run leaves in its folder while it trains."""

import functools
import json

import jax
from etils import epath

from dpo_jax import tree
from dpo_jax.config import saved
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import build, held_out, invariants
from dpo_jax.train import log, profile, trackers


class Recorder:
  """Logs, evaluates and saves one run, until it fails.

  Attributes:
    run, workdir: Run and its folder.
    logger: log.Logger.
    evaluation: metrics of the last evaluation, or None.
    failure: FloatingPointError after train.max_skipped updates in a row that
      were not finite, or None. A run that failed gets nothing more.
  """

  def __init__(self, run, workdir, checkpoints, start, *, name):
    """Args:
    run: Run, with what it must share to be resumed.
    workdir: run folder; gets config.json and metrics.jsonl.
    checkpoints: checkpoint.Checkpointer of it.
    start: step that it starts from.
    name: what tells its lines on the console from others', or "".
    """
    config, first = run.setup.config, jax.process_index() == 0
    self.run, self.workdir, self._checkpoints = run, workdir, checkpoints
    self.evaluation = self.failure = None
    self._name, self._start = name, start
    self.logger = log.Logger(
      workdir,
      every=config.log.every,
      total=run.total,
      start=start,
      loud=first,
      name=name,
      trackers=trackers.make(config, workdir, start) if first else (),
    )
    if first:
      resolved = json.dumps(config.to_dict(), indent=2) + "\n"
      (epath.Path(workdir) / "config.json").write_text(resolved)
    fields = saved.flatten(config.loss.to_dict())
    named = "".join(f", {k} {v}" for k, v in fields.items() if k != "name")
    self.logger.say(
      f"{name}loss {config.loss.name}{named}; reference {config.ref}"
    )

  def describe(self, state, start, count):
    """Says what is trained on what; `count` runs are, in one program."""
    run, setup = self.run, self.run.setup
    say, config = self.logger.say, setup.config
    say(run.about)
    of = f" on {tree.size(state.frozen):,} frozen" if config.lora else ""
    times = f"{count} × " if count > 1 else ""
    size, sizes = tree.size(state.params) // count, mesh_lib.sizes(setup.mesh)
    say(
      f"{times}{size:,} parameters{of} on {setup.mesh.devices.size} "
      f"{jax.devices()[0].platform} device(s), mesh {sizes}, {setup.mode}; "
      f"steps {start} to {run.total}"
    )
    if config.data.eval is not None:
      say(f"eval {build.held_out_loader(setup)[1]}")
    self.logger.status("compiling the first step …")

  def profile(self):
    """The profile.Profile of this run."""
    return profile.Profile(
      self.workdir,
      self._start,
      self.run.total,
      self.logger.say,
      wanted=self.run.setup.config.log.profile,
    )

  def step(self, number, metrics, stats):
    """Takes the metrics of step `number`, counted from 1."""
    if self.failure:
      return
    run, flops = self.run, build.step_flops(self.run, stats)
    if number == 1 and "rewards/largest" in metrics:
      bounds = functools.partial(run.algorithm.at_reference, run.hparams)
      limit = run.setup.config.train.max_noise
      line = invariants.first_step(metrics, bounds, limit)
      self.logger.say(f"{self._name}{line}")
    self._check(self.logger.step(number, metrics, stats, flops))

  def flush(self):
    """Logs the step that is waiting."""
    if not self.failure:
      self._check(self.logger.flush())

  def evaluate(self, number, state):
    """Logs metrics of data.eval after step `number`."""
    if self.failure:
      return
    run, setup = self.run, self.run.setup
    of = "policy" if setup.config.lora is None else "adapter"
    self.evaluation = held_out.evaluate(
      setup, run.algorithm, state, run.hparams, of
    )
    self.logger.evaluation(number, self.evaluation)

  def save(self, state, *, wait):
    """Saves a checkpoint, once the reference has proved to be what it was."""
    if self.failure:
      return
    for params in state.frozen.values():
      invariants.reference_is(params, self.run.identity["reference"])
    self._checkpoints.save(state, self.run.identity, wait=wait)

  def end(self, number, stopped):
    """Says how the run ended after step `number`, unless it failed."""
    if self.failure:
      return
    if stopped:
      self.logger.say(
        f"{self._name}stopped at step {number} of {self.run.total}, saved; the "
        "same command resumes"
      )
    else:
      self.logger.say(f"{self._name}done: {number} steps in {self.workdir}")

  def _check(self, logged):
    limit = self.run.setup.config.train.max_skipped
    if logged and logged["skipped"] >= limit:
      self.failure = FloatingPointError(
        f"{logged['skipped']:.0f} updates in a row were not finite; the last "
        f"checkpoint is kept in {self.workdir}"
      )
