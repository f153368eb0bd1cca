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

from dpo_jax import tree
from dpo_jax.models import config as config_lib
from dpo_jax.models import families, keys

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
  flat = dict(tree.named(params))
  shapes = {path: x.shape for path, x in flat.items()}
  table = families.find(raw).table
  wanted = keys.tensors(table, config, shapes, vocab_size)
  size = np.dtype(DTYPES[dtype]).itemsize
  files = _files(wanted, size)
  for file, names in files.items():
    tensors = {
      name: _tensor(wanted[name], flat, config).astype(DTYPES[dtype])
      for name in names
    }
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    (folder / file).write_bytes(content)
  if len(files) > 1:
    total = sum(math.prod(t.shape) for t in wanted.values()) * size
    index = {
      "metadata": {"total_size": total},
      "weight_map": {n: file for file, names in files.items() for n in names},
    }
    write_json(folder / "model.safetensors.index.json", index)
  named = {k: v for k, v in raw.items() if k != "torch_dtype"}
  write_json(folder / "config.json", {**named, "dtype": dtype})


def _files(wanted, size):
  """{file: names of its tensors}, none much above FILE_BYTES."""
  groups, room = [[]], FILE_BYTES
  for name, tensor in wanted.items():
    nbytes = math.prod(tensor.shape) * size
    if nbytes > room and groups[-1]:
      groups.append([])
      room = FILE_BYTES
    groups[-1].append(name)
    room -= nbytes
  if len(groups) == 1:
    return {"model.safetensors": groups[0]}
  return {
    f"model-{i:05}-of-{len(groups):05}.safetensors": names
    for i, names in enumerate(groups, start=1)
  }


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
  if config.position == "learned":
    raw = _gpt2(config)
  elif config.norm == "rmsnorm":
    raw = _llama(config)
  else:
    raw = _neox(config)
  raw["vocab_size"] = vocab_size
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


def _gpt2(c):
  return {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": c.layers,
    "n_embd": c.embed,
    "n_head": c.heads,
    "n_inner": c.mlp,
    "n_positions": c.max_positions,
    "layer_norm_epsilon": c.norm_eps,
    "activation_function": _ACTIVATIONS[c.activation],
    "tie_word_embeddings": c.tied,
  }


def _neox(c):
  return {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    **_common(c),
    "layer_norm_eps": c.norm_eps,
    "use_parallel_residual": c.residual == "parallel",
    "rotary_pct": c.rotary_dim / c.head_dim,
    "rotary_emb_base": c.rope_theta,
    "attention_bias": c.qkv_bias,
  }


def _llama(c):
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **_common(c),
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    "rms_norm_eps": c.norm_eps,
    "rope_theta": c.rope_theta,
    "attention_bias": c.qkv_bias,
    "mlp_bias": c.mlp_bias,
  }


def _common(c):
  return {
    "num_hidden_layers": c.layers,
    "hidden_size": c.embed,
    "num_attention_heads": c.heads,
    "intermediate_size": c.mlp,
    "max_position_embeddings": c.max_positions,
    "hidden_act": _ACTIVATIONS[c.activation],
    "tie_word_embeddings": c.tied,
  }


_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}


def write_json(path, value):
  """Writes plain values, as a person would read them."""
  path.write_text(json.dumps(value, indent=2) + "\n")
