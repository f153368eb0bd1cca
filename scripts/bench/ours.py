"""dpo_jax: its own step, loader and prefetching, as `loop.fit` runs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax import host
from scripts.bench import protocol

BETAS = (0.05, 1.0, 5.0)  # of the points beside the first


class Program(NamedTuple):
  """What the steps of a job need.

  Attributes:
    step: (state, batch, hparams) -> (state, metrics).
    state, hparams: of one point, or stacked.
    loss: metrics -> loss of the first point.
  """

  step: Callable
  state: Any
  hparams: dict
  loss: Callable


def compile_all(run, program, total):
  """Runs the step once for each shape of `total` batches.

  The program's state is used up. Returns: how many shapes.
  """
  shapes = {}
  for number in range(total):
    batch, _ = run.feed.loader.batch(number)
    shapes.setdefault(tuple(x.shape for x in batch.values()), number)
  state = program.state
  for number in shapes.values():
    batch, _ = run.feed.batch(number, None)
    state, metrics = program.step(state, batch, program.hparams)
    protocol.note(f"batch {number}: loss {float(program.loss(metrics)):.4f}")
  return len(shapes)


def device_peak():
  """The most memory in use on the first accelerator, in bytes."""
  import jax

  return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


class Trainer(NamedTuple):
  """A run that is compiled and at its first step.

  Attributes:
    run: base.Run.
    program: Program.
    compilations: jax_side.Compilations.
    facts: for the results.
  """

  run: Any
  program: Any
  compilations: Any
  facts: dict


def build(job):
  """The Trainer of a job, as `loop.fit` builds its own."""
  from dpo_jax import sweeps
  from dpo_jax.config import load
  from dpo_jax.run import build as build_lib
  from dpo_jax.run import forward, recorder, together, trained
  from scripts.bench import jax_side

  fields = [*job["fields"], f"sweep.together={job['points']}"]
  fields += job["overrides"]
  betas = BETAS[: job["points"] - 1]
  config, *others = [
    load.load_config(job["config"], [*fields, *more])
    for more in ([], *([f"loss.beta={beta}"] for beta in betas))
  ]
  run = build_lib.prepare(config)
  protocol.note(run.about[1])
  params = trained.initial(run.setup)
  protocol.note("parameters are there")
  if config.ref == "cached":
    forward.attach_reference(run.setup, params, run.feed.loader, job["workdir"])
  runs = sweeps.beside([config, *others], run) if others else [run]

  def program():
    states = [build_lib.initial_state(run, params) for run in runs]
    if not others:
      return Program(run.step, *states, run.hparams, lambda m: m["loss"])
    made = together.program(runs, states)
    return Program(
      *(made.step, made.state, made.hparams, lambda m: m[0]["loss"])
    )

  peaks = {"built": protocol.peak_bytes()}
  compilations = jax_side.Compilations()
  shapes = compile_all(run, program(), job["steps"])
  seconds = compilations.seconds
  protocol.note(f"compiled, {seconds:.1f} s")
  peaks["compiled"] = protocol.peak_bytes()
  facts = {
    "compile_seconds": seconds,
    "compilations": shapes,
    "fill": run.feed.loader.fill,
    "about": run.about[1].partition(": ")[2],  # without the path
    "peaks": peaks,
    "attention": run.setup.model.config.attention,
    "remat": run.setup.model.config.remat,
    "head_chunk": run.setup.model.config.head_chunk,
    "flops": [
      recorder.step_flops(run, run.feed.loader.batch(number)[1])
      for number in range(job["steps"])
    ],
  }
  return Trainer(run, program(), compilations, facts)


def main():
  channel = protocol.Channel()
  job = channel.job
  host.keep_pages()  # these three as the command line does
  host.claim_devices()
  host.leave_triton_out()
  import jax

  from dpo_jax.run import feed
  from dpo_jax.train import log

  run, (step, state, hparams, loss_of), compilations, facts = build(job)
  device = jax.devices()[0]
  if device.memory_stats():
    channel.peak = device_peak
  if job.get("device"):
    facts |= {"device": device.device_kind, "peak": log.peak_flops()}
  jax.block_until_ready(state)
  channel.ready(("jax", "jaxlib", "flax", "optax"), **facts)
  before = compilations.count

  number = 0
  with feed.opened(run.feed, number, job["steps"]) as batch_of:

    def run_steps(count):
      nonlocal state, number
      losses = []
      for _ in range(count):
        batch, _ = batch_of(number, state)
        number += 1
        state, metrics = step(state, batch, hparams)
        losses.append(loss_of(metrics))
      jax.block_until_ready((state, losses))
      assert compilations.count == before, "a shape was compiled while timed"
      return lambda: [float(loss) for loss in losses]

    channel.serve(run_steps)


if __name__ == "__main__":
  main()
