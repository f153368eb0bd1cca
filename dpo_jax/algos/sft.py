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
    functools.partial(objective, apply=apply, chunk=config.head_chunk),
    base.no_preparation,
  )


def objective(params, frozen, batch, hparams, *, apply, chunk):
  """Terms: NLL per token of every completion, and log-prob per completion."""
  del frozen, hparams
  token_logps = base.token_logps(apply, params, batch, chunk)
  policy = base.completion_sums(token_logps, batch)
  lengths = base.lengths(batch)
  nll = losses.sft(policy[..., None], None)["loss"]
  weights = batch["completion_weights"].reshape(policy.shape)
  per_token = (nll / lengths.clip(1), lengths * weights)
  metrics = {"logps/chosen": (policy, weights), "nll": per_token}
  return base.Terms({"sft": per_token}, metrics)
