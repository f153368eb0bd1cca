"""Parameters written as a Hugging Face checkpoint: config.json and safetensors.

The inverse of models/hf.py, by the same key tables; what it wrote reads back
bit for bit, and transformers loads it with equal logits.
"""

import dataclasses
import json
import math

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from dpo_jax import store, tree
from dpo_jax.config import origin
from dpo_jax.models import config as config_lib
from dpo_jax.models import families, fields, keys, tables

FILE_BYTES = 5_000_000_000  # a file of a larger checkpoint
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def write(folder, params, config, vocab_size, raw, dtype):
  """Writes model.safetensors, or several with an index, and config.json.

  Args:
    folder: epath.Path that exists.
    params: all parameters, arrays on any devices of this process.
    config: ModelConfig.
    vocab_size: real tokens; padding is left out.
    raw: content of config.json; its architecture has the key table.
    dtype: of DTYPES; f32 loses nothing.
  """
  import huggingface_hub

  flat = dict(tree.named(params))
  shapes = {path: x.shape for path, x in flat.items()}
  table = [*families.find(raw).table, *tables.SCORE]
  wanted = keys.tensors(table, config, shapes, vocab_size)
  size = np.dtype(DTYPES[dtype]).itemsize
  split = huggingface_hub.split_state_dict_into_shards_factory(
    wanted,
    get_storage_size=lambda tensor: math.prod(tensor.shape) * size,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=FILE_BYTES,
  )
  for file, names in split.filename_to_tensors.items():
    tensors = {
      name: _tensor(wanted[name], flat, config).astype(DTYPES[dtype])
      for name in names
    }
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    store.write(folder / file, content)
  if split.is_sharded:
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_json(folder / "model.safetensors.index.json", index)
  # Code that auto_map names is not in the folder, nor was it run.
  left_out = ("torch_dtype", "auto_map")
  named = {k: v for k, v in raw.items() if k not in left_out}
  named = origin.without_folders(named)  # "_name_or_path", and the like
  write_json(folder / "config.json", {**named, "dtype": dtype})


def classifier(params, config, raw, kernel):
  """What `write` takes for a reward model, as a sequence classifier.

  Args:
    params, config, raw: of the model, as `write` takes them.
    kernel: f32[D] of the reward head; the file has no place for its bias.
  Returns: (params, ModelConfig, config.json).
  """
  params = {k: v for k, v in params.items() if k != "head"}
  params["score"] = {"kernel": kernel[:, None]}
  config = dataclasses.replace(config, tied=True, head_bias=False)
  (name, *_) = raw["architectures"]
  for task in ("ForCausalLM", "LMHeadModel"):
    name = name.removesuffix(task)
  labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
  raw = {**raw, "architectures": [f"{name}ForSequenceClassification"]}
  return params, config, {**raw, **labels, "num_labels": 1}


def _tensor(tensor, flat, config):
  """A tensor of the file, on the host."""
  leaves = []
  for place in tensor.places:
    leaf = flat[place.path]
    leaf = jax.device_get(leaf if place.layer is None else leaf[place.layer])
    axis = keys.vocabulary_axis(place.path)
    if axis is not None:
      leaf = np.take(leaf, range(place.shape[axis]), axis)
    leaves.append(leaf)
  return keys.from_leaves(leaves, tensor, config.rotary_dim)


def describe(config, vocab_size):
  """A config.json of a model that was not read from one.

  Raises: ValueError if no architecture that is written here has its blocks.
  """
  c = config
  if c.position == "learned":
    kind, architecture, names, own = "gpt2", "GPT2LMHeadModel", fields.GPT, {}
  elif c.norm == "rmsnorm":
    kind, architecture, names = "llama", "LlamaForCausalLM", fields.LLAMA
    own = {"rope_theta": c.rope_theta}
  elif c.residual == "parallel_shared":
    kind, architecture, names = "gptj", "GPTJForCausalLM", fields.GPT
    own = {"rotary_dim": c.rotary_dim}
  else:
    kind, architecture, names = "gpt_neox", "GPTNeoXForCausalLM", fields.NEOX
    own = {
      "use_parallel_residual": c.residual == "parallel",
      "rotary_pct": c.rotary_dim / c.head_dim,
      "rotary_emb_base": c.rope_theta,
    }
  raw = {"model_type": kind, "architectures": [architecture]}
  raw |= {**fields.written(c, names), **own, "vocab_size": vocab_size}
  written, _ = families.read(raw)
  runtime = {name: getattr(config, name) for name in config_lib.RUNTIME}
  written = dataclasses.replace(written, **runtime)
  differ = [
    field.name
    for field in dataclasses.fields(config)
    if getattr(written, field.name) != getattr(config, field.name)
  ]
  if differ:
    raise ValueError(
      f"this model cannot be exported: a {raw['model_type']} has other values "
      f"of model.{', model.'.join(differ)}"
    )
  return raw


def write_json(path, value):
  """Writes plain values, as a person would read them."""
  store.write(path, (json.dumps(value, indent=2) + "\n").encode())
