"""DPO and its family: comparisons of completions under policy and reference.

    features   log-probs of every completion, and what the loss needs beside
    combine    the loss of each comparison, and its metrics

`combine` sees no model, only f32 per comparison; a loss that couples the batch
gets the features of the whole global batch (see train/step.py).
"""

import functools

import jax
import jax.numpy as jnp

from dpo_jax.algos import base, diagnostics
from dpo_jax.algos import needs as needs_lib
from dpo_jax.algos import terms as terms_lib
from dpo_jax.ops import logprobs


def make(config, apply):
  """The Algorithm of `config.loss`.

  Args:
    config: reads loss, ref, ref_mix, ref_every, lora, data and log.tokens.
    apply: (params, batch) -> (hidden, Head).
  """
  parts = terms_lib.of(config.loss)
  wanted = {name for part in parts for name in part.loss.needs}
  terms_lib.check_reference(config.ref, config.lora is not None, parts)
  with_ref, follows = config.ref != "none", config.ref == "ema"
  own = {name: digest for p in parts for name, digest in p.code.items()}
  algorithm = base.Algorithm(
    data=terms_lib.kind_of(config.loss),
    features=functools.partial(
      features,
      apply=apply,
      wanted=tuple(sorted(wanted)),
      with_ref=with_ref,
      tokens=config.log.tokens,
    ),
    combine=functools.partial(
      combine,
      parts=parts,
      sources_count=base.sources_count(config.data),
      with_ref=with_ref,
    ),
    needs=frozenset(wanted),
    batch_level=any(part.loss.batch_level for part in parts),
    extra=functools.partial(_extra, ema=follows, kept="running" in wanted),
    # A loss of the user's own may read more than Δ.
    first=None if own else functools.partial(_first, parts=parts),
    code=own,
  )
  if with_ref:
    whole = "sequence_kl" in wanted
    prepare = functools.partial(reference_logps, apply=apply, outputs=whole)
    algorithm = algorithm._replace(prepare=prepare)
  if follows:
    how = {"mix": config.ref_mix, "every": config.ref_every}
    algorithm = algorithm._replace(update=functools.partial(_follow, **how))
  return algorithm


def reference_logps(batch, frozen, extra, *, apply, outputs):
  """Adds ref_token_logps f32[R, S], unless the batch brings them.

  Args:
    batch: rows, see data.batch.rows.
    frozen: holds the reference as "ref", or
    extra: does, where it follows the policy.
    outputs: whether to add its (hidden, Head) too, as ref_outputs.
  Raises: ValueError if there is neither a cached nor a frozen reference.
  """
  if "ref_token_logps" in batch:
    return batch
  params = extra.get("ref", frozen.get("ref"))
  if params is None:
    raise ValueError(
      "the batch brings no ref_token_logps and there is no frozen reference: "
      "give its loader them (run.forward.attach_reference), or set "
      "ref = 'frozen'"
    )
  ref_outputs = jax.lax.stop_gradient(apply(params, batch))
  logps = jax.lax.stop_gradient(base.head_logps(ref_outputs, batch))
  more = {"ref_outputs": ref_outputs} if outputs else {}
  return {**batch, "ref_token_logps": logps, **more}


def features(
  params, frozen, batch, hparams, rng, *, apply, wanted, with_ref, tokens
):
  """What the losses read of each comparison.

  Each completion's log-prob is computed once and gathered by `pairs`, so four
  completions serve six comparisons.

  Args:
    params: the policy.
    batch: rows with ref_token_logps, see data.batch.rows.
    rng: of this update, for losses that draw tokens.
    wanted: names of needs.NEEDS.
    tokens: whether to add the entropy and the top-1 hits of the scored tokens.
  Returns: (moving, fixed): dicts of arrays [R, Q, …]; losses are differentiated
    through `moving` alone.
  """
  del frozen, hparams  # read by `prepare` and by `combine`
  outputs = apply(params, batch)
  token_logps, more = base.head_scores(outputs, batch, tokens)
  # Without a reference the log-ratio of the loss is the policy's own log-prob.
  ref = batch["ref_token_logps"] if with_ref else jnp.zeros_like(token_logps)
  scored = needs_lib.Scored(batch, token_logps, ref, outputs, rng)
  example = batch["pairs"][..., 0] // base.completions(batch)
  values = {
    "policy_logps": needs_lib.of_completions(scored, token_logps),
    "ref_logps": needs_lib.of_completions(scored, ref),
    "lengths": needs_lib.lengths(scored),
    "ended": needs_lib.of_slots(batch, "ended"),
    "weights": batch["weights"],
    "source": logprobs.select(batch["source"], example),
    "tokens": {
      name: needs_lib.of_completions(scored, each)
      for name, each in more.items()
    },
  }
  for name in wanted:
    if name not in values and name not in needs_lib.KEPT:
      values[name] = needs_lib.NEEDS[name](scored)
  moving = {k: v for k, v in values.items() if k in needs_lib.MOVING}
  fixed = {k: v for k, v in values.items() if k not in moving}
  return moving, jax.lax.stop_gradient(fixed)


