"""The feed that a config asks for, by the data of its algorithm."""

import functools

import jax.numpy as jnp

from dpo_jax import lookup
from dpo_jax.algos import base
from dpo_jax.config import load
from dpo_jax.data.tokens import comparisons
from dpo_jax.models import decoder
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import feed


def loader_feed(config, setup, algorithm):
  """The Feed of data.train: shuffled, endless, by a Loader."""
  ways = mesh_lib.row_parallelism(setup.mesh) * config.train.accumulation
  loader, about = feed.load(
    *(setup, algorithm, config.data.train, "data.train", ways),
    steps=functools.partial(total_steps, config),
  )
  about += "; " + decoder.attention_line(
    *(config.model.attention, setup.model, setup.mesh.devices.flat[0]),
    *(config.data.shared, loader.shapes, (ways, config.mesh.tensor)),
  )
  return feed.of_loader(loader, about, setup.mesh, setup.mode)


def rollout_feed(config, setup, algorithm):
  """The Feed of what the policy samples for the prompts of data.train."""
  # By name: what draws and scores is built on runs, such as a reward model's.
  rollouts = lookup.resolve("rollouts.feed", "dpo_jax.eval")
  return rollouts(
    setup,
    algorithm,
    load.plain(config.rollout),
    config.data.batch_size,
    config.train.accumulation,
    hyper_params(config),
  )


# By the `data` of an algorithm: functions of (config,
# Setup, Algorithm of what is trained).
FEEDS = {
  **dict.fromkeys(comparisons.FORMS, loader_feed),
  "prompts": rollout_feed,
}


def total_steps(config, size):
  """Updates of the run on `size` examples, from train.steps or train.epochs."""
  if config.train.steps is not None:
    return config.train.steps
  examples = round(config.train.epochs * size)
  return max(1, -(-examples // config.data.batch_size))


def hyper_params(config):
  """The traced scalars of a step; changing one never recompiles."""
  numeric = base.numeric_fields(config.loss)
  numeric["learning_rate"] = config.optim.learning_rate
  return {k: jnp.float32(v) for k, v in numeric.items()}
