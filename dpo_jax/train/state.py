"""The train state, and a fingerprint of any tree of arrays."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import tree
from dpo_jax.train import guard


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Attributes:
    step: i32, updates attempted.
    params: the policy.
    opt_state: of the trained part of params.
    frozen: {"ref": params}, or {"base": params} under an adapter; never
      differentiated, never saved, never donated.
    extra: what an algorithm keeps between steps.
    skipped: counts of the updates that were refused, see guard.create.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  frozen: Any
  extra: Any
  skipped: Any


def create(params, optimizer, frozen, extra):
  """A state at step 0."""
  trained, _ = tree.split(params, optimizer.trains)
  zero, opt_state = jnp.zeros((), jnp.int32), optimizer.tx.init(trained)
  skipped = guard.create(optimizer.max_spike)
  return TrainState(zero, params, opt_state, frozen, extra, skipped)


def saved(state):
  """The part of a state that a checkpoint holds, as a dict: all but frozen."""
  return {k: v for k, v in vars(state).items() if k != "frozen"}


@jax.jit
def _checksums(leaves):
  def checksum(x):
    if x.dtype == jnp.uint4:
      words = x.astype(jnp.uint32)
    else:
      bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
      words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    # The position of each word, without a reshape that would gather x.
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
      index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
      position = position * jnp.uint32(size) + index
    # Each step is a bijection of the word, so any one changed word changes the
    # sum for certain; the mixing (MurmurHash3's) makes the rest unlikely to
    # collide, which plain weights do not (f32 ones and zeros, for instance).
    h = words + position * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
      h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h, dtype=jnp.uint32)

  return [checksum(x) for x in leaves]


def fingerprint(values):
  """{path: checksum} of a tree of arrays, whatever their sharding."""
  paths = [path for path, _ in tree.named(values)]
  sums = _checksums(jax.tree.leaves(values))
  return {p: int(np.asarray(s)) for p, s in zip(paths, sums, strict=True)}
