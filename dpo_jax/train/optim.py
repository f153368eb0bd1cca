"""Optimisers and schedules from `config.optim`.

The transforms here end before the learning rate: the step multiplies by
−learning_rate · factor(step), so the learning rate stays a traced scalar.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax import lookup, tree
from dpo_jax.train import optimizers


class Optimizer(NamedTuple):
  """An optimiser without its learning rate.

  Attributes:
    tx: optax transform of the trained part's gradients; its update takes
      `still`, see `_apart`.
    factor: step -> factor on the learning rate.
    trains: path -> whether the parameter is trained.
    max_spike: a gradient whose norm is above so many times the running mean of
      norms is refused; None: none is.
  """

  tx: optax.GradientTransformationExtraArgs
  factor: Callable
  trains: Callable
  max_spike: float | None


class _Rounded(NamedTuple):
  """State of `_in_bfloat16`: updates done, and the moments."""

  count: jax.Array
  moments: optax.OptState


def _in_bfloat16(tx):
  """A transform whose f32 moments are kept in bf16, rounded at random.

      P(up) = (x − below) / (above − below), so that E[kept] = x

  Rounded to the nearest, a moment would lose every change below 1/512 of it:
  all of the decay with b2 = 0.999. The bits depend on the number of the update
  alone, so a resumed run makes the same ones.
  """

  def lowered(state, round_off):
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(
      round_off(i, x) if x.dtype == jnp.float32 else x
      for i, x in enumerate(leaves)
    )

  def init(params):
    zeros = lowered(tx.init(params), lambda _, x: x.astype(jnp.bfloat16))
    return _Rounded(jnp.zeros((), jnp.int32), zeros)

  def update(updates, state, params=None):
    key = jax.random.fold_in(jax.random.key(0), state.count)

    def round_off(i, x):
      bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
      noise = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16)
      bits = (bits + noise) & jnp.uint32(0xFFFF0000)
      return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(
        jnp.bfloat16
      )

    moments = jax.tree.map(
      lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
      state.moments,
    )
    updates, moments = tx.update(updates, moments, params)
    return updates, _Rounded(state.count + 1, lowered(moments, round_off))

  return optax.GradientTransformation(init, update)


class _Parts(NamedTuple):
  """State of `_apart`: of what rests at times, and of all others."""

  resting: optax.OptState
  others: optax.OptState


def _apart(tx, rests):
  """`tx` for the parameters that rest at times, and again for all others.

  Where they keep `still` they do not move, nor do their moments and the count
  by which Adam corrects those: 0.1·g of a first gradient g is divided by
  1 − 0.9 in their first update, not by 1 − 0.9ⁿ.

  Args:
    rests: path -> whether a parameter is one of them.
  """

  def init(params):
    return _Parts(*map(tx.init, tree.split(params, rests)))

  def update(updates, state, params=None, *, still):
    grads, of = tree.split(updates, rests), tree.split(params, rests)
    moves, resting = tx.update(grads[0], state.resting, of[0])
    others_move, others = tx.update(grads[1], state.others, of[1])
    moves, resting = jax.tree.map(
      lambda new, old: jnp.where(still, old, new),
      (moves, resting),
      (jax.tree.map(jnp.zeros_like, moves), state.resting),
    )
    return tree.graft(others_move, moves), _Parts(resting, others)

  return optax.GradientTransformationExtraArgs(init, update)


MOMENTS = {"float32": lambda tx: tx, "bfloat16": _in_bfloat16}


def rmsprop(o):
  """torch's RMSprop: v ← decay·v + (1−decay)·g², update g / (√v + eps)."""
  tx = optax.scale_by_rms(decay=o.decay, eps=o.eps, eps_in_sqrt=False)
  return _kept(o, tx)


def adamw(o):
  """Adam with decoupled weight decay on matrices (no biases, no norms)."""
  matrices = ("kernel", "lora_a", "lora_b")

  def decayed(params):
    return tree.map_named(lambda path, _: path.endswith(matrices), params)

  return optax.chain(
    _kept(o, optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)),
    optax.add_decayed_weights(o.weight_decay, mask=decayed),
  )


def _kept(o, tx):
  return lookup.lookup(MOMENTS, o.moments, "optim.moments")(tx)


def sgd(o):
  del o
  return optax.identity()


# Share of the steps after warm-up, in [0, 1] -> factor on the learning rate.
SCHEDULES = {
  "constant": lambda x: jnp.ones_like(x),
  "linear": lambda x: 1 - x,
  "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
}


def make(options, total_steps, rests=None):
  """The Optimizer of `config.optim`.

  Warm-up multiplies the rate by min(1, (step + 1) / (warmup + 1)).

  Args:
    options: name, the fields of its row, COMMON's; no others.
    total_steps: where a decaying schedule ends.
    rests: of the Algorithm.
  Raises: ValueError naming the field.
  """
  kind = lookup.lookup(optimizers.OPTIMIZERS, options.name, "optim.name")
  allowed = ("name", *kind.defaults, *optimizers.COMMON)
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
  tx = kind.make(options)
  if rests is not None:
    tx = _apart(tx, rests)
  return Optimizer(
    optax.with_extra_args_support(optax.chain(clip, tx)),
    factor,
    lambda path: not tree.matches(freeze, path),
    options.max_spike,
  )
