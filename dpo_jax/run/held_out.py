"""Held-out means of an objective: of comparisons, or of SFT completions."""

import jax

from dpo_jax.run import build
from dpo_jax.train import step


def evaluate(setup, algorithm, state, hparams, of):
  """Means over the whole of data.eval.

  Args:
    setup: build.Setup.
    algorithm: its Algorithm.
    state: TrainState; params, frozen and extra are read.
    hparams: as in training.
    of: what state.params is, "adapter" or "policy".
  Returns: {metric: float}; "loss" is the sum of the means of all losses.
  """
  loader, _ = build.held_out_loader(setup)
  sums = build.held_out_sums(setup, algorithm, of)
  nums, dens = {}, {}
  for number in range(loader.steps):
    batch, _ = build.place_batch(setup, loader, number)
    parts = jax.device_get(sums(state, batch, hparams))
    for total, part in zip((nums, dens), parts, strict=True):
      for name, value in part.items():
        total[name] = total.get(name, 0.0) + float(value)
  return {k: float(v) for k, v in step.means_of(nums, dens).items()}
