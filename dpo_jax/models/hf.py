"""Hugging Face checkpoints: config.json and safetensors, streamed to devices.

Tensor by tensor, so that a host holds one tensor beside its shards: a leaf of
stacked layers is allocated on the devices and filled in place.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax import store, tree
from dpo_jax.models import axes, families, keys, lora, shards, tables
from dpo_jax.models import config as config_lib


class Checkpoint(NamedTuple):
  """A pre-trained model, not loaded yet.

  Attributes:
    raw: its config.json (that of the same model, for a GGUF file).
    config: ModelConfig of it.
    vocab_size: rows of its vocabulary.
    table: list of keys.Key.
    shapes: {name: shape} of its tensors, named as in the table.
    read: () -> iterable of (name, numpy array), each tensor once.
    where: for messages.
    ends: the tokens that it generates up to, as ids.
  """

  raw: dict
  config: config_lib.ModelConfig
  vocab_size: int
  table: list
  shapes: dict
  read: Callable
  where: str
  ends: tuple[int, ...]


_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry beside their parameters.
_BUFFERS = r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$"


def open_classifier(folder):
  """The Checkpoint of a reward model: a sequence classifier of one label.

  Its parameters are those of a model whose head is its embedding, which nothing
  reads, and "score/kernel" [D, 1].

  Raises: ValueError naming what is missing or not supported.
  """
  checkpoint = open_folder(folder, classifier=True)
  shape = checkpoint.shapes.get("score.weight")
  if shape is None:
    raise ValueError(
      f"{folder} holds no score.weight: it is no reward model of the form "
      "…ForSequenceClassification"
    )
  if shape[0] != 1:
    raise ValueError(
      f"{folder}: score.weight has {shape[0]} labels, and a reward model has "
      "one; of a classifier take classifier:NAME"
    )
  return checkpoint


def open_folder(folder, *, classifier=False):
  """The Checkpoint in a folder.

  Args:
    classifier: a "score" is read in the place of the head, see
      `open_classifier`.
  Raises: ValueError naming what is missing or not supported.
  """
  folder = epath.Path(folder)
  path = folder / "config.json"
  if not path.exists():
    raise ValueError(f"{folder} holds no config.json")
  raw = store.read_json(path)
  try:
    config, vocab_size = families.read(raw)
    family = families.find(raw)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error
  files, shapes, types = shards.files(folder), {}, {}
  for file in files:
    header = shards.header(file)
    twice = sorted(types.keys() & header.keys())
    if twice:
      raise ValueError(
        f"{folder}: {twice[0]} is in two files, {file.name} and one before it; "
        "delete those of an older checkpoint"
      )
    shapes |= {name: shape for name, (shape, _) in header.items()}
    types |= {name: (kind, file) for name, (_, kind) in header.items()}
  _warn_of_code(folder, raw)
  bare = not any(name.startswith(family.prefix) for name in shapes)
  ignored = {name for name in shapes if re.search(_BUFFERS, name)}
  heads = {"lm_head.weight", "embed_out.weight"} & set(shapes)
  table = family.table
  if classifier:
    config = dataclasses.replace(config, tied=True, head_bias=False)
    table = [*table, *tables.SCORE]
    ignored |= heads | ({"lm_head.bias"} & set(shapes))
  elif config.tied and heads:
    _check_tied(folder, files, min(heads), family)
    ignored |= heads
  names = {n: n for n in shapes if n not in ignored}
  _check_types({name: types[name] for name in names})
  if bare:
    outside = ("lm_head.", "embed_out.", "score.")  # of the prefix
    names = {
      n: n if n.startswith(outside) else family.prefix + n for n in names
    }

  def read():
    # Opened anew for each: the pages of a mapped file stay until it is closed.
    for file in files:
      for name in [name for name in shards.header(file) if name in names]:
        with safetensors.safe_open(file, "np") as tensors:
          x = [tensors.get_tensor(name)]
        yield names[name], x.pop()

  shapes = {names[n]: shapes[n] for n in names}
  where, ends = str(folder), generation(folder, raw).get("eos_token_id")
  ends = tuple(ends) if isinstance(ends, list) else (ends,) * (ends is not None)
  return Checkpoint(raw, config, vocab_size, table, shapes, read, where, ends)


def _warn_of_code(folder, raw):
  """Says so where a checkpoint brings code that would compute it."""
  names = raw.get("auto_map")
  code = [n for n in names or () if n.startswith("AutoModel")]
  if code:
    warnings.warn(
      f"{folder}: auto_map of config.json names code for {code[0]}; it is not "
      f"run, the weights are read as those of a {raw['model_type']}",
      stacklevel=3,
    )


def generation(folder, raw):
  """generation_config.json of a checkpoint, or what config.json has of it.

  Raises: ValueError if its "eos_token_id" is no id and no list of ids.
  """
  path = epath.Path(folder) / "generation_config.json"
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  found = {n: raw[n] for n in names if raw.get(n) is not None}
  if path.exists():
    found = store.read_json(path)
  ends = found.get("eos_token_id")
  for end in ends if isinstance(ends, list) else [ends] * (ends is not None):
    if type(end) is not int:  # True is an int too
      raise ValueError(
        f"{path}: eos_token_id = {ends!r} must be an id, or a list of ids"
      )
  return found


def _check_types(types):
  """Raises ValueError for tensors of integers or of 8 bits: they have scales.

  Args: {name: (type, file)} of what is read.
  """
  for name, (kind, file) in types.items():
    if kind not in _FLOATS:
      raise ValueError(
        f"{file}: {name} is of the type {kind} (allowed: "
        f"{', '.join(_FLOATS)}): quantised weights are not supported; take "
        "the unquantised checkpoint, and lora.base = 'int8' or 'nf4'"
      )


def _check_tied(folder, files, head, family):
  """Raises ValueError for a head that is not the embedding it is tied to."""
  embedding = family.embedding
  names = {head, embedding, embedding.removeprefix(family.prefix)}
  matrices = []
  for file in files:
    with safetensors.safe_open(file, "np") as tensors:
      for name in names & set(tensors.keys()):
        matrices.append(tensors.get_tensor(name))
  if len(matrices) == 2 and not np.array_equal(*matrices):
    raise ValueError(
      f"{folder}: config.json ties the head to the embedding, but {head} is "
      "another matrix; set tie_word_embeddings to false there"
    )


def check(checkpoint, wanted):
  """Raises ValueError listing tensors missing, unknown and of other shapes.

  Args:
    checkpoint: Checkpoint.
    wanted: {name: keys.Tensor}.
  """
  shapes = checkpoint.shapes
  misfits = {
    "missing": sorted(wanted.keys() - shapes.keys()),
    "not of this architecture": sorted(shapes.keys() - wanted.keys()),
    "of another shape": [
      f"{name} is {list(shapes[name])}, not {list(wanted[name].shape)}"
      for name in sorted(wanted.keys() & shapes.keys())
      if shapes[name] != wanted[name].shape
    ],
  }
  lines = [
    f"{len(names)} {what}: {', '.join(names[:8])}{' …' * (len(names) > 8)}"
    for what, names in misfits.items()
    if names
  ]
  if lines:
    raise ValueError(
      f"{checkpoint.where}: the tensors do not fit its config.json: "
      + "; ".join(lines)
    )


def load(checkpoint, abstract, base):
  """The parameters of a checkpoint, born sharded.

  Args:
    checkpoint: Checkpoint.
    abstract: nested dict of f32 ShapeDtypeStruct with NamedShardings, one for
      each parameter.
    base: how they are held, of lora.BASES.
  Returns: nested dict of arrays, or of qwix.QArray for quantised kernels.
  Raises: ValueError before anything is allocated, if tensors do not fit.
  """
  flat = dict(tree.named(abstract))
  shapes = {path: x.shape for path, x in flat.items()}
  config, vocab_size = checkpoint.config, checkpoint.vocab_size
  wanted = keys.tensors(checkpoint.table, config, shapes, vocab_size)
  check(checkpoint, wanted)
  out = {}
  for name, x in checkpoint.read():
    tensor = wanted[name]
    leaves = keys.to_leaves(x, tensor, config.rotary_dim)
    del x  # or it would be there still when the next is read
    for place in tensor.places:
      _write(out, place, leaves.pop(0), flat[place.path], base)
    jax.block_until_ready([out[place.path] for place in tensor.places])
  return tree.nest(out)


def _write(out, place, leaf, abstract, base):
  """Puts a leaf, or one layer of it, into `out`."""
  path, sharding = place.path, abstract.sharding
  if place.layer is None:
    placed = _placed(leaf, abstract.shape, sharding)
    out[path] = placed if placed.dtype == base else _store(path, placed, base)
    return
  spec = PartitionSpec(*sharding.spec[1:])
  layer = NamedSharding(sharding.mesh, spec)
  placed = _placed(leaf, leaf.shape, layer)
  if path not in out:
    out[path] = _empty(path, abstract, base)
  out[path] = _set_layer(path, base, out[path], placed, place.layer)


def _placed(leaf, shape, sharding):
  """A host array on the mesh, with zeros behind it up to `shape`."""

  def shard(index):
    part = leaf[index]
    want = [len(range(n)[span]) for n, span in zip(shape, index, strict=True)]
    pad = [(0, n - m) for n, m in zip(want, part.shape, strict=True)]
    return np.pad(part, pad) if np.any(pad) else np.ascontiguousarray(part)

  return jax.make_array_from_callback(shape, sharding, shard)


def _empty(path, abstract, base):
  """A stack of zeros, as the base holds it."""
  sharding = abstract.sharding
  sizes = dict(sharding.mesh.shape)
  held = jax.eval_shape(lambda x: lora.store(path, x, base), abstract)

  def zeros(part, x):
    where = sharding
    if part:  # of a quantised kernel
      spec = axes.spec(f"{path}/{part}", x.shape, sizes)
      where = NamedSharding(sharding.mesh, spec)
    return jnp.zeros(x.shape, x.dtype, device=where)

  return tree.map_named(zeros, held)


# Compiled once a shape, not once a leaf of a load.
_store = jax.jit(lora.store, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _set_layer(path, base, stack, x, layer):
  value = lora.store(path, x, base, stacked=False)
  return jax.tree.map(lambda s, v: s.at[layer].set(v), stack, value)
