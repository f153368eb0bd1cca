"""The key table of each family; see models/keys.py."""

from dpo_jax.models.keys import Key


def _norm(name, path):
  return [
    Key(f"{name}.weight", (f"{path}/scale",)),
    Key(f"{name}.bias", (f"{path}/bias",)),
  ]


def _linear(name, *paths, **how):
  return [
    Key(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), **how),
    Key(f"{name}.bias", tuple(f"{path}/bias" for path in paths), **how),
  ]


_QKV = ("attn/q", "attn/k", "attn/v")

_G = "transformer.h.{}"
GPT2 = [
  Key("transformer.wte.weight", ("embed/tokens",)),
  Key("transformer.wpe.weight", ("embed/positions",)),
  *_norm(f"{_G}.ln_1", "norm_attn"),
  *_linear(f"{_G}.attn.c_attn", *_QKV, inputs_first=True),
  *_linear(f"{_G}.attn.c_proj", "attn/out", inputs_first=True),
  *_norm(f"{_G}.ln_2", "norm_mlp"),
  *_linear(f"{_G}.mlp.c_fc", "mlp/up", inputs_first=True),
  *_linear(f"{_G}.mlp.c_proj", "mlp/down", inputs_first=True),
  *_norm("transformer.ln_f", "final_norm"),
  *_linear("lm_head", "head"),
]

GPTJ = [
  Key("transformer.wte.weight", ("embed/tokens",)),
  *_norm(f"{_G}.ln_1", "norm_attn"),
  *_linear(f"{_G}.attn.q_proj", "attn/q", pairs=True),
  *_linear(f"{_G}.attn.k_proj", "attn/k", pairs=True),
  *_linear(f"{_G}.attn.v_proj", "attn/v"),
  *_linear(f"{_G}.attn.out_proj", "attn/out"),
  *_linear(f"{_G}.mlp.fc_in", "mlp/up"),
  *_linear(f"{_G}.mlp.fc_out", "mlp/down"),
  *_norm("transformer.ln_f", "final_norm"),
  *_linear("lm_head", "head"),
]

_N = "gpt_neox.layers.{}"
NEOX = [
  Key("gpt_neox.embed_in.weight", ("embed/tokens",)),
  *_norm(f"{_N}.input_layernorm", "norm_attn"),
  *_linear(f"{_N}.attention.query_key_value", *_QKV, join="heads"),
  *_linear(f"{_N}.attention.dense", "attn/out"),
  *_norm(f"{_N}.post_attention_layernorm", "norm_mlp"),
  *_linear(f"{_N}.mlp.dense_h_to_4h", "mlp/up"),
  *_linear(f"{_N}.mlp.dense_4h_to_h", "mlp/down"),
  *_norm("gpt_neox.final_layer_norm", "final_norm"),
  *_linear("embed_out", "head"),
]

_L = "model.layers.{}"
_OUTSIDE = [
  Key("model.embed_tokens.weight", ("embed/tokens",)),
  *_norm("model.norm", "final_norm"),
  *_linear("lm_head", "head"),
]
_ATTENTION = [
  *_linear(f"{_L}.self_attn.q_proj", "attn/q"),
  *_linear(f"{_L}.self_attn.k_proj", "attn/k"),
  *_linear(f"{_L}.self_attn.v_proj", "attn/v"),
  *_linear(f"{_L}.self_attn.o_proj", "attn/out"),
  Key(f"{_L}.self_attn.q_norm.weight", ("attn/norm_q/scale",)),
  Key(f"{_L}.self_attn.k_norm.weight", ("attn/norm_k/scale",)),
]
_MLP = [
  *_linear(f"{_L}.mlp.gate_proj", "mlp/gate"),
  *_linear(f"{_L}.mlp.up_proj", "mlp/up"),
  *_linear(f"{_L}.mlp.down_proj", "mlp/down"),
]
_PRE_NORMS = [
  *_norm(f"{_L}.input_layernorm", "norm_attn"),
  *_norm(f"{_L}.post_attention_layernorm", "norm_mlp"),
]
LLAMA = [*_OUTSIDE, *_PRE_NORMS, *_ATTENTION, *_MLP]

PHI3 = [
  *_OUTSIDE,
  *_PRE_NORMS,
  *_linear(f"{_L}.self_attn.qkv_proj", *_QKV),
  *_linear(f"{_L}.self_attn.o_proj", "attn/out"),
  *_linear(f"{_L}.mlp.gate_up_proj", "mlp/gate", "mlp/up"),
  *_linear(f"{_L}.mlp.down_proj", "mlp/down"),
]

OLMO2 = [
  *_OUTSIDE,
  *_norm(f"{_L}.post_attention_layernorm", "norm_attn_out"),
  *_norm(f"{_L}.post_feedforward_layernorm", "norm_mlp_out"),
  *_ATTENTION,
  *_MLP,
]

GEMMA = [
  *_OUTSIDE,
  *_norm(f"{_L}.input_layernorm", "norm_attn"),
  *_norm(f"{_L}.post_attention_layernorm", "norm_attn_out"),
  *_norm(f"{_L}.pre_feedforward_layernorm", "norm_mlp"),
  *_norm(f"{_L}.post_feedforward_layernorm", "norm_mlp_out"),
  *_ATTENTION,
  *_MLP,
]

# Of sequence classifiers, in the place of a head; of one label, a reward model.
SCORE = [Key("score.weight", ("score/kernel",))]

# Of GGUF files of the Llama family: queries and keys are stored so that
# neighbours rotate together.
_B = "blk.{}"
GGUF_LLAMA = [
  Key("token_embd.weight", ("embed/tokens",)),
  *_norm("output_norm", "final_norm"),
  *_linear("output", "head"),
  *_norm(f"{_B}.attn_norm", "norm_attn"),
  *_norm(f"{_B}.ffn_norm", "norm_mlp"),
  *_linear(f"{_B}.attn_q", "attn/q", pairs=True),
  *_linear(f"{_B}.attn_k", "attn/k", pairs=True),
  *_linear(f"{_B}.attn_v", "attn/v"),
  *_linear(f"{_B}.attn_output", "attn/out"),
  *_linear(f"{_B}.ffn_gate", "mlp/gate"),
  *_linear(f"{_B}.ffn_up", "mlp/up"),
  *_linear(f"{_B}.ffn_down", "mlp/down"),
]
