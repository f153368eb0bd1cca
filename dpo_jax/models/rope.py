"""Rotary positions: frequencies, their scaling, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np


def frequencies(dim, theta, scaling):
  """Angle per position of each rotated pair, and the factor on cos and sin.

      f_i = theta^(−2i / dim), stretched as config.RopeScaling says

  Args:
    dim: rotated dimensions of a head.
    theta: base.
    scaling: config.RopeScaling or None.
  Returns: (f32[dim / 2] in radians, float).
  """
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  plain = (1 / np.float32(theta) ** exponent).astype(np.float32)
  if scaling is None:
    return plain, 1.0
  return _SCALED[scaling.kind](plain, theta, scaling), scaling.magnitude


def _linear(plain, theta, s):
  del theta
  return plain / np.float32(s.factor)


def _llama3(plain, theta, s):
  del theta
  rotations = s.original * plain / (2 * math.pi)
  kept = np.clip((rotations - s.low) / (s.high - s.low), 0, 1)
  return (plain * (kept + (1 - kept) / s.factor)).astype(np.float32)


def _yarn(plain, theta, s):
  dim = 2 * len(plain)

  def turning(rotations):  # the dimension that makes so many over `original`
    span = math.log(s.original / (rotations * 2 * math.pi))
    return dim * span / (2 * math.log(theta))

  first, last = turning(s.high), turning(s.low)
  if s.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dim - 1)
  last += 0.001 if first == last else 0
  stretched = np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
  factor = stretched / s.factor + 1 - stretched
  return (plain * factor).astype(np.float32)


def _longrope(plain, theta, s):
  del theta
  return plain / np.asarray(s.divisors, np.float32)


_SCALED = {
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}


def tables(positions, dim, theta, scaling=None):
  """cos and sin f32[..., T, 1, dim / 2] of integer positions."""
  angle, magnitude = frequencies(dim, theta, scaling)
  angles = positions[..., None, None] * angle
  return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x, rope):
  """Rotates the first dimensions of each head, halves paired (NeoX order)."""
  cos, sin = rope
  half = cos.shape[-1]
  first, second, rest = jnp.split(
    x.astype(jnp.float32), (half, 2 * half), axis=-1
  )
  return jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin, rest), axis=-1
  ).astype(x.dtype)
