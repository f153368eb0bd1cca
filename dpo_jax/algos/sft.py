"""Supervised fine-tuning: the mean negative log-likelihood per token."""

import functools

import jax

from dpo_jax import lookup
from dpo_jax.algos import base
from dpo_jax.ops.losses import free


def make(config, apply):
  """The Algorithm; `config.loss.name` must be "sft" and there is no `ref`."""
  lookup.lookup(("sft",), config.loss.name, "loss.name (of algo 'sft')")
  if config.ref != "none":
    raise ValueError(f"ref = {config.ref!r} has no effect with algo 'sft'")
  return base.Algorithm(
    data="sft",
    features=functools.partial(features, apply=apply, tokens=config.log.tokens),
    combine=combine,
  )


def features(params, frozen, batch, hparams, rng, *, apply, tokens):
  """Log-prob, length and weight of every completion, f32[R, P·C].

  With `tokens` the sums of entropy and top-1 hits too.
  """
  del frozen, hparams, rng
  token_logps, more = base.head_scores(apply(params, batch), batch, tokens)
  policy = base.completion_sums(token_logps, batch)
  fixed = {
    "lengths": base.lengths(batch),
    "weights": batch["completion_weights"].reshape(policy.shape),
    "tokens": {k: base.completion_sums(v, batch) for k, v in more.items()},
  }
  return policy, jax.lax.stop_gradient(fixed)


def combine(policy, fixed, extra, hparams):
  """Terms: NLL per token of every completion, and log-prob per completion."""
  del extra, hparams
  lengths, weights = fixed["lengths"], fixed["weights"]
  out = free.nll(policy[..., None], None, lengths=lengths[..., None])
  value, factor = out["loss"]
  per_token = value, factor * weights
  metrics = {"logps/chosen": (policy, weights), "nll": per_token}
  metrics |= base.per_token(fixed["tokens"], lengths, weights)
  return base.Terms({"sft": per_token}, metrics)