def combine(moving, fixed, extra, hparams, *, parts, sources_count, with_ref):
  """Terms of the comparisons of a batch.

  Args:
    moving, fixed: of `features`.
    extra: of the TrainState; holds "running" where a loss keeps it.
    hparams: holds the numeric fields of config.loss.
  """
  values = {**moving, **fixed, **extra}
  weights, terms, metrics, kept = fixed["weights"], {}, {}, {}
  for part in parts:
    out = part.out(values, hparams)
    kept |= {k: out.pop(k) for k in needs_lib.KEPT if k in out}
    out = {
      name: diagnostics.weighted(value, weights) for name, value in out.items()
    }
    value, factor = out.pop("loss")
    if part.weight is not None:
      metrics[f"losses/{part.name}"] = jax.lax.stop_gradient(value), factor
      value = hparams[part.weight] * value
    terms[part.name] = value, factor
    metrics = {**out, **metrics}
  ratios = values["policy_logps"] - values["ref_logps"]
  reads = with_ref and any(part.loss.reference for part in parts)
  if "labels" not in fixed:
    plain = {name: value for name, (value, _) in metrics.items()}
    more = diagnostics.of_pairs(plain, fixed, ratios if reads else None)
    metrics |= {name: (value, weights) for name, value in more.items()}
  metrics |= _of_tokens(fixed)
  sourced = metrics
  if len(parts) == 1:
    sourced = {**metrics, "loss": terms[parts[0].name]}
  sourced = jax.lax.stop_gradient(sourced)
  metrics |= diagnostics.by_source(sourced, fixed["source"], sources_count)
  peaks = {}
  if reads and "rewards/chosen" in metrics:
    rewards = [metrics[f"rewards/{s}"][0] for s in ("chosen", "rejected")]
    peaks["rewards/largest"] = jnp.maximum(*map(jnp.abs, rewards)), weights
    drift = jnp.max(jnp.abs(jax.lax.stop_gradient(ratios)), axis=-1)
    peaks["drift/largest"] = drift, weights
  return base.Terms(terms, metrics, peaks, kept)


def _of_tokens(fixed):
  """Entropy (nats) and top-1 accuracy per token, where they are logged.

  Of all completions that are compared; of labelled ones, of the first, since
  another may be there that nobody trains.
  """
  of = slice(0, 1) if "labels" in fixed else slice(None)
  sums, count = jax.tree.map(
    lambda x: jnp.sum(x[..., of], axis=-1), (fixed["tokens"], fixed["lengths"])
  )
  return base.per_token(sums, count, fixed["weights"])


def _extra(params, *, ema, kept):
  """What the state keeps between steps, at step 0."""
  extra = {}
  if ema:
    extra["ref"] = jax.tree.map(jnp.copy, params)
  if kept:
    extra["running"] = {"mean": jnp.float32(0), "count": jnp.float32(0)}
  return extra


def _follow(extra, params, step, metrics, *, mix, every):
  """The reference that follows the policy (TR-DPO).

      every `every` steps  π_ref ← α π + (1 − α) π_ref,  α = `mix`

  Source: arXiv:2404.09656.
  """
  del metrics

  def blend(ref, new):
    mixed = mix * new.astype(jnp.float32) + (1 - mix) * ref.astype(jnp.float32)
    return jnp.where(step % every == 0, mixed.astype(ref.dtype), ref)

  return {**extra, "ref": jax.tree.map(blend, extra["ref"], params)}


def _first(hparams, noise, *, parts):
  """The loss where policy = reference, and how far rounding may move it.

  Args:
    noise: largest |Δ| in nats.
  Returns: (lowest, at Δ = 0, highest) over the corners of ±noise; or None where
    a loss depends on more than Δ.
  """
  of_ratios = ("policy_logps", "prefix_logps", "common_logps")
  of_ref = ("ref_logps", "ref_prefix_logps", "ref_common_logps")
  known = {"weights", "running", *of_ratios, *of_ref}
  if not all(p.loss.reference and set(p.loss.needs) <= known for p in parts):
    return None

  def total(ratios):
    values = {
      "weights": jnp.ones(1),
      **_extra(None, ema=False, kept=True),
      **dict.fromkeys(of_ratios, ratios[None]),
      **dict.fromkeys(of_ref, jnp.zeros((1, 2))),
    }
    out = 0.0
    for part in parts:
      weight = 1.0 if part.weight is None else hparams[part.weight]
      out += weight * part.out(values, hparams)["loss"][0]
    return out

  corners = [(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
  losses = jax.vmap(total)(noise * jnp.float32(corners))
  return float(jnp.min(losses)), float(losses[0]), float(jnp.max(losses))
