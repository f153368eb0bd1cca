"""PPO, RLOO, GRPO and REINFORCE: a policy learns from what it sampled.

    an iteration   completions are drawn and scored by eval.rollouts, and
    advantages     from their rewards, once for all steps of the iteration
    a step         the clipped losses of a minibatch of them

The estimator of `config.loss` makes the advantages (ops.rl); the clipped loss,
the KL penalty and its controller are the same for all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.algos import alarms, base, preference
from dpo_jax.ops import rl
from dpo_jax.ops.rl import advantages as advantages_lib
from dpo_jax.ops.rl import losses

_EXTRAS = ("old_logps", "ref_token_logps", "advantages", "returns", "values")


class Controller(NamedTuple):
  """What changes between steps, see `follow`.

  Attributes:
    steps: of an iteration.
    target: sequence KL in nats that the coefficient aims at, or None.
    horizon: completions over which it moves.
    completions: of an iteration.
    warmup: steps in which the critic alone learns.
    kl_stop: approximate KL in nats per token beyond which the rest of an
      iteration is left out, or None.
  """

  steps: int
  target: float | None
  horizon: int | None
  completions: int
  warmup: int
  kl_stop: float | None


def make(config, apply):
  """The Algorithm of `config.loss`.

  Args:
    config: reads loss, ref, rollout, lora, data.batch_size and optim.
    apply: (params, batch) -> (hidden, Head).
  """
  fields, rollout = config.loss.to_dict(), config.rollout
  estimator = rl.check(fields)
  if rollout is None or "critic" not in rollout:  # refused by run.rollouts
    return base.Algorithm("prompts", features, combine)
  apply = functools.partial(_at_temperature, apply, rollout.temperature)
  steps = rollout.epochs * (rollout.prompts // config.data.batch_size)
  controller = Controller(
    steps=steps,
    target=rollout.kl_target,
    horizon=rollout.kl_horizon,
    completions=rollout.prompts * rollout.draws,
    warmup=rollout.warmup * steps,
    kl_stop=rollout.kl_stop,
  )
  return base.Algorithm(
    data="prompts",
    features=functools.partial(features, apply=apply),
    combine=functools.partial(combine, average=fields["average"]),
    prepare=functools.partial(_prepare, apply=apply),
    heads=("value",) if estimator.critic else (),
    copies=("critic",) if rollout.critic == "copy" else (),
    extra=functools.partial(
      _extra, coefficient=fields["beta"], warmup=controller.warmup
    ),
    update=functools.partial(follow, controller=controller),
    applies=lambda extra, step: step >= extra["rests"],
    rests=_of_policy if controller.warmup else None,
    still=lambda extra, step: extra["learns"] == 0,
    advantages=functools.partial(
      advantages, estimator=estimator.fn, fields=fields
    ),
    alarms=functools.partial(alarms.of_rollouts, target=rollout.kl_target),
    held_out=False,
  )


def _of_policy(path):
  """Whether a trained parameter beside a critic is of the policy."""
  return path.startswith("model/")


def _at_temperature(apply, temperature, params, batch):
  """(hidden, Head) whose log-probs are those that are sampled from."""
  hidden, head = apply(params, batch)
  if temperature == 1:
    return hidden, head
  return hidden, head.replace(temperature=temperature)


def _extra(params, *, coefficient, warmup):
  """The controller's state at step 0.

  coefficient: of the KL penalty; kl, seen: sum of the KLs of the steps of this
  iteration, and their number; learns: 0 where the critic alone learns, else 1;
  rests: updates done until which all others are left out.
  """
  del params
  return {
    "coefficient": jnp.float32(coefficient),
    "kl": jnp.float32(0),
    "seen": jnp.float32(0),
    "learns": jnp.float32(warmup == 0),
    "rests": jnp.int32(0),
  }


def follow(extra, params, step, metrics, *, controller):
  """The controller's state after an update.

  At the end of an iteration of n completions with the mean sequence KL

      β ← β · (1 + clip(KL / target − 1, −0.2, 0.2) · n / horizon)

  Args:
    step: updates done.
    metrics: of the minibatch.
  Source: arXiv:1909.08593 section 2.2.
  """
  del params
  ends = step % controller.steps == 0
  kl = extra["kl"] + metrics["objective/kl"]
  seen = extra["seen"] + 1
  coefficient, rests = extra["coefficient"], extra["rests"]
  if controller.target is not None:
    error = jnp.clip(kl / seen / controller.target - 1, -0.2, 0.2)
    factor = 1 + error * controller.completions / controller.horizon
    coefficient = jnp.where(ends, coefficient * factor, coefficient)
  if controller.kl_stop is not None:
    over = metrics["policy/approx_kl"] > controller.kl_stop
    end = -(-step // controller.steps) * controller.steps
    rests = jnp.where(over, end, rests)
  return {
    "coefficient": coefficient,
    "kl": jnp.where(ends, 0.0, kl),
    "seen": jnp.where(ends, 0.0, seen),
    "learns": (step >= controller.warmup).astype(jnp.float32),
    "rests": rests,
  }


def _prepare(batch, frozen, extra, *, apply):
  """Adds the reference's log-probs, unless they are there, and `learns`."""
  batch = preference.reference_logps(
    batch, frozen, extra, apply=apply, outputs=False
  )
  return {**batch, "learns": extra["learns"]}


