"""What a step needs of a device's memory, and what to give up to fit.

    fixed        parameters, gradients, optimiser state, reference
    activations  what the backward pass reads of every layer
    head         f32 logits of the scored positions, and their gradient

An estimate from shapes alone, so that the choice is known before anything is
compiled and is the same whenever the same run starts on the same machine.
"""

import dataclasses
import math
import os
from typing import NamedTuple

import jax

from dpo_jax import tree, weights
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.parallel import mesh as mesh_lib

_SHARE = 0.8  # of the memory may be planned for; the rest is for what is not
_SMALLEST, _LARGEST = 64, 1024  # positions of a row per step of the head


class Choice(NamedTuple):
  """How the step is computed.

  Attributes:
    remat, head_chunk: of the ModelConfig.
    needed: bytes of a device, estimated.
    available: its bytes, or None if they are not known.
  """

  remat: str
  head_chunk: int | None
  needed: int
  available: int | None

  def __str__(self):
    head = "at once"
    if self.head_chunk is not None:
      head = f"in chunks of {self.head_chunk}"
    text = f"remat {self.remat}, head {head}: about {self.needed / 2**30:.1f}"
    if self.available is None:
      return f"{text} GiB of a device"
    text += f" of {self.available / 2**30:.1f} GiB of a device"
    if self.needed > self.available:
      text += (
        "; it may not fit: raise train.accumulation or split the model over "
        "devices (mesh.fsdp)"
      )
    return text


def of_device(device, sharing):
  """Bytes of a device, or None.

  Args:
    device: jax device.
    sharing: devices of this process, which on CPUs share one memory.
  """
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  if device.platform != "cpu" or not hasattr(os, "sysconf"):
    return None
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return total // sharing


def fitted(setup, optimizer, shape, accumulation):
  """(Setup whose model fits the memory, Choice).

  Args:
    setup: assembly.Setup.
    optimizer: train.optim.Optimizer.
    shape: rows.Shape of the largest batch.
    accumulation: microbatches of a step.
  """
  mesh, sizes = setup.mesh, mesh_lib.sizes(setup.mesh)
  found = choose(
    setup.model,
    shape,
    fixed=_fixed(setup, optimizer),
    points=setup.config.sweep.together,
    rows=shape.rows // (mesh_lib.row_parallelism(mesh) * accumulation),
    tensor=sizes["tensor"],
    available=of_device(mesh.devices.flat[0], jax.local_device_count()),
  )
  config = dataclasses.replace(
    setup.model.config, remat=found.remat, head_chunk=found.head_chunk
  )
  model = transformer.build(config, setup.model.vocab_size)
  return setup._replace(model=model), found


def _fixed(setup, optimizer):
  """Bytes of a device for the state, the gradient and a copy of that."""
  config, trained = setup.config, weights.trained_shapes(setup)
  moments = jax.eval_shape(optimizer.tx.init, trained)
  slots = tree.nbytes(moments) / tree.nbytes(trained)
  total = (3 + slots) * _of_shards(trained) * config.sweep.together
  if config.lora is not None:
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "nf4": 4}
    total += _of_shards(weights.whole(setup)) * bits[config.lora.base] / 32
  if config.ref == "frozen":
    total += _of_shards(weights.whole(setup))
  if config.ref == "ema":
    total += _of_shards(trained) * config.sweep.together
  return total


def _of_shards(shapes):
  """Bytes of a device, of abstract arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(shapes)
  )


def choose(model, shape, *, fixed, rows, tensor, available, points):
  """The cheapest way to compute a step that fits.

  What the config says stays; "auto" and None are chosen. First the logits are
  computed again in chunks, which costs least, then more and more of the blocks.

  Args:
    model: transformer.Model.
    shape: rows.Shape of the largest batch.
    fixed: bytes of a device that the state and its gradient take.
    rows: of a device in a microbatch.
    tensor: how many ways heads, mlp and vocabulary are split.
    available: of `of_device`.
    points: of a sweep that train together.
  """
  config = model.config
  remats = ("none", "names", "full")
  if config.remat != "auto":
    remats = (config.remat,)
  chunks = (config.head_chunk,)
  if config.head_chunk is None:
    chunks = (
      None,
      _chunk(model_config.padded_vocab(model.vocab_size), rows, shape),
    )
  budget = None if available is None else _SHARE * available
  for remat in remats:
    for chunk in chunks:
      needed = fixed + points * _moving(
        model, shape, rows, tensor, remat, chunk
      )
      found = Choice(remat, chunk, round(needed), available)
      if budget is None or needed <= budget:
        return found
  return found


def _moving(model, shape, rows, tensor, remat, chunk):
  """Bytes of activations and logits at the end of the forward pass."""
  c = model.config
  width = 2 if c.dtype == "bfloat16" else 4
  tokens = rows * shape.length
  tiles = rows * shape.per_row * shape.tile
  projected = (c.heads + 2 * c.kv_heads) * c.head_dim / tensor
  attended = c.heads * c.head_dim / tensor
  expanded = (2 if c.gated else 1) * c.mlp / tensor
  tiled = tiles * (projected + attended)
  whole = (
    tokens * (8 * c.embed + attended + 2 * expanded + c.mlp / tensor) + tiled
  )
  named = tokens * (c.embed + projected + attended)
  dots = tokens * (2 * c.embed + projected + expanded)
  kept = {"none": whole, "dots": dots, "names": named}
  kept = kept.get(remat, tokens * c.embed)
  once = 0 if remat == "none" else whole
  # Of a quarter of the queries, and of their gradient, see ops.attention.
  scores = 3 * 4 * tiles * shape.tile / 4 * c.heads / tensor
  vocab = model_config.padded_vocab(model.vocab_size) / tensor
  scored = shape.scored if chunk is None else min(chunk, shape.scored)
  logits = 2 * 4 * rows * scored * vocab
  return width * (c.layers * kept + once) + max(scores, logits)


def _chunk(vocab, rows, shape):
  """Scored positions of a row whose logits take about 256 MiB, a power of 2."""
  fitting = 2**28 // (4 * rows * vocab)
  chunk = _SMALLEST
  while 2 * chunk <= min(fitting, _LARGEST):
    chunk *= 2
  return min(chunk, shape.scored)
