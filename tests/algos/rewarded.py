"""Runs of policy gradients on a reward of letters, small enough for a test."""

import functools
import json
from unittest import mock

import jax
import numpy as np

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.eval import rewards, rollouts
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import build
from tests import conftest

# An iteration: 8 completions, 2 epochs of 2 minibatches.
STEPS = 4


def ascii_share(_):
  """The share of a completion's characters that are ASCII, less a half."""

  def score(prompts, completions):
    del prompts
    return np.asarray([_share(text) for text in completions])

  return score


def _share(text):
  return sum(ord(c) < 128 for c in text) / max(len(text), 1) - 0.5


SCORERS = {"ascii": ascii_share}


def config_of(*overrides, arg=""):
  """The locked config of a run of two iterations."""
  spec = str(conftest.ROOT / f"configs/ppo.py:smoke{arg}")
  given = (
    *("rollout.scorer=ascii:share", "rollout.epochs=2"),
    *(f"train.steps={2 * STEPS}", "log.every=1", "checkpoint.every=1"),
  )
  return load.load_config(spec, (*given, *overrides))


@functools.cache
def alone(*overrides, arg=""):
  """`prepared`, on one device."""
  mesh = mesh_lib.of_devices(jax.devices()[:1])
  with mock.patch.object(build, "mesh_of", return_value=(mesh, "jit")):
    return build.prepare(config_of(*overrides, arg=arg))


@functools.cache
def prepared(*overrides, arg=""):
  """base.Run of `config_of`, which needs the SCORERS."""
  return build.prepare(config_of(*overrides, arg=arg))


def state_of(run):
  """The TrainState at step 0; steps donate it."""
  return loop.begin(run, None)[1]


def source_of(config, run):
  """The rollouts.Source of a run."""
  return rollouts._source(
    *(run.setup, run.algorithm, load.plain(config.rollout)),
    *(config.data.batch_size, config.train.accumulation, run.hparams),
  )


class Killed(BaseException):
  """Stands for the end of the process."""


def killed_before(run, step):
  """The run whose feed ends it when it is asked for a step."""

  def batch(number, state):
    if number == step:
      raise Killed
    return run.feed.batch(number, state)

  return run._replace(feed=run.feed._replace(batch=batch))


def registered(monkeypatch):
  """Adds SCORERS for a test."""
  for name, make in SCORERS.items():
    monkeypatch.setitem(rewards.SCORERS, name, make)


def metrics(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def checksums(folder, step):
  path = folder / "checkpoints" / str(step) / "meta" / "metadata"
  return json.loads(path.read_text())["checksums"]
