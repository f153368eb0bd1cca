"""Which updates are refused, and their counts: all on the device.

The counts are in the state, so that no step is missed whatever is logged, and a
run that resumes goes on counting.
"""

import jax
import jax.numpy as jnp

_WINDOW = 50  # norms that the running mean looks back on
_TRUSTED = 20  # norms before which it is no measure


def create(max_spike):
  """The counts of a run that begins, zeros.

  Args:
    max_spike: of optim.Optimizer.
  Returns: {"row", "longest", "total"}, i32: updates refused for not being
    finite: those in a row up to now, the most in a row, and all. With
    `max_spike` also {"spikes": i32, all that were refused for it; "norm": f32,
    the running mean of gradient norms; "seen": i32, norms in it}.
  """
  names = ["row", "longest", "total"]
  if max_spike is None:
    return {name: jnp.zeros((), jnp.int32) for name in names}
  names += ["spikes", "seen"]
  counts = {name: jnp.zeros((), jnp.int32) for name in names}
  return {**counts, "norm": jnp.zeros((), jnp.float32)}


def judge(skipped, finite, norm, max_spike):
  """Whether an update is made, and the counts after it.

  A spike is a finite gradient whose norm is above s · mean, s = max_spike:

      mean ← mean + (min(norm, s · mean) − mean) / min(n, 50)

  It counts in the mean as far as it is allowed: a spike moves the mean by
  little, and norms that stay r times as large are taken after about
  50 · ln(r / s) / (s − 1) refused updates, so that no run stands still.

  Args:
    skipped: as of `create`.
    finite: bool, whether all of the update is.
    norm: of the gradient, before it is cut.
    max_spike: of optim.Optimizer.
  Returns: (bool, counts).
  """
  row = jnp.where(finite, 0, skipped["row"] + 1)
  counts = {
    "row": row,
    "longest": jnp.maximum(row, skipped["longest"]),
    "total": skipped["total"] + ~finite,
  }
  if max_spike is None:
    return finite, counts
  mean, bound = skipped["norm"], max_spike * skipped["norm"]
  before = jnp.where(mean > 0, skipped["seen"], 0)  # zeros measure nothing
  spike = finite & (before >= _TRUSTED) & (norm > bound)
  seen = jnp.minimum(before + 1, _WINDOW)
  moved = mean + (jnp.where(spike, bound, norm) - mean) / seen
  counts |= {
    "spikes": skipped["spikes"] + spike,
    "seen": jnp.where(finite, seen, skipped["seen"]),
    "norm": jnp.where(finite, moved, mean),
  }
  return finite & ~spike, counts


# The counts among the metrics, by the names that they have there.
METRICS = {
  "skipped": "row",
  "skipped/longest": "longest",
  "skipped/total": "total",
  "skipped/spikes": "spikes",
}


def metrics(skipped):
  """The counts as metrics, f32."""
  return {
    name: skipped[key].astype(jnp.float32)
    for name, key in METRICS.items()
    if key in skipped
  }


def told(skipped):
  """What a run refused from its first step on, or "" for nothing."""
  counts = {name: int(x) for name, x in jax.device_get(skipped).items()}
  parts = []
  if counts["total"]:
    parts.append(
      f"updates refused for not being finite: {counts['total']}, at most "
      f"{counts['longest']} in a row"
    )
  if counts.get("spikes"):
    parts.append(f"updates refused as spikes: {counts['spikes']}")
  return "; ".join(parts)


def as_saved(values, leaves):
  """The shape of a checkpoint in the form that it was written in.

  At first it held the count in a row alone.

  Args:
    values: of state.saved.
    leaves: paths of what the checkpoint holds.
  """
  if "skipped" in leaves and isinstance(values["skipped"], dict):
    return {**values, "skipped": values["skipped"]["row"]}
  return values


def upgraded(values):
  """What was read in the shape of `as_saved`, in the form of today."""
  if isinstance(values["skipped"], dict):
    return values
  # All that is known of those before: so many there were.
  row = values["skipped"]
  counts = {name: row.copy() for name in ("row", "longest", "total")}
  return {**values, "skipped": counts}
