"""What a run checks of itself, at its first step and of its reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.algos import base, preference
from dpo_jax.ops import losses
from dpo_jax.train import health
from dpo_jax.train import state as state_lib
from tests.parallel import test_topology as topology

# Losses that read more than Δ: lengths, scores, distributions.
OF_DATA = {
  *("ipo", "ln_dpo", "r_dpo", "odpo", "tdpo1", "tdpo2", "wpo"),
  *("kto", "bco_unpaired", "plackett_luce"),
}


def bounds_of(name):
  config = topology.config_of(loss=name)
  algorithm = preference.make(config, None)
  hparams = {
    k: jnp.float32(v) for k, v in base.numeric_fields(config.loss).items()
  }
  return functools.partial(algorithm.first, hparams)


def metrics(loss, noise=0.0, beta=0.1):
  return {
    "loss": np.float32(loss),
    "drift/largest": np.float32(noise),
    "rewards/largest": np.float32(beta * noise),
  }


@pytest.mark.parametrize(
  ("name", "loss"),
  [("dpo", np.log(2)), ("hinge", 1.0), ("chi_po", np.log(2)),
   ("dpop", np.log(2)), ("nca", 2 * np.log(2)), ("bco", 2 * np.log(2)),
   ("kto_pair", 0.5),
   ("sppo", 2 * 500.0**2), ("apo_zero", 1.0), ("aot", np.log(2))],
)  # fmt: skip
def test_the_loss_where_policy_is_reference_is_known(name, loss):
  low, at, high = bounds_of(name)(0.0)
  np.testing.assert_allclose([low, at, high], loss, rtol=1e-6)
  line = health.first_step(metrics(loss), bounds_of(name), 0.1)
  assert "rewards within 0 of 0" in line
  assert f"{loss:.6g} without rounding" in line


def test_it_is_unknown_where_it_depends_on_the_data():
  for name, loss in losses.LOSSES.items():
    if loss.reference and not loss.of_rewards:
      assert (bounds_of(name)(0.0) is None) == (name in OF_DATA), name
  line = health.first_step(metrics(0.3), bounds_of("ipo"), 0.1)
  assert line.endswith("loss 0.3")
  assert all(losses.LOSSES[name].reference for name in OF_DATA)


@pytest.mark.parametrize("name", ["dpo", "dpop", "sppo", "exo", "cal_dpo"])
def test_rounding_may_move_the_loss_as_far_as_it_can(name):
  """DPOP's penalty makes 25 of each nat by which the chosen falls."""
  noise = 0.01
  low, at, high = bounds_of(name)(noise)
  assert low < at <= high
  for loss in (low, high):
    health.first_step(metrics(loss, noise), bounds_of(name), 0.1)
  beyond = high + 0.01 * max(1, abs(high))
  with pytest.raises(ValueError, match="does not see the rewards"):
    health.first_step(metrics(beyond, noise), bounds_of(name), 0.1)


@pytest.mark.parametrize("noise", [2.0, float("nan")])
def test_a_reference_that_is_another_is_refused(noise):
  with pytest.raises(ValueError, match=r"more than train.max_noise = 0.1"):
    health.first_step(metrics(np.log(2), noise), bounds_of("dpo"), 0.1)


def test_a_swapped_sign_of_the_loss_is_refused():
  with pytest.raises(
    ValueError, match=r"is -0.693147, where .* gives 0.693147"
  ):
    health.first_step(metrics(-np.log(2)), bounds_of("dpo"), 0.1)


def test_a_reference_that_changed_is_found():
  params = {"a": jnp.arange(4.0), "b": {"c": jnp.ones((2, 2))}}
  before = state_lib.fingerprint(params)
  health.reference_is(params, before)
  params["b"]["c"] = params["b"]["c"].at[0, 1].add(1e-7)
  with pytest.raises(RuntimeError, match=r"the reference changed .* in b/c"):
    health.reference_is(params, before)
