"""What an algorithm is: terms of a batch, and what to prepare for them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.config import saved
from dpo_jax.data.read import sources
from dpo_jax.ops import logprobs


class Terms(NamedTuple):
  """Per-example values with their weights; reduced by ops.reduce.

  The weights depend on the data only, never on parameters: the step sums them
  over the global batch before anything is differentiated.

  Attributes:
    losses: {name: (values, weights)}; the loss is the sum of their means.
    metrics: {name: (values, weights)}.
    peaks: {name: (values, weights)}: metrics of the largest value.
    kept: what of state.extra is new; of a batch-level algorithm alone, which
      sees the whole batch. Others keep what they want in `update`.
  """

  losses: dict
  metrics: dict
  peaks: dict = {}  # noqa: RUF012 - a constant
  kept: dict = {}  # noqa: RUF012


def no_extra(params):
  """For algorithms that keep nothing between steps."""
  del params
  return {}


def no_update(extra, params, step, metrics):
  """For algorithms that keep nothing of the policy, nor of its metrics."""
  del params, step, metrics
  return extra


def always(extra, step):
  """For algorithms whose every update applies."""
  del extra, step
  return jnp.bool_(True)


def never(extra, step):
  """For algorithms of which no part keeps still."""
  del extra, step
  return jnp.bool_(False)


def no_alarms(first, now):
  """For algorithms whose metrics need no watch."""
  del first, now
  return {}


def no_preparation(batch, frozen, extra):
  """For algorithms that need nothing beside the batch."""
  del frozen, extra
  return batch


class Algorithm(NamedTuple):
  """An algorithm as pure functions, and what it needs of a run.

  Attributes:
    data: what its batches are made of, a key of run.feeds.FEEDS: "sft", a kind
      of comparison (losses.Loss.data), or "prompts", which the policy answers.
    features: (params, frozen, batch, hparams, rng) -> (moving, fixed), trees of
      arrays whose first axis is the rows; `moving` is differentiated. `rng` is
      of the update: fold the example's id into it.
    combine: (moving, fixed, extra, hparams) -> Terms.
    prepare: (batch, frozen, extra) -> batch, without gradient: reference
      log-probs, advantages.
    needs: names of what it reads beside log-probs, see losses.Loss.needs.
    heads: names of scalar heads that it trains beside the model's tree; with
      any, `params` is {"model": …, "value": …}, see run.trained.with_heads.
    copies: names of further models that it trains beside the policy, each as
      the policy is, see run.trained.with_heads.
    batch_level: the examples of a batch are coupled, so `combine` must see the
      features of the whole global batch at once.
    extra: trained parameters -> what the state keeps between steps.
    update: (extra, trained parameters, steps done, metrics) -> extra, after an
      update; metrics are those of the whole batch. An update that is refused
      for not being finite changes nothing of it.
    applies: (extra, updates done) -> whether the next one changes parameters.
    rests: path -> whether this trained parameter keeps still at times, and with
      it its moments and its count of updates; None is none of them.
    still: (extra, updates done) -> whether those keep still in the next one.
    advantages: of "prompts": (scores, drawn, mask, extra) -> extra arrays of
      tokens for the steps of an iteration, see policy_gradient.advantages.
    compares: of "prompts": what the scores of the completions of a prompt
      become, a key of eval.comparing.KINDS; None compares none.
    first: (hparams, largest |Δ|) -> (lowest, at Δ = 0, highest) loss at step 0,
      where policy = reference up to rounding; None if that depends on data.
    alarms: (metrics of the first steps, and of the last) -> {name: a line for
      the log}: what deserves a look; each is said once.
    held_out: whether data.eval is measured by `combine`.
    held_out_data: what data.eval is made of; None is `data`.
    logps: whether the vocabulary's head runs on the scored tokens.
    code: {function of the user's own: digest of its code}, see config.code.
  """

  data: str
  features: Callable
  combine: Callable
  prepare: Callable = no_preparation
  needs: frozenset = frozenset()
  heads: tuple = ()
  copies: tuple = ()
  batch_level: bool = False
  extra: Callable = no_extra
  update: Callable = no_update
  applies: Callable = always
  rests: Callable | None = None
  still: Callable = never
  advantages: Callable | None = None
  compares: str | None = None
  first: Callable | None = None
  alarms: Callable = no_alarms
  held_out: bool = True
  held_out_data: str | None = None
  logps: bool = True
  code: dict = {}  # noqa: RUF012 - a constant

  def objective(self, params, frozen, batch, hparams, extra=None):
    """Terms of one prepared batch at step 0: `combine` of its `features`."""
    moving, fixed = self.features(params, frozen, batch, hparams, rng_of(0))
    return self.combine(moving, fixed, extra or {}, hparams)


def rng_of(step):
  """The typed key of update `step`, which depends on nothing else."""
  return jax.random.fold_in(jax.random.key(0), step)


def on(algorithm, policy):
  """An algorithm of all parameters of a policy as one of what is trained.

  Args:
    policy: (base or None, trained parameters) -> parameters of the policy.
  Returns: Algorithm. Where `frozen` has the "base" of what is trained, it is
    the reference too.
  """

  def features(params, frozen, batch, hparams, rng):
    params = policy(frozen.get("base"), params)
    return algorithm.features(params, frozen, batch, hparams, rng)

  def prepare(batch, frozen, extra):
    base = frozen.get("base")
    if "ref" in extra:
      extra = {**extra, "ref": policy(base, extra["ref"])}
    frozen = frozen if base is None else {"ref": base}
    return algorithm.prepare(batch, frozen, extra)

  return algorithm._replace(features=features, prepare=prepare)


def sources_count(data):
  """Data sets in the larger of the mixtures of config.data."""
  specs = filter(None, (data.train, data.eval))
  return max((len(sources.parse(spec)) for spec in specs), default=1)


def numeric_fields(loss):
  """{name: value} of the numbers of config.loss, which are hparams.

  Those of a term of a mixture are "dpo.beta".
  """
  fields = saved.flatten(loss.to_dict())
  return {k: v for k, v in fields.items() if not isinstance(v, str)}


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


def head_scores(outputs, batch, tokens):
  """(`head_logps`, what else is known of each token: with `tokens`).

  The second is {"entropy": nats, "top1": hits}, f32[R, S] each, or {}.
  """
  if not tokens:
    return head_logps(outputs, batch), {}
  scores = logprobs.token_scores(*outputs, *_scored(batch))
  return scores.logps, {"entropy": scores.entropy, "top1": scores.top1}


def per_token(sums, count, weights):
  """Terms of means per token, from {name: sum over `count` tokens}."""
  return {
    name: (total / jnp.maximum(count, 1), weights * count)
    for name, total in sums.items()
  }


def _scored(batch):
  """(sources, targets, mask) of the scored positions, [R, S] each."""
  targets = jnp.take_along_axis(batch["tokens"], batch["target_index"], axis=1)
  return batch["source_index"], targets, scored_mask(batch)


def completion_sums(values, batch):
  """Sums f32[R, S] over each completion: f32[R, P·C]."""
  return logprobs.completion_logps(values, batch["target_slot"], slots(batch))


def slot_sums(values, slots, count):
  """Sums f32[R, S] over each of `count` slots: f32[R, count]."""
  return logprobs.completion_logps(values, slots, count)


def head_values(head, hidden, batch):
  """f32[R, S] of a scalar head where each scored token is predicted.

      hidden · kernel + bias

  Args:
    head: {"kernel": [D], "bias": []}, see run.trained.with_heads.
    hidden: [R, T, D].
  """
  at = jnp.take_along_axis(hidden, batch["source_index"][..., None], axis=1)
  values = at.astype(jnp.float32) @ head["kernel"] + head["bias"]
  return jnp.where(scored_mask(batch), values, 0.0)


def lengths(batch):
  """Scored tokens of each completion: f32[R, P·C]."""
  ones = jnp.ones(batch["target_slot"].shape, jnp.float32)
  return completion_sums(ones, batch)
