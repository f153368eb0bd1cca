"""Metrics of a batch of comparisons that no loss reports itself."""

import jax
import jax.numpy as jnp

_BINS = 10


def of_pairs(out, fixed, ratios):
  """Diagnostics of the first and the last completion of each comparison.

  Args:
    out: of a loss, with its reward metrics.
    fixed: "lengths", "ended" f32[R, Q, C], and of rankings "present", see
      preference.features.
    ratios: Δ f32[R, Q, C] in nats; or None if the loss reads no reference, and
      its rewards are not those of a Bradley–Terry model.
  Returns: {name: f32[R, Q]}.
  """
  present = fixed.get("present")

  def ends(values):
    if present is None:
      return values[..., 0], values[..., 1]
    last = jnp.sum(present, axis=-1, keepdims=True) - 1
    worst = jnp.take_along_axis(values, jnp.maximum(last, 0), axis=-1)
    return values[..., 0], worst[..., 0]

  metrics = {}
  for name in ("lengths", "ended"):
    sides = ends(fixed[name])
    metrics[f"{name}/chosen"], metrics[f"{name}/rejected"] = sides
  if ratios is None:
    return metrics
  chosen, rejected = ends(jax.lax.stop_gradient(ratios))
  fall = (chosen < 0) & (rejected < 0)
  metrics["drift/chosen"], metrics["drift/rejected"] = chosen, rejected
  metrics["drift/displaced"] = fall.astype(jnp.float32)
  if "rewards/margins" in out:
    margin = out["rewards/margins"]
    metrics["gradient_weight"] = jax.nn.sigmoid(-margin)
    metrics |= calibration(margin)
  return metrics


def calibration(margin):
  """By how much the winner's probability is overestimated, in bins of it.

  A reward gives the completion it prefers the probability
  p = σ(|margin|) in [½, 1]; the label says whether it won.
  """
  probability = jax.nn.sigmoid(jnp.abs(margin))
  won = 0.5 * (1 + jnp.sign(margin))
  excess = probability - won
  place = jnp.clip(((probability - 0.5) * 2 * _BINS).astype(int), 0, _BINS - 1)
  bins = {
    f"calibration/{k}": jnp.where(place == k, excess, 0.0) for k in range(_BINS)
  }
  return {**bins, "overconfidence": excess}


def weighted(value, weights):
  """(values, weights) of what a loss returned under a name."""
  if isinstance(value, tuple):
    return value[0], weights * value[1]
  return value, weights


def by_source(metrics, source, count):
  """Each metric of each source apart: source0/…, if there are several.

  Args:
    metrics: {name: (values, weights)}, as it returns them.
    source: i32[R, Q] of each comparison.
    count: sources there are.
  """
  if count == 1:
    return {}
  out, there = {}, {}  # one array of weights for all that share it
  for name, (values, weights) in metrics.items():
    for k in range(count):
      if (id(weights), k) not in there:
        there[id(weights), k] = jnp.where(source == k, weights, 0.0)
      out[f"source{k}/{name}"] = values, there[id(weights), k]
  return out


def derived(means, totals):
  """Metrics with what follows from means over all comparisons.

  For each accuracy its 95 % Wilson interval; one calibration error,
  Σ_k |mean excess in bin k|, for the bins; of a mean square the standard
  deviation; of a critic 1 − Var(error) / Var(return). What nothing had weight
  for is NaN.

  Args: {name: mean} and {name: Σ weights}.
  Returns: {name: value}.
  """
  metrics, errors = {}, {}
  explained = "value/explained_variance"
  if f"{explained}/error" in means:
    means = dict(means)
    error, square, average, average_square = (
      means.pop(f"{explained}/{part}")
      for part in ("error", "error_square", "return", "return_square")
    )
    spread = average_square - jnp.square(average)
    metrics[explained] = 1 - (square - jnp.square(error)) / spread
  for name, mean in means.items():
    prefix, bins, _ = name.rpartition("calibration/")
    if bins:
      error = jnp.where(totals[name] > 0, jnp.abs(mean), jnp.nan)
      errors.setdefault(f"{prefix}calibration_error", []).append(error)
      continue
    metrics[name] = jnp.where(totals[name] > 0, mean, jnp.nan)
    if name.endswith("rewards/square"):
      root = name.removesuffix("square")
      spread = metrics.pop(name) - jnp.square(means[f"{root}mean"])
      metrics[f"{root}std"] = jnp.sqrt(jnp.maximum(spread, 0.0))
    if name.endswith("rewards/accuracies"):
      low, high = wilson(metrics[name], totals[name])
      metrics[f"{name}_low"], metrics[f"{name}_high"] = low, high
  return metrics | {name: sum(parts) for name, parts in errors.items()}


def wilson(share, count):
  """The 95 % interval of a share of `count` trials; a tie counts one half.

      (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n),  z = 1.96

  Source: E. B. Wilson, JASA 22 (1927).
  """
  z, n = 1.959964, jnp.maximum(count, 1e-30)
  centre = share + z**2 / (2 * n)
  spread = z * jnp.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
  scale = 1 + z**2 / n
  return (centre - spread) / scale, (centre + spread) / scale
