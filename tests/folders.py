"""Run folders as training leaves them, without the training."""

import contextlib
import json

import jax.numpy as jnp

from dpo_jax import loop
from dpo_jax.run import build
from tests import worlds


def run(config, workdir, step=2, seed=1):
  """Writes config.json and one checkpoint, of the first state plus noise.

  Args:
    config: as `loop.fit` takes it.
    workdir: pathlib.Path of the run folder.
    step: that the checkpoint says it was taken at.
    seed: of the noise.
  Returns: (base.Run, TrainState that was saved).
  """
  built = build.prepare(config)
  with contextlib.ExitStack() as opened:
    built, state, checkpoints = loop.restore(built, workdir, None, opened)
    params = worlds.noisy(state.params, seed)
    state = state.replace(params=params, step=jnp.int32(step))
    checkpoints.save(state, built.identity, wait=True)
  text = json.dumps(built.setup.asked, indent=2) + "\n"
  (workdir / "config.json").write_text(text)
  return built, state
