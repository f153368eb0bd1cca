"""Which device holds what decides nothing of what an adapter learns."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loop, tree
from dpo_jax.config import load
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build
from tests import conftest

UPDATES, DEVICES = 10, 8


@functools.cache
def run_of(rule, zero):
  config = load.load_config(
    str(conftest.ROOT / f"configs/dpo.py:smoke,lora,optim={rule}"),
    (
      *(f"lora.zero={zero}", f"train.steps={UPDATES}", "data.batch_size=16"),
      *("optim.learning_rate=1e-6", "data.eval=None"),
    ),
  )
  return build.prepare(config)


def learned(run, order):
  """(trained tree at step 0, that after 10 updates, the last metrics).

  Args:
    order: of the devices' shares of the rows.
  """
  state = loop.begin(run, None)[1]
  start, setup = jax.device_get(state.params), run.setup
  for number in range(UPDATES):
    batch, _ = run.feed.loader.batch(number)
    batch = {
      name: x.reshape(DEVICES, -1, *x.shape[1:])[order].reshape(x.shape)
      for name, x in batch.items()
    }
    batch = run_lib.place_batch(batch, setup.mesh, setup.mode)
    state, metrics = run.step(state, batch, run.hparams)
  return start, jax.device_get(state.params), metrics


@pytest.mark.slow
@pytest.mark.parametrize(
  ("rule", "zero"),
  list(itertools.product(("rmsprop", "adamw"), ("a", "b"))),
)
def test_a_permutation_of_devices_leaves_the_first_ten_updates_alone(
  rule, zero
):
  """Also where a step is as long for a gradient of rounding as for any."""
  run = run_of(rule, zero)
  start, one, metrics = learned(run, np.arange(DEVICES))
  order = np.random.default_rng(0).permutation(DEVICES)
  _, other, _ = learned(run, order)
  moved = tree.norm(jax.tree.map(jnp.subtract, one, start))
  difference = tree.norm(jax.tree.map(jnp.subtract, one, other))
  # 2e-6 seen, with RMSprop and B = 0.
  assert float(difference) < 1e-3 * float(moved)
  assert float(metrics["rewards/margins"]) > 0  # learning has begun
