"""Which updates are refused, and their counts: all on the device.

The counts are in the state, so that no step is missed whatever is logged, and a
run that resumes goes on counting.
"""

import jax
import jax.numpy as jnp


def create():
  """The counts of a run that begins, zeros.

  Returns: {"row", "longest", "total"}, i32: updates refused for not being
    finite: those in a row up to now, the most in a row, and all.
  """
  names = "row", "longest", "total"
  return {name: jnp.zeros((), jnp.int32) for name in names}


def judge(skipped, finite):
  """Whether an update is made, and the counts after it.

  Args:
    skipped: as of `create`.
    finite: bool, whether all of the update is.
  Returns: (bool, counts).
  """
  row = jnp.where(finite, 0, skipped["row"] + 1)
  counts = {
    "row": row,
    "longest": jnp.maximum(row, skipped["longest"]),
    "total": skipped["total"] + ~finite,
  }
  return finite, counts


# The counts among the metrics, by the names that they have there.
METRICS = {
  "skipped": "row",
  "skipped/longest": "longest",
  "skipped/total": "total",
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
  if not counts["total"]:
    return ""
  return (
    f"updates refused for not being finite: {counts['total']}, at most "
    f"{counts['longest']} in a row"
  )


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
