"""The published architectures that the decoder is: config.json and key table.

`read` gives the ModelConfig of a checkpoint's own config.json. Its defaults are
those of the transformers library; a field that is neither read here nor known
to change nothing in a forward pass is an error that names it.
"""

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax import lookup
from dpo_jax.models import config as config_lib
from dpo_jax.models import fields, tables


class Family(NamedTuple):
  """An architecture.

  Attributes:
    read: fields.Fields -> dict of ModelConfig's fields.
    table: list of keys.Key.
  """

  read: Callable
  table: list

  @property
  def embedding(self):
    """The name of the token embedding."""
    return next(k.name for k in self.table if k.paths == ("embed/tokens",))

  @property
  def prefix(self):
    """What all names but the head's begin with; saved without it, none does."""
    return self.embedding.split(".")[0] + "."


def find(raw):
  """The Family of a config.json.

  Raises: ValueError naming an architecture that is not supported.
  """
  kind = raw.get("model_type")
  if kind is None:
    raise ValueError("config.json names no model_type")
  experts = [name for name in raw if "expert" in name and raw[name]]
  if experts:
    raise ValueError(
      f"model_type {kind!r} with {experts[0]} is a mixture of experts, which "
      f"is not supported (supported: {', '.join(sorted(FAMILIES))})"
    )
  if kind == "gemma3":
    raise ValueError(
      "model_type 'gemma3' sees images; of Gemma 3 the text models are "
      "supported: 'gemma3_text'"
    )
  return lookup.lookup(FAMILIES, kind, "model_type of config.json")


def read(raw):
  """(ModelConfig, vocabulary size) of a config.json, a dict.

  Raises: ValueError naming an unsupported architecture, field or value.
  """
  family = find(raw)
  f = fields.read(raw)
  quantised = f["quantization_config"]
  if quantised:
    raise ValueError(
      "config.json: quantization_config: quantised safetensors are not "
      "supported; take the unquantised checkpoint, and lora.base = 'int8' or "
      "'nf4'"
    )
  values = family.read(f)
  vocab_size = f["vocab_size"]
  fields.finish(f, raw["model_type"])
  return config_lib.ModelConfig(**values), vocab_size


