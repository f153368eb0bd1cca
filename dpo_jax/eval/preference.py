"""Held-out means of an objective: of comparisons, or of SFT completions."""

from dpo_jax.ops import reduce


def evaluate(sums, state, hparams, batches):
  """Means over a whole evaluation set.

  Args:
    sums: compiled train.step.sums.
    state: TrainState.
    hparams: as in training.
    batches: iterable of placed batches.
  Returns: {metric: float}; "loss" is the sum of the means of all losses.
  """
  nums, dens = {}, {}
  for batch in batches:
    for total, part in zip(
      (nums, dens), sums(state, batch, hparams), strict=True
    ):
      for name, value in part.items():
        total[name] = total.get(name, 0.0) + float(value)
  means = {k: float(v) for k, v in reduce.divide(nums, dens).items()}
  loss = sum(v for k, v in means.items() if k.startswith("loss/"))
  metrics = {k: v for k, v in means.items() if not k.startswith("loss/")}
  return {"loss": loss, **metrics}
