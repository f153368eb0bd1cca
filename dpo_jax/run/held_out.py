"""Held-out means of an algorithm: of comparisons, or of SFT completions."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from dpo_jax.algos import base
from dpo_jax.run import feed
from dpo_jax.train import step


class HeldOut(NamedTuple):
  """What is measured on data.eval.

  Attributes:
    loader: () -> (Loader of one pass, line about it); read when first asked
      for, and kept.
    algorithm, hparams: as in training.
    sums: the compiled (state, batch, hparams) -> sums of train.step.sums.
  """

  loader: Callable
  algorithm: base.Algorithm
  hparams: dict
  sums: Callable


def evaluate(setup, held_out, state):
  """{metric: mean over the whole of data.eval}, of a TrainState.

  "loss" is the sum of the means of all losses.
  """
  loader, _ = held_out.loader()
  nums, dens = {}, {}
  for number in range(loader.steps):
    batch, _ = feed.place(loader, number, setup.mesh, setup.mode)
    parts = jax.device_get(held_out.sums(state, batch, held_out.hparams))
    for total, part in zip((nums, dens), parts, strict=True):
      for name, value in part.items():
        total[name] = total.get(name, 0.0) + float(value)
  return {k: float(v) for k, v in step.means_of(nums, dens).items()}
