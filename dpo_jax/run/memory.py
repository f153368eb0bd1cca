"""What a step needs of a device's memory, and what to give up to fit.

    fixed        parameters, gradients, optimiser state, reference
    activations  what the backward pass reads of every layer
    head         f32 logits of the scored positions, and their gradient

An estimate from shapes alone, so that the choice is known before anything is
compiled and is the same whenever the same run starts on the same machine.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax import tree
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import trained as trained_lib

# Of a container: control groups of version 2 and 1.
_LIMITS = (
  pathlib.Path("/sys/fs/cgroup/memory.max"),
  pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
# Of the memory that may be planned for; the rest is for what is not. An
# accelerator's is this process's alone, and estimates were above what was used
# (27.7 of 38.3 GiB, Pythia-1.4b on an H100).
_SHARE, _SHARE_OF_OWN = 0.8, 0.9
_SMALLEST, _LARGEST = 64, 1024  # positions of a row per step of the head


class Asked(NamedTuple):
  """How the config asks a step to be computed.

  Attributes:
    remat, head_chunk: of config.model; "auto" and None are for `fitted`.
    points: of a sweep that train together.
  """

  remat: str
  head_chunk: int | None
  points: int


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
    head, of, more = "at once", "", ""
    if self.head_chunk is not None:
      head = f"in chunks of {self.head_chunk}"
    if self.available is not None:
      of = f" of {self.available / 2**30:.1f}"
      if self.needed > self.available:
        more = (
          "; it may not fit: raise train.accumulation or split the model over "
          "devices (mesh.fsdp)"
        )
    needed = f"{self.needed / 2**30:.1f}{of} GiB of a device"
    return f"remat {self.remat}, head {head}: about {needed}{more}"


def of_device(device, sharing):
  """Bytes of a device, or None; on CPUs `sharing` devices share one memory."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  if device.platform != "cpu" or not hasattr(os, "sysconf"):
    return None
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  for path in _LIMITS:
    text = path.read_text().strip() if path.exists() else "max"
    total = min(total, int(text) if text.isdigit() else total)
  return total // sharing


def fitted(setup, optimizer, shape, accumulation, extra):
  """(Setup whose model fits the memory, Choice of the cheapest way).

  What the config says stays; "auto" and None are chosen. First the logits are
  computed again in chunks, which costs least, then more and more of the blocks.

  Args:
    shape: rows.Shape of the largest batch.
    accumulation: microbatches of a step; passes without gradient have one.
    extra: of the Algorithm: what it keeps of the trained parameters.
  """
  asked, model = setup.compute, setup.model
  ways = mesh_lib.row_parallelism(setup.mesh) * accumulation
  rows, tensor = shape.rows // ways, mesh_lib.sizes(setup.mesh)["tensor"]
  remats = (asked.remat,)
  if asked.remat == "auto":
    remats = "none", "names", "full"
  chunks = (asked.head_chunk,)
  if asked.head_chunk is None:
    vocab = model_config.padded_vocab(model.vocab_size)
    chunks = None, min(_chunk(vocab, rows * accumulation), shape.scored)
  fixed, available = of_state(setup, optimizer, extra), _available(setup.mesh)
  share = _SHARE if jax.default_backend() == "cpu" else _SHARE_OF_OWN
  budget = math.inf if available is None else share * available
  for remat, chunk in itertools.product(remats, chunks):
    changes = {"remat": remat, "head_chunk": chunk}
    if asked.remat == "auto" and remat != "none":
      changes["unroll"] = 1  # XLA computes nothing again without a loop
    changed = _with(model, **changes)
    moving = _moving(changed, shape, rows, tensor, accumulation)
    needed = fixed + asked.points * moving
    if needed <= budget:
      break
  choice = Choice(remat, chunk, round(needed), available)
  return setup._replace(model=changed), choice


def forward_only(model, asked, rows):
  """The Model for passes without gradient, where a chunked head costs nothing.

  A head_chunk that is `asked` for stays. `rows` are those of a batch, at most.
  """
  if asked.head_chunk is not None:
    return model
  vocab = model_config.padded_vocab(model.vocab_size)
  return _with(model, head_chunk=_chunk(vocab, rows))


def _with(model, **changes):
  config = dataclasses.replace(model.config, **changes)
  return decoder.build(config, model.vocab_size)


def _available(mesh):
  """Bytes of the smallest device of all processes, or None.

  They must choose alike, or they would compile different programs.
  """
  mine = of_device(mesh.local_mesh.devices.flat[0], jax.local_device_count())
  if jax.process_count() == 1:
    return mine
  # In MiB: f32 is what a gather keeps for certain.
  known = np.float32(0 if mine is None else mine // 2**20)
  least = int(multihost_utils.process_allgather(known).min())
  return least * 2**20 or None


def of_state(setup, optimizer, extra):
  """Bytes of a device for the state, the gradient and a copy of that."""
  shapes = trained_lib.trained_shapes(setup)
  updated, _ = tree.split(shapes, optimizer.trains)
  moments = jax.eval_shape(optimizer.tx.init, updated)
  slots = tree.nbytes(moments) / tree.nbytes(updated)
  kept = {"extra": jax.eval_shape(extra, shapes)}  # as it lies in the state
  kept = trained_lib.sharded(setup, kept)
  # Parameters, also those that are not updated; then what there is of the rest.
  of_a_point = of_shards(shapes) + of_shards(kept)
  of_a_point += (2 + slots) * of_shards(updated)
  # Points of other seeds start from other weights.
  starts = setup.compute.points if setup.source.spec is None else 1
  model = of_shards(trained_lib.model_shapes(setup))
  frozen = model * setup.trained.frozen_bits / 32
  return setup.compute.points * of_a_point + starts * frozen


def of_shards(shapes):
  """Bytes of a device, of abstract arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(shapes)
  )


def _moving(model, shape, rows, tensor, accumulation):
  """Bytes of activations and logits at the end of the forward pass.

  Args:
    rows: of a device in a microbatch.
    tensor: how many ways heads, mlp and vocabulary are split.
    Others as in `fitted`.
  """
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
  kept = kept.get(c.remat, tokens * c.embed)
  once = 0 if c.remat == "none" else whole
  # Of a quarter of the queries, and of their gradient, see ops.attention.
  scores = 3 * 4 * tiles * shape.tile / 4 * c.heads / tensor
  vocab = model_config.padded_vocab(model.vocab_size) / tensor
  scored = min(c.head_chunk or shape.scored, shape.scored)
  # Those that are kept and their gradient; or those of a whole batch.
  logits = max(2, accumulation) * 4 * rows * scored * vocab
  return width * (c.layers * kept + once) + max(scores, logits)


def _chunk(vocab, rows):
  """Scored positions of a row whose logits take about 256 MiB, a power of 2."""
  fitting = 2**28 // (4 * rows * vocab)
  chunk = _SMALLEST
  while 2 * chunk <= min(fitting, _LARGEST):
    chunk *= 2
  return chunk
