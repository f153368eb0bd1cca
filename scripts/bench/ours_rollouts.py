"""dpo_jax on policy: iterations as `loop.fit` runs them, and their parts.

An iteration draws, scores and measures in its feed, then takes its one step.
"""

import time

from dpo_jax import host
from scripts.bench import protocol


def watched(parts, scores):
  """Has the rollouts tell their parts, and use the bench's own reward."""
  from dpo_jax.eval import generate, rewards, rollouts
  from dpo_jax.run import forward

  rewards.SCORERS["bench"] = lambda _: scores
  drawn = generate.draws

  def sampled(*args, **kwargs):
    return list(drawn(*args, **kwargs))

  generate.draws = parts.of("sample", sampled)
  rollouts.scored = parts.of("score", rollouts.scored)
  forward.of_examples = parts.of("measure", forward.of_examples)


def main():
  channel = protocol.Channel()
  job = channel.job
  host.keep_pages()  # these three as the command line does
  host.claim_devices()
  host.leave_triton_out()
  import jax

  from dpo_jax.config import load
  from dpo_jax.run import build, recorder, trained
  from scripts.bench import jax_side

  parts, scores = protocol.Parts(), protocol.Scores(job)
  watched(parts, scores)
  config = load.load_config(job["config"], [*job["fields"], *job["overrides"]])
  build.check(config)
  run = build.prepare(config)
  protocol.note(run.about[1])
  state = build.initial_state(run, trained.initial(run.setup))
  jax.block_until_ready(state)
  compilations = jax_side.Compilations()
  channel.ready(
    ("jax", "jaxlib", "flax", "optax"),
    about=run.about[1].partition(": ")[2],
    trained=sum(x.size for x in jax.tree.leaves(state.params)),
  )
  scores.means.clear()  # the blank ones that a feed begins with
  per_iteration = next(n for n in range(1, 10**6) if run.feed.boundary(n))
  number, compiled = 0, None
  while True:
    count = channel.steps()
    begin = time.perf_counter()
    flops, of_steps = [], []
    for _ in range(count * per_iteration):
      batch, stats = parts.of("rollouts", run.feed.batch)(number, state)
      number += 1
      # Its own pass, that of the reference, and the sampler's: each token once.
      flops.append(recorder.step_flops(run, stats) * 5 / 4)
      state, metrics = parts.of("update", _waiting(run.step))(
        state, batch, run.hparams
      )
      of_steps.append(metrics)
    seconds = time.perf_counter() - begin
    if compiled not in (None, compilations.count):
      raise RuntimeError("something was compiled while timed")
    compiled = compilations.count
    channel.reply(
      seconds=seconds,
      losses=[float(m["loss"]) for m in of_steps],
      norms=[float(m["grad_norm"]) for m in of_steps],
      scores=scores.means[:],
      parts=[parts.take()],
      flops=flops,
      compile_seconds=compilations.seconds,
      compilations=compilations.large,
    )
    scores.means.clear()


def _waiting(step):
  import jax

  return lambda *args: jax.block_until_ready(step(*args))


if __name__ == "__main__":
  main()
