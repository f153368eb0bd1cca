"""The fields of a checkpoint's config.json, read strictly.

Defaults are those of transformers' own config classes. A field that nothing
reads is an error, as what it changes would be missing, unless one of these
rules says that it changes nothing:

- its name tells where the file came from ("unsloth_…", "…_version", "…_path"),
  or of training, tokens, types and kernels (_SILENT);
- its value is null or empty: it says nothing;
- it is about quantisation or says what is used, and false;
- its value is words ("my-data"), and its name is of no part of a model.
"""

import copy
import math
import re

from dpo_jax import lookup
from dpo_jax.models import config as config_lib

# Names of what a forward pass does not read, whatever their value.
_SILENT = re.compile(
  "|".join(
    (
      # Where the file came from, and what wrote it.
      r"_?unsloth_.*|.*_version|(.*_)?(name_or_path|path|commit|hash|revision)",
      r"architectures|auto_map|author|license|model_type|transformers\.js_config",
      # Training.
      r".*(dropout|pdrop|layerdrop)(_prob|_rate|_p)?|initializer_.*|init_std",
      r"train(ing|er)?_.*|neftune_.*|wandb_.*|keys_to_ignore_.*",
      r"gradient_checkpointing|(.*_)?loss(_.*)?|problem_type|pretraining_tp",
      # Tokens and labels; generation.
      r".*_token_(id|index)|tokenizer_.*|id2label|label2id|task_specific_params",
      r"use_cache|cache_implementation|max_length|num_labels",
      # In what type and by which kernel it is held and computed.
      r"(torch_)?dtype|.*attn_implementation.*|(use_)?_?flash_att.*",
      r"return_dict|output_.*|chunk_size_feed_forward",
      # Heads of other tasks; what is no part of a decoder.
      r"summary_.*|is_decoder|is_encoder_decoder|tie_encoder_decoder",
      r"is_llama_config|n_ctx|reorder_and_upcast_attn",
      # Older spellings that transformers' classes resolve into other fields.
      r"rope_theta|rope_scaling|rope_local_base_freq|rotary_pct",
      r"rotary_emb_base|partial_rotary_factor|no_rope_layer_interval",
      r"original_max_position_embeddings|_?sliding_window_pattern|layer_types",
      r"max_window_layers|hidden_act",
    )
  )
)
# Names of how weights may be held, and of what a model may have that a decoder
# has not: off, they say that it is not so.
_OFF = re.compile(
  r".*(quant|load_in_|bnb_|gptq|awq).*"
  r"|use_(?!(.*_)?(rope|rotary|position|norm|bias|mask)).*"
)
# Names of parts of a model, which words too can change ("layernorm").
_PARTS = re.compile(
  r".*(quant|norm|activation|type|rope|rotary|position|attn|attention|mlp"
  r"|layer|head|embed|bias|mask|scal|hidden|cache).*|(.*_)?act"
)


# What files call the fields of a ModelConfig.
GPT = {
  "layers": "n_layer",
  "embed": "n_embd",
  "heads": "n_head",
  "mlp": "n_inner",
  "max_positions": "n_positions",
  "norm_eps": "layer_norm_epsilon",
  "activation": "activation_function",
  "tied": "tie_word_embeddings",
}
_LATER = {
  "layers": "num_hidden_layers",
  "embed": "hidden_size",
  "heads": "num_attention_heads",
  "mlp": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "activation": "hidden_act",
  "qkv_bias": "attention_bias",
  "out_bias": "attention_bias",
  "tied": "tie_word_embeddings",
}
NEOX = {**_LATER, "norm_eps": "layer_norm_eps"}
LLAMA = {
  **_LATER,
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_eps": "rms_norm_eps",
  "mlp_bias": "mlp_bias",
}
# The activations by their names there; of two names the last is written.
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "silu": "silu",
}


class Fields:
  """Values by name, None for those that are not there; notes what is read."""

  def __init__(self, values, given):
    self._values, self._unread = values, set(given)

  def get(self, name, default=None):
    self._unread.discard(name)
    return self._values.get(name, default)

  __getitem__ = get

  def named(self, names):
    """{field of ModelConfig: its value} of {field: its name here}."""
    values = {field: self[name] for field, name in names.items()}
    self.only(names["activation"], *_ACTIVATIONS)
    return {**values, "activation": _ACTIVATIONS[values["activation"]]}

  def only(self, name, *allowed):
    """Raises ValueError for a value of a field that the decoder has not."""
    only("config.json", name, self[name], allowed)

  def unread(self, known=frozenset()):
    """Names that were given, nothing has read and are not among the known."""
    return sorted(self._unread - known)

  def silent(self, name):
    """Whether a field that nothing reads changes nothing, by the rules."""
    value = self._values.get(name)
    if value in (None, "", [], {}) or _SILENT.fullmatch(name):
      return True
    if value is False:
      return _OFF.fullmatch(name) is not None
    words = value if isinstance(value, list) else [value]
    return all(isinstance(x, str) for x in words) and not _PARTS.fullmatch(name)


def only(where, name, value, allowed):
  """Raises ValueError for a value that is not among the allowed."""
  if value not in allowed:
    raise ValueError(
      f"{where}: {name} = {value!r} is not supported (allowed: "
      f"{', '.join(map(repr, allowed))})"
    )


def read(raw):
  """The Fields of a config.json, with the defaults of its class."""
  import transformers

  kind = raw["model_type"]
  given = {k: v for k, v in raw.items() if k != "model_type"}
  given = copy.deepcopy(given)  # the class writes into nested ones
  try:
    config = transformers.AutoConfig.for_model(kind, **given)
  except Exception as error:  # whatever its checks raise
    raise ValueError(f"config.json of a {kind}: {error}") from error
  return Fields(config.to_dict(), given)


def finish(f, kind):
  """Raises ValueError for fields of the file that nothing read."""
  unknown = [name for name in f.unread() if not f.silent(name)]
  if unknown:
    raise ValueError(
      f"config.json: the fields {unknown} of a {kind} are not known here; what "
      "they change would be missing"
    )


def written(config, names):
  """{name: value} of a file, the inverse of `Fields.named`."""
  values = {name: getattr(config, field) for field, name in names.items()}
  theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
  return {**values, names["activation"]: theirs[config.activation]}


def scaling(rope, max_positions):
  """(RopeScaling or None, longest sequence) of `rope_parameters`."""
  kind = rope["rope_type"]
  make = lookup.lookup(_SCALINGS, kind, "config.json: rope_type")
  f = Fields(rope, rope)
  rope_scaling, longest = make(f, max_positions)
  unknown = f.unread(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  )
  if unknown:
    raise ValueError(
      f"config.json: rope_parameters of type {kind!r} with {unknown} are not "
      "supported"
    )
  return rope_scaling, longest


def _linear(rope, longest):
  return config_lib.RopeScaling("linear", factor=rope["factor"]), longest


def _llama3(rope, longest):
  names = ("factor", "original_max_position_embeddings")
  names += ("low_freq_factor", "high_freq_factor")
  return config_lib.RopeScaling("llama3", *map(rope.get, names)), longest


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
  return rope_scaling, longest


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
  rope.get("long_factor")  # known, and never taken
  divisors = tuple(rope["short_factor"])
  rope_scaling = config_lib.RopeScaling(
    "longrope", divisors=divisors, magnitude=magnitude
  )
  return rope_scaling, original


_SCALINGS = {
  "default": lambda rope, longest: (None, longest),
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}
