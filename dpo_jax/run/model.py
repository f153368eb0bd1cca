"""The model and the tokenizer that a config names."""

import dataclasses
import json

from dpo_jax.config import origin, saved
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder, families
from dpo_jax.run import trained


def shape(fields, init_from):
  """(ModelConfig, vocabulary size or None).

  Args:
    fields: of config.model: the whole shape, or RUNTIME fields only; then the
      shape is that of init_from, a checkpoint's own config.json, or a run's.
    init_from: of the config.
  Raises: ValueError if both bring a shape, or none does.
  """
  runtime = dict(fields)
  pretrained = trained.pretrained(init_from)
  if set(runtime) - set(model_config.RUNTIME):
    if pretrained is not None:
      raise ValueError(
        f"init_from = {init_from!r} brings its own shape: config.model must "
        f"have the fields {model_config.RUNTIME} only; select it by the "
        f"config's argument, :model={init_from}"
      )
    return model_config.ModelConfig(**runtime), None
  if pretrained is not None:
    own, vocab_size = pretrained.config, pretrained.vocab_size
  elif init_from is not None:
    run = saved.saved_config(init_from)
    own, vocab_size = shape(run.model.to_dict(), run.init_from)
  else:
    raise ValueError(
      "config.model has no shape and init_from is not set; name a pre-trained "
      "model by the config's argument, :model=hf:NAME, or a preset"
    )
  runtime["unroll"] = min(runtime["unroll"], own.periods)
  return dataclasses.replace(own, **runtime), vocab_size


def known_shape(spec):
  """(ModelConfig, vocabulary size) of init_from, without fetching anything.

  Args:
    spec: "hf:NAME", "gguf:FILE" or a run folder.
  Raises: ValueError for a name of the hub whose config.json is not here, and
    that no preset is the shape of.
  """
  kind, name = origin.parse(spec or "")
  if kind != "hf":
    return shape({"unroll": 1}, spec)
  path = origin.kept_config(name)
  if path is not None:
    return families.read(json.loads(path.read_text()))
  if name in model_config.PUBLISHED:
    preset, vocab_size = model_config.PUBLISHED[name]
    return model_config.PRESETS[preset], vocab_size
  raise ValueError(
    f"the shape of {spec} is not known here: it is no folder with a "
    "config.json, the hub's cache has none of it, and no preset is its shape"
  )


def _ends(init_from):
  """What the model of init_from, or of the run it names, generates up to."""
  if init_from is None:
    return ()
  pretrained = trained.pretrained(init_from)
  if pretrained is not None:
    return pretrained.ends
  return _ends(saved.saved_config(init_from).init_from)


def build(fields, init_from, tokenizer_name, longest):
  """(decoder.Model, tokenize.Tokenizer).

  Args:
    fields, init_from: see `shape`.
    tokenizer_name: of config.tokenizer.
    longest: tokens of a prompt and a completion, at most.
  Raises: ValueError if the tokenizer has more tokens than the model, or the
    data may be longer than its positions.
  """
  tokenizer = tokenize.load(tokenizer_name)
  ends = (*tokenizer.other_ends, *_ends(init_from))
  tokenizer = tokenizer._replace(other_ends=ends)
  own, vocab_size = shape(fields, init_from)
  if vocab_size is None:
    vocab_size = tokenizer.vocab_size
  where = f"the model of init_from = {init_from!r}"
  tokenizer = fitting(tokenizer, vocab_size, tokenizer_name, where)
  if longest > own.max_positions:
    raise ValueError(
      f"data.max_prompt_length + data.max_completion_length = {longest} is "
      f"more than model.max_positions = {own.max_positions}"
    )
  return decoder.build(own, vocab_size), tokenizer


def fitting(tokenizer, vocab_size, name, where):
  """The Tokenizer for a model of `vocab_size` tokens.

  Args:
    name: of the tokenizer.
    where: what the model is called.
  Raises: ValueError if it has more tokens than the model.
  """
  spare = set(range(vocab_size, tokenizer.vocab_size))
  ends = {tokenizer.bos_id, tokenizer.eos_id}
  if spare <= set(tokenizer.specials) and not spare & ends:
    # Gemma 3 has a token for images, which its text models have no row for.
    tokenizer = tokenizer._replace(vocab_size=vocab_size)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f"tokenizer = {name!r} has {tokenizer.vocab_size} tokens, but {where} "
      f"only {vocab_size}; use its own tokenizer"
    )
  return tokenizer
