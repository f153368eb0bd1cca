"""Reward models: a scalar of each completion, trained on comparisons.

    features   r(x, y) of every completion, gathered by comparisons
    combine    the loss of each comparison, and its metrics

The reward is read at a completion's last token, its end included, which sees
all of prompt and completion:

    r(x, y) = hidden[last token of y] · kernel + bias

It is found by the batch's own index of scored tokens and never by looking for
an end token or for padding, so what a prompt holds, and what lies beside an
example, changes nothing. The vocabulary's head is not computed.
"""

import functools

import jax
import jax.numpy as jnp

from dpo_jax.algos import base, diagnostics
from dpo_jax.algos import needs as needs_lib
from dpo_jax.algos import terms as terms_lib
from dpo_jax.ops import attention, logprobs

HEAD = "reward"


def make(config, apply):
  """The Algorithm of `config.loss`, one of rewards.

  Args:
    config: reads loss, ref, data, log.tokens and model.head_chunk.
    apply: (params, batch) -> (hidden, Head).
  Raises: ValueError for a loss of log-probs and for fields without effect.
  """
  part = terms_lib.of_rewards(config.loss)
  if config.ref != "none":
    raise ValueError(
      f"ref = {config.ref!r} has no effect with algo 'reward', whose losses "
      "read no reference: set ref = 'none'"
    )
  for field, value in (
    ("log.tokens", config.log.tokens or None),
    ("model.head_chunk", config.model.head_chunk),
  ):
    if value is not None:
      raise ValueError(
        f"{field} = {value} has no effect with algo 'reward', which computes "
        "no probabilities of tokens: leave it out"
      )
  return base.Algorithm(
    data=part.loss.compares,
    features=functools.partial(features, apply=apply, wanted=part.loss.needs),
    combine=functools.partial(
      combine, part=part, sources_count=base.sources_count(config.data)
    ),
    needs=frozenset(part.loss.needs),
    heads=(HEAD,),
    batch_level=part.loss.batch_level,
    logps=False,
    code=part.code,
  )


def rewards(apply, params, batch):
  """Rewards of all completions: f32[R, P·C]; 0 where there is none.

  Args:
    apply: (parameters of the model, batch) -> (hidden, Head).
    params: {"model", "reward": {"kernel": f32[D], "bias": f32[]}}.
    batch: rows, see data.batch.rows.
  """
  hidden, _ = apply(params["model"], batch)
  last = last_tokens(batch)
  at = attention.take_rows(hidden, last)
  at = at.astype(jnp.promote_types(at.dtype, jnp.float32))
  head = params[HEAD]
  scores = jnp.einsum("rsd,d->rs", at, head["kernel"]) + head["bias"]
  return jnp.where(last < batch["tokens"].shape[1], scores, 0.0)


def last_tokens(batch):
  """Row position of the last token of each completion: i32[R, P·C].

  Where there is no completion it is T, which is none.
  """
  slot = batch["target_slot"][:, None, :]
  member = slot == jnp.arange(base.slots(batch))[:, None]
  place = jnp.where(member, batch["target_index"][:, None, :], -1)
  last = jnp.max(place, axis=-1)
  return jnp.where(last < 0, batch["tokens"].shape[1], last)


def features(params, frozen, batch, hparams, rng, *, apply, wanted):
  """What the loss reads of each comparison.

  Returns: (moving, fixed): f32[R, Q, K] rewards; dict of arrays.
  """
  del frozen, hparams, rng
  scores = rewards(apply, params, batch)
  pairs = batch["pairs"]
  example = pairs[..., 0] // base.completions(batch)
  needed = {
    "scores": lambda: needs_lib.of_slots(batch, "scores"),
    "present": lambda: pairs < base.slots(batch),
    "lengths": lambda: logprobs.select(base.lengths(batch), pairs),
    "weights": lambda: batch["weights"],
  }
  fixed = {
    **{name: needed[name]() for name in {*wanted, "lengths", "weights"}},
    "ended": needs_lib.of_slots(batch, "ended"),
    "source": logprobs.select(batch["source"], example),
    "all": scores,
    "all_weights": batch["completion_weights"].reshape(scores.shape),
  }
  return logprobs.select(scores, pairs), jax.lax.stop_gradient(fixed)


def combine(moving, fixed, extra, hparams, *, part, sources_count):
  """Terms of the comparisons of a batch.

  Args:
    moving, fixed: of `features`.
    hparams: holds the numeric fields of config.loss.
    part: terms.Part.
  """
  del extra
  numbers = {k: hparams[field] for k, field in part.numeric.items()}
  needs = {name: fixed[name] for name in part.loss.needs}
  out = part.fn(moving, **needs, **numbers)
  weights = fixed["weights"]
  loss = diagnostics.weighted(out.pop("loss"), weights)
  metrics = {k: diagnostics.weighted(v, weights) for k, v in out.items()}
  plain = {name: value for name, (value, _) in metrics.items()}
  more = diagnostics.of_pairs(plain, fixed, None)
  if "rewards/margins" in plain:
    more |= _of_probability(plain["rewards/margins"])
  metrics |= {name: (value, weights) for name, value in more.items()}
  sourced = jax.lax.stop_gradient({**metrics, "loss": loss})
  metrics |= diagnostics.by_source(sourced, fixed["source"], sources_count)
  # Of all completions, each once: where rewards drift to, and how far apart.
  scores, of_scores = fixed["all"], fixed["all_weights"]
  metrics["rewards/mean"] = scores, of_scores
  metrics["rewards/square"] = jnp.square(scores), of_scores
  return base.Terms({part.name: loss}, metrics)


def _of_probability(margin):
  """How well the labels are foretold by p = σ(margin), of the chosen.

  The Brier score (1 − p)², and the bins of the calibration error.
  """
  brier = jnp.square(jax.nn.sigmoid(-margin))
  return {"brier": brier, **diagnostics.calibration(margin)}
