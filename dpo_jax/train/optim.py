"""Optimisers and schedules from `config.optim`.

The transforms here end before the learning rate: the step multiplies by
−learning_rate · factor(step), so the learning rate stays a traced scalar.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from dpo_jax import lookup, tree


class Optimizer(NamedTuple):
  """An optimiser without its learning rate.

  Attributes:
    tx: optax transform of the trained part's gradients.
    factor: step -> factor on the learning rate.
    trains: path -> whether the parameter is trained.
  """

  tx: optax.GradientTransformation
  factor: Callable
  trains: Callable


def _rmsprop(o):
  """torch's RMSprop: v ← decay·v + (1−decay)·g², update g / (√v + eps)."""
  return optax.scale_by_rms(decay=o.decay, eps=o.eps, eps_in_sqrt=False)


def _adamw(o):
  """Adam with decoupled weight decay on matrices (no biases, no norms)."""
  matrices = ("kernel", "lora_a", "lora_b")

  def decayed(params):
    return tree.map_named(lambda path, _: path.endswith(matrices), params)

  return optax.chain(
    optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    optax.add_decayed_weights(o.weight_decay, mask=decayed),
  )


def _sgd(o):
  del o
  return optax.identity()


class _Kind(NamedTuple):
  make: Callable
  fields: tuple[str, ...]


OPTIMIZERS = {
  "rmsprop": _Kind(_rmsprop, ("decay", "eps")),
  "adamw": _Kind(_adamw, ("b1", "b2", "eps", "weight_decay")),
  "sgd": _Kind(_sgd, ()),
}
COMMON = ("name", "learning_rate", "warmup", "schedule", "clip_norm", "freeze")

# Share of the steps after warm-up, in [0, 1] -> factor on the learning rate.
SCHEDULES = {
  "constant": lambda x: jnp.ones_like(x),
  "linear": lambda x: 1 - x,
  "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
}


def make(options, total_steps):
  """The Optimizer of `config.optim`.

  Warm-up multiplies the rate by min(1, (step + 1) / (warmup + 1)).

  Args:
    options: COMMON and the optimiser's own fields, no others.
    total_steps: where a decaying schedule ends.
  Raises: ValueError naming the field.
  """
  kind = lookup.lookup(OPTIMIZERS, options.name, "optim.name")
  allowed = (*COMMON, *kind.fields)
  for field in options:
    lookup.lookup(allowed, field, f"field of optim ({options.name})")
  schedule = lookup.lookup(SCHEDULES, options.schedule, "optim.schedule")
  warmup = options.warmup

  def factor(step):
    rise = jnp.minimum(1.0, (step + 1) / (warmup + 1))
    span = max(1, total_steps - warmup)
    return rise * schedule(jnp.clip((step - warmup) / span, 0.0, 1.0))

  clip = optax.identity()
  if options.clip_norm is not None:
    clip = optax.clip_by_global_norm(options.clip_norm)
  freeze = tuple(options.freeze)
  for pattern in freeze:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"optim.freeze: {pattern!r}: {error}") from error
  return Optimizer(
    optax.chain(clip, kind.make(options)),
    factor,
    lambda path: not tree.matches(freeze, path),
  )
