"""Random small models of published architectures, in torch and here."""

import copy
import functools
import json

import jax
import numpy as np
import torch
import transformers

from dpo_jax.models import families, hf, transformer
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.models import axes
from tests.models import published

VOCAB = 101  # not a multiple of 128
WINDOW = 5  # shorter than the sequences

_SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 48,
  "intermediate_size": 56,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 12,
  "sliding_window": WINDOW,
  "n_embd": 48,
  "n_head": 6,
  "n_layer": 3,
  "n_positions": 64,
  "n_ctx": 64,
  "rotary_dim": 4,
}


def small(name, **changes):
  """A published config.json with small sizes, every other field kept."""
  raw = copy.deepcopy(published.PUBLISHED[name])
  for field, size in _SIZES.items():
    if raw.get(field) is not None:
      raw[field] = size
  kind = raw["model_type"]
  heads = raw.get("num_attention_heads")
  if raw.get("num_key_value_heads") == 3 and (
    published.PUBLISHED[name]["num_key_value_heads"]
    == published.PUBLISHED[name]["num_attention_heads"]
  ):
    raw["num_key_value_heads"] = heads  # no groups where it has none
  if kind == "gemma3_text":
    # Some of its sizes are the class's defaults: one period, and two more.
    raw |= {k: _SIZES[k] for k in ("vocab_size", "head_dim")}
    raw |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    raw |= {"num_hidden_layers": 8}
  if kind == "smollm3":
    raw["num_hidden_layers"] = 6
    for field in ("no_rope_layers", "layer_types"):
      raw[field] = raw[field][:6]
  scaling = raw.get("rope_scaling")
  if scaling and "short_factor" in scaling:
    dim = raw["hidden_size"] // heads
    rotated = int(dim * raw.get("partial_rotary_factor", 1.0)) // 2
    for field in ("short_factor", "long_factor"):
      scaling[field] = scaling[field][-rotated:]
  for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
    if raw.get(field) is not None:
      raw[field] = 1
  return raw | changes


def save(raw, folder, seed=0):
  """A random torch model of a config.json, saved as transformers would.

  Its config.json is then replaced by `raw`: the published fields.
  """
  torch.manual_seed(seed)
  given = copy.deepcopy({k: v for k, v in raw.items() if k != "model_type"})
  config = transformers.AutoConfig.for_model(raw["model_type"], **given)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32
  ).eval()
  with torch.no_grad():  # biases, norms and heads matter too
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(folder)
  (folder / "config.json").write_text(json.dumps(raw))
  return model


def abstract(model, mesh):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = mesh_lib.shardings(mesh, shapes, axes.spec)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def load(folder, mesh, base="float32"):
  """(transformer.Model, params) of a folder."""
  checkpoint = hf.open_folder(folder)
  model = transformer.build(checkpoint.config, checkpoint.vocab_size)
  return model, hf.load(checkpoint, abstract(model, mesh), base)
