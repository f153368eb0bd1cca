"""What an algorithm is: terms of a batch, and what to prepare for them."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from dpo_jax.ops import logprobs


class Terms(NamedTuple):
  """Per-example values with their weights; reduced by ops.reduce.

  The weights depend on the data only, never on parameters: the step sums them
  over the global batch before anything is differentiated.

  Attributes:
    losses: {name: (values, weights)}; the loss is the sum of their means.
    metrics: {name: (values, weights)}.
  """

  losses: dict
  metrics: dict


class Algorithm(NamedTuple):
  """An algorithm as pure functions.

  Attributes:
    objective: (params, frozen, batch, hparams) -> Terms.
    prepare: (batch, frozen, extra) -> batch, without gradient: reference
      log-probs, advantages.
    batch_level: the examples of a batch are coupled, so the objective must see
      the whole global batch at once.
    rollout: (state, prompts, rng) -> examples, for on-policy algorithms.
  """

  objective: Callable
  prepare: Callable
  batch_level: bool = False
  rollout: Callable | None = None


def on_adapter(algorithm, policy):
  """The algorithm that trains an adapter on a frozen base.

  Args:
    algorithm: Algorithm on all parameters of a policy.
    policy: (base, adapter) -> the policy's parameters.
  Returns: Algorithm whose `frozen` has the "base", the reference.
  """

  def objective(params, frozen, batch, hparams):
    params = policy(frozen["base"], params)
    return algorithm.objective(params, frozen, batch, hparams)

  def prepare(batch, frozen, extra):
    return algorithm.prepare(batch, {"ref": frozen["base"]}, extra)

  return algorithm._replace(objective=objective, prepare=prepare)


def split_fields(loss):
  """(text fields, numeric fields) of config.loss; the latter are hparams."""
  fields = {k: v for k, v in loss.items() if k != "name"}
  static = {k: v for k, v in fields.items() if isinstance(v, str)}
  return static, {k: v for k, v in fields.items() if k not in static}


def no_preparation(batch, frozen, extra):
  """For algorithms that need nothing beside the batch."""
  del frozen, extra
  return batch


def scored_mask(batch):
  """bool[R, S]: which scored positions are real."""
  return batch["target_slot"] < slots(batch)


def slots(batch):
  """P·C: completions per row, padding included."""
  return batch["completion_weights"].shape[1] * completions(batch)


def completions(batch):
  """C."""
  return batch["completion_weights"].shape[2]


def token_logps(apply, params, batch, chunk):
  """f32[R, S] log-probs in nats of the scored tokens; 0 at padding."""
  hidden, head = apply(params, batch)
  targets = jnp.take_along_axis(batch["tokens"], batch["target_index"], axis=1)
  return logprobs.token_logps(
    hidden,
    head,
    batch["source_index"],
    targets,
    scored_mask(batch),
    chunk=chunk,
  )


def completion_sums(values, batch):
  """Sums f32[R, S] over each completion: f32[R, P·C]."""
  return logprobs.completion_logps(values, batch["target_slot"], slots(batch))


def lengths(batch):
  """Scored tokens of each completion: f32[R, P·C]."""
  ones = jnp.ones(batch["target_slot"].shape, jnp.float32)
  return completion_sums(ones, batch)
