"""The baseline: a plain jitted JAX step of the same model.

Every sequence is padded to the longest that the data may have, chosen and
rejected are concatenated, the logits [2B, T, V] exist in whole. The state is
donated and the one shape compiles once, so nothing but the layout and the
logits tells it from dpo_jax's step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scripts.bench import jax_side, protocol


def pad(pairs, length):
  """Arrays [2B, T] of pairs: all chosen sequences, then all rejected ones."""
  tokens = np.zeros((2 * len(pairs), length), np.int32)
  valid, scored = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, (prompt, *completions) in enumerate(pairs):
    for half, ids in enumerate(completions):
      at = row + half * len(pairs)
      end = len(prompt) + len(ids)
      tokens[at, :end] = prompt + ids
      valid[at, :end] = 1
      scored[at, len(prompt) : end] = 1
  return {"tokens": tokens, "valid": valid, "scored": scored}


def completion_logps(apply, params, batch):
  """f32[2B] log-probs of the completions in nats, from logits [2B, T, V]."""
  from dpo_jax.ops import logprobs

  tokens, valid = batch["tokens"], batch["valid"]
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, head = apply(
    params,
    {
      "tokens": tokens,
      "positions": positions,
      "segment_ids": valid,
      "branch_ids": jnp.zeros_like(tokens),
      "example_index": positions[:, None],
    },
  )
  logps = jax.nn.log_softmax(logprobs.logits(hidden, head)[:, :-1])
  picked = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=2)[..., 0]
  return jnp.sum(jnp.where(batch["scored"][:, 1:] > 0, picked, 0.0), axis=1)


def dpo_loss(logps, ref_logps, beta):
  """Mean of −log σ(β [(c − r) − (c_ref − r_ref)]); arXiv:2305.18290 Eq. 7."""
  chosen, rejected = jnp.split(logps - ref_logps, 2)
  return -jnp.mean(jax.nn.log_sigmoid(beta * (chosen - rejected)))


def optimizer(job):
  """RMSprop on clipped gradients."""
  return optax.chain(
    optax.clip_by_global_norm(job["clip_norm"]),
    optax.scale_by_rms(job["decay"], job["eps"], eps_in_sqrt=False),
    optax.scale(-job["learning_rate"]),
  )


def make_step(apply, policy, tx, beta):
  """step(trained, opt_state, base, batch) -> (trained, opt_state, loss)."""

  def step(trained, opt_state, base, batch):
    ref = batch.get("ref_logps")
    if ref is None:
      ref = completion_logps(apply, base, batch)
    ref = jax.lax.stop_gradient(ref)

    def loss(trained):
      params = policy(base, trained)
      return dpo_loss(completion_logps(apply, params, batch), ref, beta)

    value, grads = jax.value_and_grad(loss)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, value

  return jax.jit(step, donate_argnums=(0, 1))


def main():
  channel = protocol.Channel()
  from dpo_jax.config import load
  from dpo_jax.run import build
  from dpo_jax.run import trained as trained_lib

  job = channel.job
  fields = [*job["fields"], "model.attention=xla"]
  config = load.load_config(job["config"], fields)
  setup = build.prepare_model(config)
  base, apply = trained_lib.initial(setup), setup.model.apply
  device = jax.devices()[0]  # a plain step knows no mesh
  base = jax.device_put(base, device)
  tx = optimizer(job)
  batches = [pad(pairs, job["max_length"]) for pairs in protocol.batches(job)]
  if job["ref"] == "cached":
    score = jax.jit(lambda params, b: completion_logps(apply, params, b))
    for batch in batches:
      batch["ref_logps"] = np.asarray(score(base, batch))
  start = jax.jit(lambda params: jax.tree.map(jnp.copy, params))

  def initial():
    rng = jax.random.key(setup.source.seed)
    trained = start(setup.trained.init(base, rng))
    trained = jax.device_put(trained, device)
    return jax.device_put((trained, tx.init(trained)), device)

  step = make_step(apply, setup.trained.policy, tx, job["beta"])
  needed = job["ref"] == "frozen" or job["lora"]
  compilations = jax_side.Compilations()
  float(step(*initial(), base if needed else {}, batches[0])[2])
  compiled, number = compilations.seconds, 0
  state = initial()
  base = base if needed else {}
  before = compilations.count
  channel.ready(
    ("jax", "jaxlib", "flax", "optax"), compile_seconds=compiled, compilations=1
  )

  def run_steps(count):
    nonlocal state, number
    losses = []
    for _ in range(count):
      *state, loss = step(*state, base, batches[number])
      losses.append(loss)
      number += 1
    jax.block_until_ready((state, losses))
    assert compilations.count == before, "something was compiled while timed"
    return lambda: [float(loss) for loss in losses]

  channel.serve(run_steps)


if __name__ == "__main__":
  main()
