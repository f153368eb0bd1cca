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
  """A tensor of a checkpoint.

  Attributes:
    key: its Key.
    places: of each leaf it holds.
    shape: in the file.
  """

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
    (stack, layer)
    for stack, kinds in decoder.stacks(config).items()
    for layer in range(len(kinds))
  ]
  for key in table:
    if "{}" not in key.name:
      places = [_place(p, None, shapes, vocab_size) for p in key.paths]
      _add(out, key, key.name, places)
      continue
    for number, (stack, layer) in enumerate(stacks):
      places = [
        _place(f"{stack}/{path}", layer, shapes, vocab_size)
        for path in key.paths
      ]
      _add(out, key, key.name.format(number), places)
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


def _add(out, key, name, places):
  if None in places:
    assert not any(places), (name, places)
    return
  rows = [_rows_shape(place) for place in places]
  shape = (sum(r[0] for r in rows), *rows[0][1:])
  if key.inputs_first and len(shape) == 2:
    shape = shape[::-1]
  out[name] = Tensor(key, tuple(places), shape)


def _rows_shape(place):
  """Shape of a leaf with its outputs as rows: (outputs[, inputs])."""
  if place.path == "embed/tokens" or place.path == "embed/positions":
    return place.shape
  if not place.path.endswith("kernel"):
    return (math.prod(place.shape),)
  cut = axes.inputs(place.path)
  return math.prod(place.shape[cut:]), math.prod(place.shape[:cut])


def to_leaves(x, tensor, rotary_dim):
  """The leaves in a tensor, as numpy arrays in the order of its places."""
  key, places = tensor.key, tensor.places
  x = x.T if key.inputs_first and x.ndim == 2 else x
  out = []
  for rows, place in zip(
    split_rows(x, tensor, rotary_dim), places, strict=True
  ):
    kernel = place.path.endswith("kernel")
    out.append((rows.T if kernel else rows).reshape(place.shape))
  return out


def from_leaves(leaves, tensor, rotary_dim):
  """The tensor that holds some leaves; the inverse of `to_leaves`."""
  rows = []
  for leaf, place in zip(leaves, tensor.places, strict=True):
    shape = _rows_shape(place)
    kernel = place.path.endswith("kernel")
    rows.append(leaf.reshape(shape[::-1]).T if kernel else leaf.reshape(shape))
  x = join_rows(rows, tensor, rotary_dim)
  x = x.T if tensor.key.inputs_first and x.ndim == 2 else x
  return np.ascontiguousarray(x)


def split_rows(x, tensor, rotary_dim):
  """Rows (outputs) of each leaf, from the rows of the whole tensor.

  Args:
    x: [outputs, ...].
    tensor: Tensor; the rows are those of its leaves.
    rotary_dim: of the model; 0 without.
  """
  key, places = tensor.key, tensor.places
  counts = [_rows_shape(place)[0] for place in places]
  if key.join == "heads":
    head_dim = places[0].shape[-1]
    x = x.reshape(-1, len(places), head_dim, *x.shape[1:])
    parts = [x[:, i].reshape(-1, *x.shape[3:]) for i in range(len(places))]
  else:
    parts = np.split(x, np.cumsum(counts)[:-1])
  if key.pairs:
    order = _halves(rotary_dim, places[0].shape[-1])
    parts = [_reorder(part, order) for part in parts]
  return parts


def join_rows(parts, tensor, rotary_dim):
  """The inverse of `split_rows`."""
  key, places = tensor.key, tensor.places
  head_dim = places[0].shape[-1]
  if key.pairs:
    order = np.argsort(_halves(rotary_dim, head_dim))
    parts = [_reorder(part, order) for part in parts]
  if key.join == "heads":
    parts = [p.reshape(-1, head_dim, *p.shape[1:]) for p in parts]
    x = np.stack(parts, axis=1)
    return x.reshape(-1, *x.shape[3:])
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _halves(rotary_dim, head_dim):
  """Neighbouring pairs -> the halves of the rotated dimensions."""
  order = np.arange(head_dim)
  order[:rotary_dim] = order[:rotary_dim].reshape(-1, 2).T.reshape(-1)
  return order


def _reorder(rows, order):
  """Reorders the dimensions of each head."""
  heads = rows.reshape(-1, len(order), *rows.shape[1:])
  return heads[:, order].reshape(rows.shape)
