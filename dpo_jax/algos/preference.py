"""DPO and its family: comparisons of completions under policy and reference."""

import functools
import inspect

import jax
import jax.numpy as jnp

from dpo_jax import lookup
from dpo_jax.algos import base
from dpo_jax.ops import logprobs, losses

_REFERENCES = ("frozen", "cached", "none")


def make(config, apply):
  """The Algorithm of `config.loss`.

  Args:
    config: reads loss, ref and head_chunk.
    apply: (params, batch) -> (hidden, Head).
  """
  loss = lookup.lookup(losses.LOSSES, config.loss.name, "loss.name")
  lookup.lookup(_REFERENCES, config.ref, "ref")
  static, numeric = base.split_fields(config.loss)
  _check_fields(config.loss, loss)
  prepare = base.no_preparation
  if config.ref != "none":
    prepare = functools.partial(
      reference_logps, apply=apply, chunk=config.head_chunk
    )
  return base.Algorithm(
    objective=functools.partial(
      objective,
      apply=apply,
      name=config.loss.name,
      loss=loss,
      static=static,
      numeric=tuple(numeric),
      chunk=config.head_chunk,
      with_ref=config.ref != "none",
    ),
    prepare=prepare,
    batch_level=loss.batch_level,
  )


def _check_fields(fields, loss):
  """Raises ValueError unless config.loss holds what the loss takes."""
  takes = set(inspect.signature(loss.fn).parameters)
  takes -= {"policy_logps", "ref_logps", *loss.needs}
  have = set(fields) - {"name"}
  if have != takes:
    raise ValueError(
      f"config.loss has the fields {sorted(have)}, but loss {fields.name!r} "
      f"takes {sorted(takes)}; select a loss with its own fields by the "
      f"config's argument: --config FILE.py:loss={fields.name}"
    )
  _check_ranges(fields)


def _check_ranges(loss):
  if "beta" in loss and not loss.beta > 0:
    raise ValueError(f"loss.beta = {loss.beta} must be above 0")
  if "label_smoothing" in loss and not 0 <= loss.label_smoothing < 0.5:
    raise ValueError(
      f"loss.label_smoothing = {loss.label_smoothing} must be in [0, 0.5)"
    )


def reference_logps(batch, frozen, extra, *, apply, chunk):
  """Adds ref_token_logps f32[R, S], unless the batch brings them.

  Raises: ValueError if there is neither a cached nor a frozen reference.
  """
  del extra
  if "ref_token_logps" in batch:
    return batch
  if "ref" not in frozen:
    raise ValueError(
      "the batch brings no ref_token_logps and there is no frozen reference: "
      "give the loader its own (scoring.attach_reference), or set "
      "ref = 'frozen'"
    )
  logps = base.token_logps(apply, frozen["ref"], batch, chunk)
  return {**batch, "ref_token_logps": jax.lax.stop_gradient(logps)}


def objective(
  params,
  frozen,
  batch,
  hparams,
  *,
  apply,
  name,
  loss,
  static,
  numeric,
  chunk,
  with_ref,
):
  """Terms of one batch of comparisons.

  Each completion's log-prob is computed once and gathered by `pairs`, so four
  completions serve six comparisons.

  Args:
    params: the policy.
    frozen: unused here; `prepare` has read the reference from it.
    batch: rows with ref_token_logps, see data.rows.
    hparams: holds the numeric fields of config.loss, named in `numeric`.
  """
  del frozen
  pairs = batch["pairs"]
  token_logps = base.token_logps(apply, params, batch, chunk)
  policy = base.completion_sums(token_logps, batch)
  # Without a reference the log-ratio of the loss is the policy's own log-prob.
  ref = jnp.zeros_like(policy)
  if with_ref:
    ref = base.completion_sums(batch["ref_token_logps"], batch)
  beside = {"lengths": base.lengths}
  kwargs = {
    name: logprobs.select(beside[name](batch), pairs) for name in loss.needs
  }
  out = loss.fn(
    logprobs.select(policy, pairs),
    logprobs.select(ref, pairs),
    **kwargs,
    **static,
    **{name: hparams[name] for name in numeric},
  )
  weights = batch["weights"]
  value = out.pop("loss")
  metrics = {name: (values, weights) for name, values in out.items()}
  return base.Terms({name: (value, weights)}, metrics)
