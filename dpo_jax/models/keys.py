"""Key tables: which tensor of a checkpoint holds which parameters, and how.

A table is a list of Keys. The tensors of others have their outputs first, W
[outputs, inputs], and sometimes several of our leaves in one; everything here
is a rearrangement, so it is exact in both directions.
"""

import math
from typing import NamedTuple

import numpy as np

from dpo_jax.models import axes, decoder


class Key(NamedTuple):
  """One tensor, or one of each layer.

  Attributes:
    name: of the tensor; "{}" is the layer's number.
    paths: leaves it holds, of a layer ("attn/q/kernel") if the name has "{}".
    inputs_first: kernels are stored [inputs, outputs], as GPT-2's are.
    join: several leaves lie one after the other ("rows"), or head by head
      ("heads": q, k, v of head 0, then of head 1).
    pairs: neighbours rotate together; here the halves of a head do.
  """

  name: str
  paths: tuple[str, ...]
  inputs_first: bool = False
  join: str = "rows"
  pairs: bool = False


class Place(NamedTuple):
  """Where a leaf's values are: `layer` of the stack at `path`, or all of it."""

  path: str
  layer: int | None
  shape: tuple[int, ...]


class Tensor(NamedTuple):
  """A tensor of a checkpoint: the places of its leaves, its shape in a file."""

  key: Key
  places: tuple[Place, ...]
  shape: tuple[int, ...]


def tensors(table, config, shapes, vocab_size):
  """{name: Tensor} of all that a checkpoint of the model must hold.

  Args:
    table: list of Key; what the model lacks (biases) is left out.
    config: ModelConfig.
    shapes: {path: shape} of the parameters.
    vocab_size: rows of the vocabulary in the file.
  """
  out = {}
  stacks = [
    (f"{stack}/", layer)
    for stack, kinds in decoder.stacks(config).items()
    for layer in range(len(kinds))
  ]
  for key in table:
    homes = stacks if "{}" in key.name else [("", None)]
    for number, (home, layer) in enumerate(homes):
      places = tuple(
        _place(home + path, layer, shapes, vocab_size) for path in key.paths
      )
      if None in places:
        assert not any(places), (key, places)
        continue
      rows = [rows_shape(place) for place in places]
      shape = (sum(r[0] for r in rows), *rows[0][1:])
      if key.inputs_first and len(shape) == 2:
        shape = shape[::-1]
      out[key.name.format(number)] = Tensor(key, places, shape)
  covered = {place.path for tensor in out.values() for place in tensor.places}
  assert covered == set(shapes), covered ^ set(shapes)
  return out


def _place(path, layer, shapes, vocab_size):
  if path not in shapes:
    return None
  shape = shapes[path] if layer is None else shapes[path][1:]
  axis = vocabulary_axis(path)
  if axis is not None:
    shape = (*shape[:axis], vocab_size, *shape[axis + 1 :])
  return Place(path, layer, shape)


def vocabulary_axis(path):
  """The axis of a leaf that is padded from the vocabulary to V, or None."""
  return {"embed/tokens": 0, "head/kernel": 1, "head/bias": 0}.get(path)


def rows_shape(place):
  """Shape of a leaf with its outputs as rows: (outputs[, inputs])."""
  if place.path in ("embed/tokens", "embed/positions"):
    return place.shape
  if not place.path.endswith("kernel"):
    return (math.prod(place.shape),)
  cut = axes.inputs(place.path)
  return math.prod(place.shape[cut:]), math.prod(place.shape[:cut])


def to_leaves(x, tensor, rotary_dim):
  """The leaves in a tensor, as numpy arrays in the order of its places."""
  key, places = tensor.key, tensor.places
  x = x.T if key.inputs_first and x.ndim == 2 else x
  parts = split_rows(x, tensor, rotary_dim)
  out = []
  for rows, place in zip(parts, places, strict=True):
    kernel = place.path.endswith("kernel")
    out.append((rows.T if kernel else rows).reshape(place.shape))
  return out


def from_leaves(leaves, tensor, rotary_dim):
  """The tensor that holds some leaves; the inverse of `to_leaves`."""
  rows = []
  for leaf, place in zip(leaves, tensor.places, strict=True):
    shape = rows_shape(place)
    kernel = place.path.endswith("kernel")
    rows.append(leaf.reshape(shape[::-1]).T if kernel else leaf.reshape(shape))
  x = join_rows(rows, tensor, rotary_dim)
  x = x.T if tensor.key.inputs_first and x.ndim == 2 else x
  return np.ascontiguousarray(x)


def split_rows(x, tensor, rotary_dim):
  """Rows (outputs) of each leaf, from the rows of the whole tensor."""
  counts = [rows_shape(place)[0] for place in tensor.places]
  order = _order(tensor, len(x), rotary_dim)
  x = x if order is None else x[np.argsort(order)]
  return np.split(x, np.cumsum(counts)[:-1])


def join_rows(parts, tensor, rotary_dim):
  """The inverse of `split_rows`."""
  x = parts[0] if len(parts) == 1 else np.concatenate(parts)
  order = _order(tensor, len(x), rotary_dim)
  return x if order is None else x[order]


def _order(tensor, count, rotary_dim):
  """Which of the leaves' rows, one leaf after the other, each row is.

  None if they lie so, and nothing has to be copied.
  """
  key, places = tensor.key, tensor.places
  if key.join == "rows" and not key.pairs:
    return None
  order, head_dim = np.arange(count), places[0].shape[-1]
  if key.join == "heads":
    order = order.reshape(len(places), -1, head_dim).swapaxes(0, 1)
  order = order.reshape(-1, head_dim)
  if key.pairs:  # the halves of what rotates, as neighbours
    halves = order[:, :rotary_dim].reshape(len(order), 2, -1)
    order[:, :rotary_dim] = halves.swapaxes(1, 2).reshape(len(order), -1)
  return order.reshape(-1)
