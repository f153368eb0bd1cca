"""LoRA adapters in the files of the PEFT library.

    lora_A.weight [r, inputs], lora_B.weight [outputs, r], scale alpha / r

Where a checkpoint has queries, keys and values in one matrix, PEFT has one
adapter for the three and this project three: on the way in they share A, on the
way out their A lie one under the other and B is block-diagonal. Both are exact.
"""

import re
import warnings

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from dpo_jax import store, tree
from dpo_jax.models import axes, fields, keys, lora
from dpo_jax.models import write as write_lib

_PREFIX = "base_model.model."
_NAMES = "a list of names, or one pattern"
_RANKS = "an object of patterns, each with a number above 0"
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
# And what is read here, or tells how the adapter was made. All else is refused
# unless it is null, false or empty.
_READ = {
  *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
  *("target_modules", "exclude_modules", "layers_to_transform"),
  *("layers_pattern", "fan_in_fan_out", "task_type", "auto_mapping"),
  *("peft_version", "base_model_name_or_path", "revision", "inference_mode"),
  *("lora_dropout", "megatron_core", "qalora_group_size", "eva_config"),
  *("runtime_config", "ensure_weight_tying"),
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
  store.write(folder / "adapter_model.safetensors", content)
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
  about, tensors, file = _opened(epath.Path(folder))
  stabilised = about.get("use_rslora")
  scale = lora.scale_of(about["r"], about["lora_alpha"], stabilised)
  wanted = _kernels(table, config, shapes, vocab_size)
  outer = [key.name for key in table if "{}" not in key.name]
  _check_targets(about, file, tensors, wanted, outer)
  stacks = {}
  for name, tensor in wanted.items():
    module = name.removesuffix(".weight")
    names = [f"{_PREFIX}{module}.lora_{x}.weight" for x in "AB"]
    if not any(n in tensors for n in names):
      continue
    rank = _pattern(about.get("rank_pattern"), module, about["r"])
    alpha = _pattern(about.get("alpha_pattern"), module, about["lora_alpha"])
    a, b = (tensors.pop(n, None) for n in names)
    first = tensor.key.inputs_first
    outputs, inputs = tensor.shape[::-1] if first else tensor.shape
    for n, x, shape in zip(
      names, (a, b), ((rank, inputs), (outputs, rank)), strict=True
    ):
      if x is None or x.shape != shape:
        there = "missing" if x is None else list(x.shape)
        raise ValueError(f"{file}: {n} is {there}, it must be {list(shape)}")
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


def _opened(folder):
  """(adapter_config.json, {name: tensor}, the file of the tensors)."""
  path = folder / "adapter_config.json"
  if not path.exists():
    raise ValueError(f"{folder} holds no adapter_config.json of PEFT")
  about = store.read_json(path)
  for field, allowed in _ONLY.items():
    if field in about:
      fields.only(path, field, about[field], allowed)
  for field in sorted(about.keys() - _ONLY.keys() - _READ):
    fields.only(path, field, about[field] or None, (None,))
  _check_forms(path, about)
  file = folder / "adapter_model.safetensors"
  if not file.exists():
    raise ValueError(f"{folder} holds no adapter_model.safetensors")
  try:
    tensors = safetensors.numpy.load_file(file)
  except Exception as error:  # the library raises its own kinds
    raise ValueError(f"{file} is damaged or cut short: {error}") from error
  if not tensors:
    raise ValueError(f"{file} holds no tensor: there is nothing to merge")
  for name, x in tensors.items():
    if not np.all(np.isfinite(x.astype(np.float32))):
      raise ValueError(f"{file}: {name} holds numbers that are not finite")
  if not any(np.any(x) for name, x in tensors.items() if "lora_B" in name):
    text = "all of lora_B is zero, so the adapter changes nothing"
    warnings.warn(f"{file}: {text}", stacklevel=4)
  return about, tensors, file


def _check_forms(path, about):
  """Raises ValueError for a field of the config that has another form."""

  def number(value):
    return isinstance(value, int | float) and value is not True and value > 0

  def names(value):
    if isinstance(value, str):
      re.compile(value)
      return True
    value = [] if value is None else value
    return isinstance(value, list) and all(isinstance(x, str) for x in value)

  def patterns(value):
    value = {} if value is None else value
    return isinstance(value, dict) and all(
      re.compile(x) and number(n) for x, n in value.items()
    )

  for field, good, what in (
    ("r", lambda x: number(x) and isinstance(x, int), "a whole number above 0"),
    ("lora_alpha", number, "a number above 0"),
    *((f"{x}_modules", names, _NAMES) for x in ("target", "exclude")),
    *((f"{x}_pattern", patterns, _RANKS) for x in ("rank", "alpha")),
  ):
    try:
      fits = good(about.get(field))
    except re.error:
      fits = False
    if not fits:
      raise ValueError(
        f"{path}: {field} = {about.get(field)!r:.60} must be {what}"
      )


def _check_targets(about, file, tensors, inner, outer):
  """Raises ValueError for a target of the config that the file lacks.

  Args:
    about: adapter_config.json.
    file: of the tensors, for messages.
    tensors: {name: array}.
    inner, outer: names of the base's tensors in its layers and outside.
  """
  targets, left_out = about.get("target_modules"), about.get("exclude_modules")
  modules, outer = (
    [name.removesuffix(".weight") for name in names] for names in (inner, outer)
  )
  absent = []
  # "all-linear" is all of the layers, and nothing outside of them.
  names = [targets] if isinstance(targets, str) else targets or []
  for target in names:
    pattern = target if isinstance(targets, str) else [target]
    aimed = [m for m in modules if target == "all-linear" or _named(m, pattern)]
    lacks = [
      m
      for m in aimed
      if not _named(m, left_out)
      and not any(f"{_PREFIX}{m}.lora_{x}.weight" in tensors for x in "AB")
    ]
    if lacks and about.get("layers_to_transform") is None:
      raise ValueError(
        f"{file}: {_PREFIX}{lacks[0]}.lora_A.weight is missing, though "
        f"adapter_config.json names {target!r} in target_modules"
      )
    if aimed or any(_named(_module(n), pattern) for n in tensors):
      continue
    absent.append(target)
    if len(absent) == len(names) or any(_named(m, pattern) for m in outer):
      raise ValueError(
        f"{file}: no tensor is of {target!r}, which adapter_config.json names "
        "in target_modules"
      )
  if absent:  # as in PEFT: one list often serves many architectures
    text = f"the model has no {absent} of adapter_config.json's target_modules"
    warnings.warn(f"{file}: {text}", stacklevel=4)


def _module(name):
  """The module of an adapter's tensor."""
  return re.sub(r"\.lora_\w+(\.weight)?$", "", name.removeprefix(_PREFIX))


def _named(module, names):
  """Whether PEFT's list of module names, or its pattern, means a module."""
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(module == n or module.endswith(f".{n}") for n in names or ())


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
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default
