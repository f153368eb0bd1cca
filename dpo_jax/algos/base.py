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
    peaks: {name: (values, weights)}: metrics of the largest value.
    kept: what of state.extra is new, of a batch-level algorithm.
  """

  losses: dict
  metrics: dict
  peaks: dict = {}  # noqa: RUF012 - a constant
  kept: dict = {}  # noqa: RUF012


def no_extra(params):
  """For algorithms that keep nothing between steps."""
  del params
  return {}


def no_update(extra, params, step):
  """For algorithms that keep nothing of the policy."""
  del params, step
  return extra


class Algorithm(NamedTuple):
  """An algorithm as pure functions.

  Attributes:
    features: (params, frozen, batch, hparams) -> (moving, fixed), trees of
      arrays whose first axis is the rows; `moving` is differentiated.
    combine: (moving, fixed, extra, hparams) -> Terms.
    prepare: (batch, frozen, extra) -> batch, without gradient: reference
      log-probs, advantages.
    batch_level: the examples of a batch are coupled, so `combine` must see the
      features of the whole global batch at once.
    extra: trained parameters -> what the state keeps between steps.
    update: (extra, trained parameters, steps done) -> extra, after an update.
    at_reference: (hparams, largest |Δ|) -> (lowest, at Δ = 0, highest) loss
      where policy = reference up to rounding, or None if that depends on data.
    rollout: (state, prompts, rng) -> examples, for on-policy algorithms.
  """

  features: Callable
  combine: Callable
  prepare: Callable
  batch_level: bool = False
  extra: Callable = no_extra
  update: Callable = no_update
  at_reference: Callable | None = None
  rollout: Callable | None = None

  def objective(self, params, frozen, batch, hparams, extra=None):
    """Terms of one prepared batch: `combine` of its `features`."""
    moving, fixed = self.features(params, frozen, batch, hparams)
    return self.combine(moving, fixed, extra or {}, hparams)


def on_adapter(algorithm, policy):
  """The algorithm that trains an adapter on a frozen base.

  Args:
    algorithm: Algorithm on all parameters of a policy.
    policy: (base, adapter) -> the policy's parameters.
  Returns: Algorithm whose `frozen` has the "base", the reference.
  """

  def features(params, frozen, batch, hparams):
    params = policy(frozen["base"], params)
    return algorithm.features(params, frozen, batch, hparams)

  def prepare(batch, frozen, extra):
    if "ref" in extra:
      extra = {**extra, "ref": policy(frozen["base"], extra["ref"])}
    return algorithm.prepare(batch, {"ref": frozen["base"]}, extra)

  return algorithm._replace(features=features, prepare=prepare)


def numeric_fields(loss):
  """{name: value} of the numbers of config.loss, which are hparams.

  Those of a term of a mixture are "dpo.beta".
  """
  fields = {}
  for name, value in loss.items():
    if hasattr(value, "items"):
      inside = numeric_fields(value)
      fields |= {f"{name}.{k}": v for k, v in inside.items()}
    elif not isinstance(value, str):
      fields[name] = value
  return fields


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


def token_logps(apply, params, batch):
  """f32[R, S] log-probs in nats of the scored tokens; 0 at padding."""
  return head_logps(apply(params, batch), batch)


def head_logps(outputs, batch):
  """`token_logps` from the model's outputs, (hidden, Head)."""
  return logprobs.token_logps(*outputs, *_scored(batch))


def head_scores(outputs, batch):
  """logprobs.Scores from the model's outputs, (hidden, Head)."""
  return logprobs.token_scores(*outputs, *_scored(batch))


def _scored(batch):
  """(sources, targets, mask) of the scored positions, [R, S] each."""
  targets = jnp.take_along_axis(batch["tokens"], batch["target_index"], axis=1)
  return batch["source_index"], targets, scored_mask(batch)


def completion_sums(values, batch):
  """Sums f32[R, S] over each completion: f32[R, P·C]."""
  return logprobs.completion_logps(values, batch["target_slot"], slots(batch))


def lengths(batch):
  """Scored tokens of each completion: f32[R, P·C]."""
  ones = jnp.ones(batch["target_slot"].shape, jnp.float32)
  return completion_sums(ones, batch)