def _gpt(f):
  """What GPT-2 and GPT-J share."""
  values = f.named(fields.GPT)
  embed, heads = values["embed"], values["heads"]
  values |= {"kv_heads": heads, "head_dim": embed // heads}
  return {**values, "mlp": values["mlp"] or 4 * embed}


def _gpt2(f):
  f.only("scale_attn_weights", True)
  f.only("scale_attn_by_inverse_layer_idx", False)
  f.only("add_cross_attention", False)
  return _gpt(f)


def _gptj(f):
  f.only("scale_attn_weights", None, True)
  f.only("rotary", None, True)
  f.only("tie_word_embeddings", False)
  shared = _gpt(f)
  return {
    **shared,
    "residual": "parallel_shared",
    "position": "rotary",
    "rotary_dim": f["rotary_dim"] or shared["head_dim"],
    "qkv_bias": False,
    "out_bias": False,
    "head_bias": True,
  }


def _rotary(f, head_dim, rope=None, partial=False):
  """Fields of the rotation, and max_positions.

  Only where `partial` do transformers' models heed partial_rotary_factor.
  """
  rope = f["rope_parameters"] if rope is None else rope
  share = rope.get("partial_rotary_factor") or 1.0
  if share != 1.0 and not partial:
    raise ValueError(
      f"config.json: partial_rotary_factor = {share} is not supported with "
      "this model_type"
    )
  scaling, longest = fields.scaling(rope, f["max_position_embeddings"])
  return {
    "max_positions": longest,
    "position": "rotary",
    "rotary_dim": int(head_dim * share),
    "rope_theta": float(rope["rope_theta"]),
    "rope_scaling": scaling,
  }


def _neox(f):
  values = f.named(fields.NEOX)
  head_dim = values["embed"] // values["heads"]
  return {
    **values,
    "kv_heads": values["heads"],
    "head_dim": head_dim,
    "residual": "parallel" if f["use_parallel_residual"] else "sequential",
    **_rotary(f, head_dim, partial=True),
  }


def _llama(f, *, rope=None, activation="hidden_act", partial=False):
  """What Llama and its relatives share."""
  f.only("rope_interleaved", None, False)
  values = f.named({**fields.LLAMA, "activation": activation})
  heads = values["heads"]
  head_dim = values["head_dim"] or values["embed"] // heads
  biases = ("qkv_bias", "out_bias", "mlp_bias")  # not every family has them
  return {
    **values,
    **{name: bool(values[name]) for name in biases},
    "kv_heads": values["kv_heads"] or heads,
    "head_dim": head_dim,
    "norm": "rmsnorm",
    "gated": True,
    **_rotary(f, head_dim, rope, partial),
  }


def _windows(f):
  """Fields of a family whose layers all have the window, if there is one."""
  window = f["sliding_window"]
  everything = window is None or window >= f["max_position_embeddings"]
  return _by_layer(f, ["full" if everything else "window"])


def _by_layer(f, kinds):
  """Fields of layers of different kinds: the shortest pattern that repeats."""
  for period in range(1, len(kinds) + 1):
    if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
      break
  window = f["sliding_window"]
  return {
    "layer_pattern": tuple(kinds[:period]),
    "window": window if "window" in kinds else None,
  }


def _layer_types(f):
  """The kind of each layer, from `layer_types`."""
  names = {"full_attention": "full", "sliding_attention": "window"}
  types = f["layer_types"] or ["full_attention"] * f["num_hidden_layers"]
  return [lookup.lookup(names, t, "config.json: layer_types") for t in types]


def _mistral(f):
  return {**_llama(f), **_windows(f)}


def _qwen2(f):
  f["use_sliding_window"]  # the layers' types follow from it
  values = {**_llama(f), **_by_layer(f, _layer_types(f))}
  return {**values, "qkv_bias": True, "out_bias": False}


def _qwen3(f):
  f["use_sliding_window"]
  return {**_llama(f), **_by_layer(f, _layer_types(f)), "qk_norm": "head"}


def _smollm3(f):
  f.only("use_sliding_window", None, False)
  kinds = _layer_types(f)
  rotates = f["no_rope_layers"] or [1] * len(kinds)
  kinds = ["full" if r else "nope" for r in rotates]
  return {**_llama(f), **_by_layer(f, kinds)}


def _phi3(f):
  for name in ("lm_head_bias", "attention_bias", "mlp_bias"):
    f.only(name, None, False)
  for name in ("full_attn_mod", "interpolate_factor"):
    f.only(name, None, 1)
  return {**_llama(f, partial=True), **_windows(f)}


def _olmo2(f):
  return {**_llama(f), "qk_norm": "all", "norm_place": "post"}


def _gemma(f):
  f.only("use_bidirectional_attention", None, False)
  return {
    "norm_offset": 1.0,
    "norm_place": "both",
    "embed_scale": f["hidden_size"] ** 0.5,
    "attention_scale": f["query_pre_attn_scalar"] ** -0.5,
    "attention_softcap": f["attn_logit_softcapping"],
    "logit_softcap": f["final_logit_softcapping"],
    **_by_layer(f, _layer_types(f)),
  }


def _gemma2(f):
  return {**_llama(f, activation="hidden_activation"), **_gemma(f)}


def _gemma3(f):
  ropes = f["rope_parameters"]
  full, near = ropes["full_attention"], ropes["sliding_attention"]
  if near["rope_type"] != "default":
    raise ValueError("config.json: scaled rotations in windows are not built")
  values = _llama(f, rope=full, activation="hidden_activation")
  values |= {**_gemma(f), "qk_norm": "head"}
  if values["window"] is not None:
    values["window_theta"] = float(near["rope_theta"])
  return values


FAMILIES = {
  "gpt2": Family(_gpt2, tables.GPT2),
  "gpt_neox": Family(_neox, tables.NEOX),
  "gptj": Family(_gptj, tables.GPTJ),
  "llama": Family(_llama, tables.LLAMA),
  "mistral": Family(_mistral, tables.LLAMA),
  "qwen2": Family(_qwen2, tables.LLAMA),
  "qwen3": Family(_qwen3, tables.LLAMA),
  "smollm3": Family(_smollm3, tables.LLAMA),
  "phi3": Family(_phi3, tables.PHI3),
  "olmo2": Family(_olmo2, tables.OLMO2),
  "gemma2": Family(_gemma2, tables.GEMMA),
  "gemma3_text": Family(_gemma3, tables.GEMMA),
}
