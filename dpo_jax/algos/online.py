"""Online DPO: the preference algorithm on what the policy samples.

    an iteration   completions are drawn and scored by eval.rollouts, and
                   compared by their scores in eval.comparing
    a step         the loss of `config.loss` on a minibatch of the comparisons

Nothing of the loss is another than offline (see preference). The log-probs are
those of the policy whatever the temperature of the draws: that says what is
compared, not which policy is trained.

Source: arXiv:2402.04792.
"""

import functools

import jax
import jax.numpy as jnp

from dpo_jax.algos import base, preference, terms


def make(config, apply):
  """The Algorithm of `config.loss`, whose data are prompts.

  Args: see preference.make.
  Raises: ValueError for a loss of single completions with labels.
  """
  algorithm = preference.make(config, apply)
  return algorithm._replace(
    data="prompts",
    compares=_compares(terms.of(config.loss), algorithm.data),
    held_out_data=algorithm.data,
    features=functools.partial(features, inner=algorithm.features),
    combine=functools.partial(combine, inner=algorithm.combine),
  )


def _compares(parts, kind):
  """Algorithm.compares of the Parts of a loss.

  Args:
    kind: what a comparison of it is made of.
  """
  if all(part.loss.best_alone for part in parts):
    return "best"
  if kind not in ("pairs", "rankings"):
    names = "+".join(part.name for part in parts)
    raise ValueError(
      f"loss {names!r} with algo = 'online': it is of single completions with "
      "labels, and scores only say which of two is better; take a loss of "
      "pairs, for example --config online:loss=kto_pair or loss=bco"
    )
  return kind


def features(params, frozen, batch, hparams, rng, *, inner):
  """Those of the preference algorithm, and what is known of the draws.

  Args: see preference.features; batches of data.eval bring no draws.
  """
  moving, fixed = inner(params, frozen, batch, hparams, rng)
  if "old_logps" not in batch:
    return moving, fixed
  scores, weights = batch["scores"], batch["completion_weights"]
  flat = (len(scores), -1)
  mean = jnp.sum(weights * scores, axis=-1) / jnp.maximum(
    jnp.sum(weights, axis=-1), 1.0
  )
  square = weights * jnp.square(scores - mean[..., None])
  drawn = {
    "scores": scores.reshape(flat),
    "ended": batch["ended"].reshape(flat),
    "lengths": base.lengths(batch),
    "weights": weights.reshape(flat),
    "variance": jnp.mean(square, axis=-1),
    "prompts": weights[..., 0],
    "identical": batch["identical"],
    "tied": batch["tied"],
    "compared": (batch["pairs"][..., 0] < base.slots(batch)).astype(
      jnp.float32
    ),
  }
  if "ref_token_logps" in batch:
    ratios = batch["old_logps"] - batch["ref_token_logps"]
    drawn["kl"] = base.completion_sums(ratios, batch)
  return moving, jax.lax.stop_gradient({**fixed, "drawn": drawn})


def combine(moving, fixed, extra, hparams, *, inner):
  """Terms of the preference algorithm, with metrics of the draws.

  objective/kl            log π − log π_ref of a completion, π as it drew it
  objective/score_spread  standard deviation of the scores of a prompt
  comparisons/…           shares: of identical completions, of equal scores,
                          and of those that are trained on
  """
  out = inner(moving, fixed, extra, hparams)
  if "drawn" not in fixed:
    return out
  drawn = fixed["drawn"]
  names = ["scores", "ended", *(["kl"] if "kl" in drawn else [])]
  metrics = {f"objective/{k}": (drawn[k], drawn["weights"]) for k in names}
  metrics |= {
    "objective/length": (drawn["lengths"], drawn["weights"]),
    "objective/score_spread": (jnp.sqrt(drawn["variance"]), drawn["prompts"]),
    "comparisons/identical": (drawn["identical"], drawn["compared"]),
    "comparisons/tied": (drawn["tied"], drawn["compared"]),
    "comparisons/used": (
      (fixed["weights"] > 0).astype(jnp.float32),
      drawn["compared"],
    ),
  }
  return out._replace(metrics=out.metrics | metrics)
