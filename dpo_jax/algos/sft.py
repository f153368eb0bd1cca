"""Supervised fine-tuning: the mean negative log-likelihood per token."""

import functools

from dpo_jax import lookup
from dpo_jax.algos import base
from dpo_jax.ops import losses


def make(config, apply):
  """The Algorithm; `config.loss.name` must be "sft" and there is no `ref`."""
  lookup.lookup({"sft": None}, config.loss.name, "loss.name (of algo 'sft')")
  if config.ref != "none":
    raise ValueError(f"ref = {config.ref!r} has no effect with algo 'sft'")
  return base.Algorithm(
    functools.partial(features, apply=apply, chunk=config.head_chunk),
    combine,
    base.no_preparation,
  )


def features(params, frozen, batch, hparams, *, apply, chunk):
  """Log-prob, length and weight of every completion, f32[R, P·C]."""
  del frozen, hparams
  token_logps = base.token_logps(apply, params, batch, chunk)
  policy = base.completion_sums(token_logps, batch)
  weights = batch["completion_weights"].reshape(policy.shape)
  return policy, {"lengths": base.lengths(batch), "weights": weights}


def combine(policy, fixed, extra, hparams):
  """Terms: NLL per token of every completion, and log-prob per completion."""
  del extra, hparams
  lengths, weights = fixed["lengths"], fixed["weights"]
  out = losses.nll(policy[..., None], None, lengths=lengths[..., None])
  value, factor = out["loss"]
  per_token = value, factor * weights
  metrics = {"logps/chosen": (policy, weights), "nll": per_token}
  return base.Terms({"sft": per_token}, metrics)