def advantages(scores, drawn, mask, extra, *, estimator, fields):
  """What the steps of an iteration learn from: arrays of tokens.

  Args:
    scores: f32[B, K] of completions.
    drawn: {name: f32[B, K, N]} of tokens: "old_logps" and "ref_token_logps" in
      nats, and with a critic "values".
    mask: bool[B, K, N].
    extra: of the TrainState.
    estimator: fn of an ops.rl.Estimator.
    fields: config.loss.
  Returns: {name of rows.EXTRAS: f32[B, K, N]}.
  """
  rewards = advantages_lib.token_rewards(
    *(scores, drawn["old_logps"], drawn["ref_token_logps"], mask),
    beta=extra["coefficient"],
  )
  if fields["whiten"] in ("rewards", "both"):
    rewards = advantages_lib.whitened(rewards, mask, keeps_mean=True)
  values = {"values": drawn["values"]} if "values" in drawn else {}
  names = ("gamma", "lam", "value_lam", "scale")
  own = {name: fields[name] for name in names if name in fields}
  made, returns = estimator(rewards, mask, **values, **own)
  if fields["whiten"] in ("advantages", "both"):
    made = advantages_lib.whitened(made, mask)
  return {"advantages": made, "returns": returns}


def features(params, frozen, batch, hparams, rng, *, apply):
  """Log-probs, and values where there is a critic, of the scored tokens.

  V_t is read where token t is predicted: at its predecessor, which does not
  know it.

  Returns: (moving, fixed) of f32[R, S] and f32[R, P·C].
  """
  del frozen, hparams, rng
  model = params["model"] if "value" in params else params
  outputs = apply(model, batch)
  logps, more = base.head_scores(outputs, batch, tokens=True)
  moving = {"logps": logps}
  if "value" in params:
    hidden = outputs[0]
    if "critic" in params:
      hidden, _ = apply(params["critic"], batch)
    else:  # while it warms up, the critic does not move the trunk
      still = jax.lax.stop_gradient(hidden)
      hidden = jnp.where(batch["learns"] > 0, hidden, still)
    moving["values"] = base.head_values(params["value"], hidden, batch)
  weights = batch["completion_weights"].reshape(len(logps), -1)
  fixed = {
    **{name: batch[name] for name in _EXTRAS if name in batch},
    "entropy": more["entropy"],
    "slots": batch["target_slot"],
    "lengths": base.lengths(batch),
    "weights": weights,
    "ended": batch["ended"].reshape(weights.shape),
  }
  for name in ("scores", "gaps"):
    if name in batch:
      fixed[name] = batch[name].reshape(weights.shape)
  return moving, jax.lax.stop_gradient(fixed)


def combine(moving, fixed, extra, hparams, *, average):
  """Terms of a minibatch: the clipped losses, and the field's metrics."""
  logps, old = moving["logps"], fixed["old_logps"]
  lengths, weights = fixed["lengths"], fixed["weights"]

  def of_completions(values):
    return base.slot_sums(values, fixed["slots"], weights.shape[1])

  def mean(values):  # over tokens
    sums = of_completions(jax.lax.stop_gradient(values))
    return losses.averaged(sums, lengths, weights, "tokens")

  policy, clipped = losses.policy(
    logps, old, fixed["advantages"], clip=hparams["clip"]
  )
  policy = losses.averaged(of_completions(policy), lengths, weights, average)
  terms = {"policy": (extra["learns"] * policy[0], policy[1])}
  change = jax.lax.stop_gradient(logps) - old
  # ∇ Σ π log π = E[log π · ∇ log π]: of the tokens that were drawn.
  weight = extra["learns"] * hparams["entropy_weight"]
  negative = weight * jnp.exp(logps - old) * jax.lax.stop_gradient(logps)
  negative = of_completions(negative), lengths
  terms["entropy"] = losses.averaged(*negative, weights, "tokens")
  k1 = of_completions(old - fixed["ref_token_logps"])
  metrics = {
    "objective/kl": (k1, weights),
    "objective/scores": (fixed["scores"], weights),
    "objective/rlhf_reward": (
      fixed["scores"] - extra["coefficient"] * k1,
      weights,
    ),
    "objective/length": (lengths, weights),
    "objective/ended": (fixed["ended"], weights),
    "objective/kl_coefficient": (
      jnp.broadcast_to(extra["coefficient"], weights.shape),
      weights,
    ),
    "policy/loss": policy,
    "policy/clipfrac": mean(clipped),
    "policy/approx_kl": mean(0.5 * jnp.square(change)),
    "policy/ratio": mean(jnp.exp(change)),
    "policy/entropy": mean(fixed["entropy"]),
  }
  if "values" in moving:
    values, returns = moving["values"], fixed["returns"]
    loss, clipped = losses.value(
      values, fixed["values"], returns, clip=hparams["value_clip"]
    )
    loss = losses.averaged(of_completions(loss), lengths, weights, "tokens")
    terms["value"] = hparams["value_weight"] * loss[0], loss[1]
    metrics |= {"value/loss": loss, "value/clipfrac": mean(clipped)}
    error = returns - values
    parts = {"error": error, "error_square": jnp.square(error)}
    parts |= {"return": returns, "return_square": jnp.square(returns)}
    metrics |= {
      f"value/explained_variance/{k}": mean(x) for k, x in parts.items()
    }
  gaps = {"sampling/gap": (fixed["gaps"], weights)}
  return base.Terms(terms, jax.lax.stop_gradient(metrics), gaps)
