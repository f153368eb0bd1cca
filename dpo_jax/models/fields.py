"""The fields of a checkpoint's config.json, read strictly.

Defaults are those of transformers' own config classes. A field that is not
read, and not known to change nothing in a forward pass, is an error.
"""

import copy
import math

from dpo_jax import lookup
from dpo_jax.models import config as config_lib

# What a forward pass does not read: training, generation, tokenizer, origin.
_HARMLESS = {
  *("architectures", "auto_map", "model_type", "_name_or_path", "is_decoder"),
  *("torch_dtype", "dtype", "transformers_version", "tokenizer_class"),
  *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
  *("use_cache", "cache_implementation", "task_specific_params", "n_ctx"),
  *("pretraining_tp", "is_llama_config", "tie_encoder_decoder"),
  *("initializer_range", "gradient_checkpointing", "transformers.js_config"),
  *("attention_dropout", "hidden_dropout", "classifier_dropout", "embd_pdrop"),
  *("attn_pdrop", "resid_pdrop", "summary_activation", "summary_type"),
  *("summary_first_dropout", "summary_proj_to_labels", "summary_use_proj"),
  *("reorder_and_upcast_attn", "output_attentions", "output_hidden_states"),
  *("return_dict", "chunk_size_feed_forward", "problem_type", "layer_types"),
  *("is_encoder_decoder", "_attn_implementation", "attn_implementation"),
}
# Older spellings of what transformers' own classes resolve into other fields.
_RESOLVED = {
  *("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base"),
  *("rope_local_base_freq", "sliding_window_pattern", "hidden_act"),
  *("_sliding_window_pattern", "no_rope_layer_interval", "max_window_layers"),
  *("partial_rotary_factor", "original_max_position_embeddings"),
}


class Fields:
  """A config.json, with the defaults of its class; notes what is read."""

  def __init__(self, raw):
    import transformers

    self._raw = raw
    kind = raw["model_type"]
    fields = {k: v for k, v in raw.items() if k != "model_type"}
    fields = copy.deepcopy(fields)  # the class writes into nested ones
    try:
      config = transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:  # whatever its checks raise
      raise ValueError(f"config.json of a {kind}: {error}") from error
    self._values, self._read = config.to_dict(), set()

  def __getitem__(self, name):
    self._read.add(name)
    return self._values.get(name)

  def only(self, name, *allowed):
    """Raises ValueError for a value of a field that the decoder has not."""
    if self[name] not in allowed:
      raise ValueError(
        f"config.json: {name} = {self[name]!r} is not supported (allowed: "
        f"{', '.join(map(repr, allowed))})"
      )

  def finish(self):
    """Raises ValueError for fields of the file that nothing read."""
    unknown = sorted(set(self._raw) - self._read - _HARMLESS - _RESOLVED)
    if unknown:
      raise ValueError(
        f"config.json: the fields {unknown} of a {self._raw['model_type']} are "
        "not known here; what they change would be missing"
      )


_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "silu": "silu",
}


def activation(f, name):
  f.only(name, *_ACTIVATIONS)
  return _ACTIVATIONS[f[name]]


def scaling(rope, max_positions):
  """(RopeScaling or None, longest sequence) of `rope_parameters`."""
  kind = rope["rope_type"]
  known = {*("rope_type", "type", "rope_theta", "partial_rotary_factor")}
  make = lookup.lookup(_SCALINGS, kind, "config.json: rope_type")
  rope_scaling, used, longest = make(rope, max_positions)
  unknown = sorted(set(rope) - known - used)
  if unknown:
    raise ValueError(
      f"config.json: rope_parameters of type {kind!r} with {unknown} are not "
      "supported"
    )
  return rope_scaling, longest


def _linear(rope, longest):
  rope_scaling = config_lib.RopeScaling("linear", factor=rope["factor"])
  return rope_scaling, {"factor"}, longest


def _llama3(rope, longest):
  names = ("factor", "original_max_position_embeddings")
  names += ("low_freq_factor", "high_freq_factor")
  numbers = (rope[name] for name in names)
  return config_lib.RopeScaling("llama3", *numbers), set(names), longest


def _yarn(rope, longest):
  original = rope["original_max_position_embeddings"]
  factor = rope.get("factor") or longest / original
  magnitude = rope.get("attention_factor")
  if magnitude is None:
    magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
  rope_scaling = config_lib.RopeScaling(
    "yarn",
    factor,
    original,
    low=rope.get("beta_slow") or 1,
    high=rope.get("beta_fast") or 32,
    truncate=rope.get("truncate", True),
    magnitude=magnitude,
  )
  used = {*("factor", "original_max_position_embeddings", "attention_factor")}
  used |= {"beta_slow", "beta_fast", "truncate"}
  return rope_scaling, used, longest


def _longrope(rope, longest):
  """With the short divisors, for sequences up to the positions of pre-training.

  transformers takes the long ones where a batch is longer than that; so a
  sequence's values would depend on its neighbours.
  """
  original = rope["original_max_position_embeddings"]
  factor = rope.get("factor") or longest / original
  magnitude = rope.get("attention_factor")
  if magnitude is None:
    stretch = 1 + math.log(factor) / math.log(original)
    magnitude = math.sqrt(stretch) if factor > 1 else 1.0
  rope_scaling = config_lib.RopeScaling(
    "longrope",
    divisors=tuple(rope["short_factor"]),
    magnitude=magnitude,
  )
  used = {*("factor", "original_max_position_embeddings", "attention_factor")}
  return rope_scaling, used | {"short_factor", "long_factor"}, original


_SCALINGS = {
  "default": lambda rope, longest: (None, set(), longest),
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}
