"""What must hold in any run: at its first step, and of its reference."""

from dpo_jax.train import state as state_lib


def first_step(metrics, at_reference, limit):
  """A line about a run's first step, where policy = reference.

  Args:
    metrics: of the step, taken before its update: "loss"; and
      "rewards/largest" and "drift/largest", the largest |reward| and |Δ|,
      which would be 0 but for rounding: the noise floor of this dtype, mesh
      and reference.
    at_reference: of algos.base.Algorithm, with its hparams bound; or None.
    limit: of the rewards.
  Raises: ValueError if rewards or loss are further off.
  """
  noise, loss = float(metrics["rewards/largest"]), float(metrics["loss"])
  if not noise <= limit:
    raise ValueError(
      f"at step 0 policy and reference differ by rewards of up to {noise:.3g}, "
      f"more than train.max_noise = {limit}: is the reference another model, "
      "or of another precision? If this is the rounding of your dtype, raise "
      "train.max_noise"
    )
  line = f"step 0: rewards within {noise:.2g} of 0 (policy = reference), loss "
  bounds = None
  if at_reference is not None:
    bounds = at_reference(float(metrics["drift/largest"]))
  if bounds is None:
    return f"{line}{loss:.6g}"
  low, expected, high = bounds
  slack = 1e-3 * max(1.0, abs(expected))
  if not low - slack <= loss <= high + slack:
    raise ValueError(
      f"at step 0 the loss is {loss:.6g}, where policy = reference gives "
      f"{expected:.6g}: it does not see the rewards that are logged"
    )
  return f"{line}{loss:.6g} ({expected:.6g} without rounding)"


def reference_is(params, fingerprint):
  """Raises RuntimeError if the reference is not what it was.

  Args:
    params: of the reference.
    fingerprint: of state.fingerprint, as plain values, when the run began.
  """
  changed = [
    path
    for path, value in state_lib.fingerprint(params).items()
    if fingerprint.get(path) != value
  ]
  if changed:
    raise RuntimeError(
      f"the reference changed during the run, in {changed[0]} and "
      f"{len(changed) - 1} more: nothing writes to it, so suspect the memory; "
      "the last checkpoint is kept"
    )
