"""Which example comes when: a pure function of seed and example counter."""

import functools
import math

import numpy as np


def mixture(sources, weights):
  """The parts of an epoch: tuple of (examples, weight), in order.

  Args:
    sources: i32[N], which part an example is of; rising.
    weights: tuple by source: how often an epoch has each of its examples; or
      None for 1.
  Raises: ValueError for a part that has no example in an epoch.
  """
  if weights is None or all(weight == 1 for weight in weights):
    return ((len(sources), 1.0),)
  if not all(0 < weight < math.inf for weight in weights):
    raise ValueError(f"weights {weights} must be finite and above 0")
  assert np.all(np.diff(sources) >= 0), "examples are in order of the sources"
  counts = np.bincount(sources, minlength=len(weights)).tolist()
  parts = tuple(zip(counts, map(float, weights), strict=True))
  for number, part in enumerate(parts, 1):
    if epoch_size((part,)) == 0:
      raise ValueError(
        f"part {number} of the mixture: of {part[0]} usable examples, the "
        f"weight {part[1]} leaves none; raise it, or leave the part out"
      )
  return parts


def epoch_size(parts):
  """Examples per epoch of a mixture."""
  return sum(
    int(weight) * count + round(weight % 1 * count) for count, weight in parts
  )


@functools.lru_cache(maxsize=4)
def _permutation(parts, seed, epoch):
  if seed is None:
    return np.arange(epoch_size(parts))
  rng = np.random.default_rng([seed, epoch])
  indices, start = [], 0
  for count, weight in parts:
    part = np.arange(start, start + count)
    indices += [part] * int(weight)
    more = round(weight % 1 * count)
    if more:
      indices.append(rng.permutation(part)[:more])
    start += count
  indices = np.concatenate(indices)
  return indices[rng.permutation(len(indices))]


def stream(start, count, size, seed, parts=None):
  """Example indices start … start + count − 1 of the endless stream.

  Args:
    start: global example counter.
    count: how many.
    size: examples per epoch.
    seed: of the order; None keeps the order of the file.
    parts: of a mixture, see `mixture`; None is one of weight 1.
  Returns: i64[count].
  """
  parts = ((size, 1.0),) if parts is None else parts
  counter = np.arange(start, start + count)
  epochs = counter // size
  out = np.zeros(count, int)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    out[here] = _permutation(parts, seed, int(epoch))[counter[here] % size]
  return out
