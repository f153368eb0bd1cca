"""Bytes of a device that a stage holds, without activations."""

import functools

import jax

from dpo_jax import tree
from dpo_jax.config import load
from dpo_jax.models import decoder
from dpo_jax.run import build, memory
from dpo_jax.train import optim


def state(config, model, steps):
  """Bytes of a device for what a run trains and keeps."""
  # What it starts from may be still to come, and changes no size.
  alone = load.at(config, {"init_from": None})
  if alone.rollout is not None and alone.rollout.get("critic_from"):
    alone = load.at(alone, {"rollout.critic_from": None})
  built = decoder.build(*model)
  trained, _ = build.trained_of(alone, built)
  base, rng = shapes_of(model), jax.random.key(0)
  shapes = jax.eval_shape(trained.init, base, rng)
  optimizer = optim.make(config.optim, steps)
  updated, _ = tree.split(shapes, optimizer.trains)
  slots = memory.slots_of(optimizer, updated)
  whole = memory.state(tree.nbytes(shapes), tree.nbytes(updated), slots)
  frozen = tree.nbytes(base) * trained.frozen_bits / 32
  return (whole + frozen) / _ways(config)


def drawing(config, model, at_once, batch, known):
  """Bytes of a device for a policy and what it draws at once."""
  held = tree.nbytes(shapes_of(model)) / _ways(config)
  return held + cache(model, at_once, batch, known)


@functools.cache
def shapes_of(model):
  """The parameters of a known.Model in f32, abstract."""
  return jax.eval_shape(decoder.build(*model).init, jax.random.key(0))


def cache(model, at_once, batch, known):
  """Bytes of a device for the keys and values of what is drawn at once."""
  c = model.config
  width = 2 if c.dtype == "bfloat16" else 4
  of_token = 2 * c.layers * c.kv_heads * c.head_dim * width
  drawn = min(at_once, batch.examples * batch.completions)
  return of_token * batch.whole * drawn / known.devices


def _ways(config):
  """How many devices share the parameters."""
  return config.mesh.fsdp * config.mesh.tensor
