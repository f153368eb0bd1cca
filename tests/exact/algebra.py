"""One loss of given log-probs, in f64."""

import numpy as np

from dpo_jax.ops import losses
from tests.exact import world as world_lib


def loss_of(name, policy, ref, **kwargs):
  """f64[...] of a loss of LOSSES; kwargs as the loss takes them."""
  fn = losses.LOSSES[name].fn
  return world_lib.compute(
    lambda policy, ref: fn(policy, ref, **kwargs)["loss"], policy, ref
  )


def random_logps(*shape, seed=0):
  return -10 * np.random.default_rng(seed).random((2, *shape))
