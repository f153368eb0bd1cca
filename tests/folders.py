"""Run folders that no step has trained: what reads a run needs no more.

And built configs with other questions asked of them.
"""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.run import build
from dpo_jax.train import health
from tests import worlds


def untrained(config, workdir, step=2, *, seed=1, noise=0.1, run=None):
  """The folder of a run, as `fit` leaves it, of parameters plus noise.

  A folder that is there is gone on with, as `fit` would.

  Args:
    config: of the run.
    workdir: gets config.json and one checkpoint.
    step: of the checkpoint.
    seed: of the noise.
    noise: standard deviation of what training would have changed.
    run: base.Run of the config, where it is already built.
  Returns: (Run that knows its reference, TrainState that was saved).
  """
  run = build.prepare(config) if run is None else run
  with health.lock(workdir), contextlib.ExitStack() as opened:
    run, state, checkpoints = loop.restore(run, workdir, None, opened)
    params = worlds.noisy(state.params, seed, noise)
    state = state.replace(
      step=jax.device_put(jnp.int32(step), state.step.sharding),
      params=jax.device_put(params, jax.tree.map(_sharding, state.params)),
    )
    checkpoints.save(state, run.identity, wait=True)
  text = json.dumps(run.setup.asked, indent=2) + "\n"
  (pathlib.Path(workdir) / "config.json").write_text(text)
  return run, state


def _sharding(x):
  return x.sharding


def sharing(config, run):
  """The Run of a config that differs from another's in how long and how often.

  In steps, in what is logged and when, and in traced fields: what is compiled
  and the data stay.
  """
  return build.sharing(config, run)._replace(
    total=config.train.steps, rhythm=build.rhythm_of(config)
  )


def asking(setup, config):
  """A Setup whose data and samples are those of another config.

  The model and its compiled functions stay.
  """
  return setup._replace(
    data=load.plain(config.data),
    sample=load.plain(config.sample),
    asked=config.to_dict(),
  )
