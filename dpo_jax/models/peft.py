"""LoRA adapters in the files of the PEFT library.

    lora_A.weight [r, inputs], lora_B.weight [outputs, r], scale alpha / r

Where a checkpoint has queries, keys and values in one matrix, PEFT has one
adapter for the three and this project three: on the way in they share A, on the
way out their A lie one under the other and B is block-diagonal. Both are exact.
"""

import json
import re

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from dpo_jax import tree
from dpo_jax.models import axes, fields, keys, lora
from dpo_jax.models import write as write_lib

_PREFIX = "base_model.model."
# Of adapter_config.json: what must have one of these values, where it is there.
_ONLY = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "modules_to_save": (None, []),
  "use_dora": (False,),
  "layer_replication": (None,),
  "use_qalora": (False,),
  "lora_bias": (False,),
  "trainable_token_indices": (None,),
  "target_parameters": (None, []),
  "alora_invocation_tokens": (None,),
  # Of the others A·B belongs to a base that PEFT changes on loading.
  "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def write(folder, adapter, table, config, shapes, vocab_size, about):
  """Writes adapter_model.safetensors and adapter_config.json.

  Args:
    folder: epath.Path that exists.
    adapter: of lora.init.
    table: list of keys.Key of the base.
    config: ModelConfig.
    shapes: {path: shape} of the base's parameters.
    vocab_size: real tokens.
    about: {"rank", "alpha", "rank_stabilised", "scale", "base"}: the options,
      their factor, and the name of the base model.
  """
  flat = {p: jax.device_get(x) for p, x in tree.named(adapter)}
  tensors, ranks = {}, {}
  for name, tensor in _kernels(table, config, shapes, vocab_size).items():
    pair = _joined(tensor, flat, config.rotary_dim)
    if pair is None:
      continue
    module = name.removesuffix(".weight")
    tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair[0]
    tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair[1]
    ranks[module] = len(pair[0])
  content = safetensors.numpy.save(tensors, {"format": "pt"})
  (folder / "adapter_model.safetensors").write_bytes(content)
  rank, stabilised = about["rank"], about["rank_stabilised"]
  other = {m: r for m, r in ranks.items() if r != rank}
  power = 0.5 if stabilised else 1.0
  content = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": about["base"],
    "r": rank,
    "lora_alpha": about["alpha"],
    "use_rslora": stabilised,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": any(key.inputs_first for key in table),
    "target_modules": sorted(ranks),
    "rank_pattern": other,
    "alpha_pattern": {m: about["scale"] * r**power for m, r in other.items()},
    "inference_mode": True,
  }
  write_lib.write_json(folder / "adapter_config.json", content)


def _kernels(table, config, shapes, vocab_size):
  """{name: Tensor} of the matrices of layers."""
  tensors = keys.tensors(table, config, shapes, vocab_size)
  return {
    name: tensor
    for name, tensor in tensors.items()
    if tensor.places[0].layer is not None
    and tensor.places[0].path.endswith("kernel")
  }


def _leaf(place, name):
  return f"{place.path.removesuffix('kernel')}{name}"


def _joined(tensor, flat, rotary_dim):
  """(A [r, inputs], B [outputs, r]) of a matrix, or None without an adapter."""
  downs, ups = [], []
  for place in tensor.places:
    outputs, inputs = keys.rows_shape(place)
    down, up = np.zeros((0, inputs)), np.zeros((outputs, 0))  # without one
    if _leaf(place, "lora_a") in flat:
      down = flat[_leaf(place, "lora_a")][place.layer].reshape(inputs, -1).T
      up = flat[_leaf(place, "lora_b")][place.layer].reshape(-1, outputs).T
    downs.append(down)
    ups.append(up)
  a = np.concatenate(downs)
  if not len(a):
    return None
  ends = np.cumsum([len(down) for down in downs])
  parts = [
    np.pad(up, ((0, 0), (end - up.shape[1], len(a) - end)))
    for up, end in zip(ups, ends, strict=True)
  ]
  b = keys.join_rows(parts, tensor, rotary_dim)
  # safetensors writes memory as it lies.
  return tuple(np.ascontiguousarray(x, np.float32) for x in (a, b))


def read(folder, table, config, shapes, vocab_size):
  """(adapter, rank, scale) of a PEFT folder, as numpy arrays.

  Args: as `write`.
  Returns: adapter as lora.init makes it. Modules of another rank or alpha keep
    their rank and have the ratio of their scale in B.
  Raises: ValueError naming what is not supported, missing or unknown.
  """
  folder = epath.Path(folder)
  path = folder / "adapter_config.json"
  if not path.exists():
    raise ValueError(f"{folder} holds no adapter_config.json of PEFT")
  about = json.loads(path.read_text())
  for field, allowed in _ONLY.items():
    if field in about:
      fields.only(path, field, about[field], allowed)
  file = folder / "adapter_model.safetensors"
  if not file.exists():
    raise ValueError(f"{folder} holds no adapter_model.safetensors")
  tensors = safetensors.numpy.load_file(file)
  stabilised = about.get("use_rslora")
  scale = lora.scale_of(about["r"], about["lora_alpha"], stabilised)
  wanted = _kernels(table, config, shapes, vocab_size)
  stacks = {}
  for name, tensor in wanted.items():
    module = name.removesuffix(".weight")
    a = tensors.pop(f"{_PREFIX}{module}.lora_A.weight", None)
    b = tensors.pop(f"{_PREFIX}{module}.lora_B.weight", None)
    if a is None or b is None:
      continue
    rank = _pattern(about.get("rank_pattern"), module, about["r"])
    alpha = _pattern(about.get("alpha_pattern"), module, about["lora_alpha"])
    b = b.astype(np.float32) * (lora.scale_of(rank, alpha, stabilised) / scale)
    parts = keys.split_rows(b, tensor, config.rotary_dim)
    for place, rows in zip(tensor.places, parts, strict=True):
      cut = axes.inputs(place.path)
      down = a.astype(np.float32).T.reshape(*place.shape[:cut], rank)
      up = rows.T.reshape(rank, *place.shape[cut:])
      for leaf, x in (("lora_a", down), ("lora_b", up)):
        stacks.setdefault(_leaf(place, leaf), {})[place.layer] = x
  if tensors:
    raise ValueError(
      f"{file}: {sorted(tensors)[:4]} belong to no layer of the base model"
    )
  return tree.nest(_stacked(stacks, shapes, file)), about["r"], scale


def _stacked(stacks, shapes, file):
  out = {}
  for path, layers in stacks.items():
    kernel = re.sub(r"lora_[ab]$", "kernel", path)
    missing = sorted(set(range(shapes[kernel][0])) - set(layers))
    if missing:
      raise ValueError(
        f"{file}: layers {missing} of {path} have no adapter; those of only "
        "some layers are not supported"
      )
    shapes_there = {x.shape for x in layers.values()}
    if len(shapes_there) > 1:
      raise ValueError(
        f"{file}: {path} has other ranks in other layers ({shapes_there}), "
        "which is not supported"
      )
    out[path] = np.stack([layers[i] for i in sorted(layers)])
  return out


def _pattern(patterns, module, default):
  """The value of the first pattern that a module's name ends in."""
  for pattern, value in (patterns or {}).items():
    if re.search(rf"(^|.*\.){pattern}$", module):
      return value
  return default
