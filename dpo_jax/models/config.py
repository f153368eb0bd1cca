"""One decoder, many families: everything that tells them apart, as data."""

import dataclasses

VOCAB_MULTIPLE = 128  # of the embedding rows, for sharding and matmul tiles


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and block structure of a decoder. Letters as in the design.

  Attributes:
    layers, embed, heads, kv_heads, head_dim, mlp: L, D, N, K, H, F.
    max_positions: longest sequence; the rows of a learned position table.
    residual: "sequential" (GPT-2, Llama) or "parallel" (NeoX: attention and
      mlp both read the block's input, each through its own norm).
    norm: "layernorm" or "rmsnorm".
    norm_eps: added to the variance.
    position: "learned" or "rotary".
    rotary_dim: dimensions of a head that rotate; the rest pass unrotated.
    rope_theta: base of the rotary frequencies.
    activation: "gelu", "gelu_tanh" or "silu".
    gated: two-branch mlp, act(gate) · up (SwiGLU with silu).
    attention_bias, mlp_bias, head_bias: whether the linear layers have biases.
    tied: the head is the transposed token embedding.
    window: a query sees positions less than this far back; None is all.
    dtype: "float32" or "bfloat16", of the activations; parameters are f32.
    attention: implementation in ops.attention.ATTENTION.
    remat: recompute each block in the backward pass.
    unroll: layers per turn of the loop over layers. More compile longer; all of
      a small model's spare the copies in and out of the loop.
  """

  layers: int
  embed: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  max_positions: int
  residual: str = "sequential"
  norm: str = "layernorm"
  norm_eps: float = 1e-5
  position: str = "learned"
  rotary_dim: int = 0
  rope_theta: float = 10_000.0
  activation: str = "gelu_tanh"
  gated: bool = False
  attention_bias: bool = True
  mlp_bias: bool = True
  head_bias: bool = False
  tied: bool = True
  window: int | None = None
  dtype: str = "float32"
  attention: str = "tiled"
  remat: bool = False
  unroll: int = 1

  def __post_init__(self):
    allowed = {
      "residual": ("sequential", "parallel"),
      "norm": ("layernorm", "rmsnorm"),
      "position": ("learned", "rotary"),
      "activation": ("gelu", "gelu_tanh", "silu"),
      "dtype": ("float32", "bfloat16"),
    }
    for field, values in allowed.items():
      if getattr(self, field) not in values:
        raise ValueError(
          f"model.{field} = {getattr(self, field)!r} (allowed: {values})"
        )
    if self.unroll > self.layers:
      raise ValueError(
        f"model.unroll = {self.unroll} is more than model.layers = "
        f"{self.layers}"
      )
    if self.heads % self.kv_heads:
      raise ValueError(
        f"model.heads = {self.heads} is not a multiple of "
        f"model.kv_heads = {self.kv_heads}"
      )
    if self.position == "learned" and self.rotary_dim:
      raise ValueError(
        f"model.rotary_dim = {self.rotary_dim} has no effect with "
        "model.position = 'learned'; set it to 0"
      )
    rotary_ok = 0 < self.rotary_dim <= self.head_dim
    if self.position == "rotary" and (self.rotary_dim % 2 or not rotary_ok):
      raise ValueError(
        f"model.rotary_dim = {self.rotary_dim} must be even and in "
        f"2..{self.head_dim} (model.head_dim)"
      )
    if self.tied and self.head_bias:
      raise ValueError("model.head_bias needs model.tied = False")


def padded_vocab(vocab_size):
  """V: the vocabulary rounded up to VOCAB_MULTIPLE."""
  return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _gpt2(layers, embed, heads):
  return ModelConfig(
    layers=layers,
    embed=embed,
    heads=heads,
    kv_heads=heads,
    head_dim=embed // heads,
    mlp=4 * embed,
    max_positions=1024,
  )


def _neox(layers, embed, heads):
  return dataclasses.replace(
    _gpt2(layers, embed, heads),
    max_positions=2048,
    residual="parallel",
    position="rotary",
    rotary_dim=embed // heads // 4,
    activation="gelu",
    tied=False,
  )


def _llama(layers, embed, heads, kv_heads, mlp, tied, rope_theta):
  return dataclasses.replace(
    _gpt2(layers, embed, heads),
    kv_heads=kv_heads,
    mlp=mlp,
    max_positions=2048,
    norm="rmsnorm",
    position="rotary",
    rotary_dim=embed // heads,
    rope_theta=rope_theta,
    activation="silu",
    gated=True,
    attention_bias=False,
    mlp_bias=False,
    tied=tied,
  )


PRESETS = {
  "micro": _llama(2, 32, 4, 2, 64, True, 1e4),
  "tiny": _llama(4, 128, 4, 4, 384, True, 1e4),
  "gpt2": _gpt2(12, 768, 12),
  "gpt2-large": _gpt2(36, 1280, 20),
  "pythia-70m": _neox(6, 512, 8),
  "pythia-1.4b": _neox(24, 2048, 16),
  "pythia-2.8b": _neox(32, 2560, 32),
  "llama-7b": _llama(32, 4096, 32, 32, 11008, False, 1e4),
  "smollm2-135m": _llama(30, 576, 9, 3, 1536, True, 1e5),
}


def matmul_flops(config, vocab_size, tokens, scored, visible):
  """FLOPs of one forward pass's matmuls that the result needs.

  Args:
    config: ModelConfig.
    vocab_size: real tokens; padded columns are not needed work.
    tokens: positions that hold a token.
    scored: positions that the head runs on.
    visible: (query, key) pairs that the attention rule admits.
  Returns: FLOPs, a multiply-add counted as 2. Training needs 3 × this.
  """
  c = config
  projections = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  mlp = c.embed * c.mlp * (3 if c.gated else 2)
  dense = c.layers * (projections + mlp) * tokens
  attention = 2 * c.layers * c.heads * c.head_dim * visible
  return 2 * (dense + attention + c.embed * vocab_size * scored)
