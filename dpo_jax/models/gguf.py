"""GGUF files of the Llama family, as checkpoints: dequantised to f32."""

import numpy as np

from dpo_jax.config import origin
from dpo_jax.models import families, hf, tables

# Metadata of the model, and the field of a Llama's config.json that it is.
_FIELDS = {
  "llama.block_count": "num_hidden_layers",
  "llama.context_length": "max_position_embeddings",
  "llama.embedding_length": "hidden_size",
  "llama.feed_forward_length": "intermediate_size",
  "llama.attention.head_count": "num_attention_heads",
  "llama.attention.head_count_kv": "num_key_value_heads",
  "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "llama.rope.freq_base": "rope_theta",
  "llama.rope.dimension_count": "head_dim",
  "llama.vocab_size": "vocab_size",
  "tokenizer.ggml.bos_token_id": "bos_token_id",
  "tokenizer.ggml.eos_token_id": "eos_token_id",
  "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_OPTIONAL = {
  "llama.attention.head_count_kv",  # else that of heads
  "llama.rope.freq_base",  # else llama.cpp's default
  "llama.rope.dimension_count",  # else embedding / heads
  "llama.vocab_size",  # else the rows of the embedding
}


def open_file(path):
  """The hf.Checkpoint of a GGUF file.

  Raises: ValueError for another architecture, or metadata that is not known
    or missing.
  """
  reader = origin.gguf_reader(path)
  values = {name: reader.fields[name].contents() for name in reader.fields}
  kind = values.get("general.architecture")
  if kind != "llama":
    raise ValueError(
      f"{path}: architecture {kind!r} is not supported in GGUF files (only "
      "'llama'); take the model's safetensors: hf:NAME"
    )
  unknown = [n for n in values if n.startswith("llama.") and n not in _FIELDS]
  if unknown:
    raise ValueError(f"{path}: the metadata {unknown} is not known here")
  needed = {name for name in _FIELDS if name.startswith("llama.")} - _OPTIONAL
  missing = sorted(needed - values.keys())
  if missing:
    raise ValueError(f"{path}: the metadata {missing} is missing")
  # The file counts dimensions from the innermost.
  shapes = {t.name: tuple(map(int, t.shape[::-1])) for t in reader.tensors}
  raw = {field: values[n] for n, field in _FIELDS.items() if n in values}
  raw.setdefault("rope_theta", 10000.0)
  if "token_embd.weight" in shapes:
    raw.setdefault("vocab_size", shapes["token_embd.weight"][0])
  # The file holds f32, in which 1e-5 is 9.99999975e-06.
  for name in ("rms_norm_eps", "rope_theta"):
    raw[name] = float(str(np.float32(raw[name])))
  raw |= {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": "blk.0.attn_q.bias" in shapes,
    "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    "tie_word_embeddings": "output.weight" not in shapes,
  }
  config, vocab_size = families.read(raw)

  def read():
    import gguf

    for tensor in reader.tensors:
      x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
      yield tensor.name, np.asarray(x, np.float32)

  table, where = tables.GGUF_LLAMA, str(path)
  ends = (raw["eos_token_id"],) if "eos_token_id" in raw else ()
  return hf.Checkpoint(
    raw, config, vocab_size, table, shapes, read, where, ends
  )
