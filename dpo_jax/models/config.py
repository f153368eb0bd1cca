"""One decoder, many families: everything that tells them apart, as data."""

import dataclasses
import itertools
import typing
from typing import Literal

VOCAB_MULTIPLE = 128  # of the embedding rows, for sharding and matmul tiles

# What a layer of the pattern attends to, and whether it rotates.
LAYER_KINDS = ("full", "window", "nope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the positions of pre-training.

  Attributes:
    kind: "linear" (arXiv:2306.15595), "llama3" (arXiv:2407.21783), "yarn"
      (arXiv:2309.00071) or "longrope" (arXiv:2402.13753).
    factor: of the context's length.
    original: positions of pre-training.
    low, high: rotations over `original` between which frequencies go over from
      divided by `factor` to kept; of llama3 and yarn.
    truncate: yarn rounds that span to whole dimensions.
    divisors: one a frequency; of longrope.
    magnitude: factor on cos and sin.
  """

  kind: str
  factor: float = 1.0
  original: int = 0
  low: float = 1.0
  high: float = 1.0
  truncate: bool = True
  divisors: tuple[float, ...] = ()
  magnitude: float = 1.0


# Fields that say how a model is computed, not which one it is.
RUNTIME = ("dtype", "attention", "remat", "head_chunk", "unroll")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and block structure of a decoder. Letters as in the design.

  Attributes:
    layers, embed, heads, kv_heads, head_dim, mlp: L, D, N, K, H, F.
    max_positions: longest sequence; the rows of a learned position table.
    layer_pattern: kinds of the layers, repeated from the first on: "full"
      attention, "window", or "nope" (full, without rotation).
    window: a query of a "window" layer sees positions less than this far back.
    residual: "sequential" (GPT-2, Llama), "parallel" (NeoX: attention and mlp
      both read the block's input, each through its own norm) or
      "parallel_shared" (GPT-J: through one norm).
    norm: "layernorm" or "rmsnorm".
    norm_eps: added to the variance.
    norm_offset: the norms' scale is stored less this (Gemma: 1).
    norm_place: "pre", "post" (OLMo 2: of what attention and mlp give) or "both"
      (Gemma).
    qk_norm: RMSNorm of queries and keys: "none", over each "head", or over
      "all" heads at once.
    position: "learned" or "rotary".
    rotary_dim: dimensions of a head that rotate; the rest pass unrotated.
    rope_theta: base of the rotary frequencies.
    window_theta: that of "window" layers, which are not scaled; None is the
      same base and scaling as the others.
    rope_scaling: RopeScaling, or None.
    activation: "gelu", "gelu_tanh" or "silu".
    gated: two-branch mlp, act(gate) · up (SwiGLU with silu).
    qkv_bias, out_bias, mlp_bias, head_bias: which linear layers have biases.
    tied: the head is the transposed token embedding.
    embed_scale: factor on the embeddings, or None.
    attention_scale: factor on q·k; None is H^-½.
    attention_softcap, logit_softcap: c in c·tanh(x / c), or None.
    dtype: "float32" or "bfloat16", of the activations; parameters are f32.
    attention: implementation in ops.attention.ATTENTION; "auto" goes by
      platform and shape.
    remat: what of each block the backward pass computes again: "none"; the
      "full" block; all but the products with weights ("dots"); all but the
      projections of attention and its result ("names"); or that, which waits in
      the host's memory ("offload"). "auto" goes by memory.
    head_chunk: scored positions of a row per step of the head, see
      logprobs.Head; None goes by memory.
    unroll: periods of layer_pattern per turn of the loop over them. More
      compile longer; all of a small model's spare copies in and out of it.
  """

  layers: int
  embed: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  max_positions: int
  layer_pattern: tuple[str, ...] = ("full",)
  window: int | None = None
  residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
  norm: Literal["layernorm", "rmsnorm"] = "layernorm"
  norm_eps: float = 1e-5
  norm_offset: float = 0.0
  norm_place: Literal["pre", "post", "both"] = "pre"
  qk_norm: Literal["none", "head", "all"] = "none"
  position: Literal["learned", "rotary"] = "learned"
  rotary_dim: int = 0
  rope_theta: float = 10_000.0
  window_theta: float | None = None
  rope_scaling: RopeScaling | None = None
  activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu_tanh"
  gated: bool = False
  qkv_bias: bool = True
  out_bias: bool = True
  mlp_bias: bool = True
  head_bias: bool = False
  tied: bool = True
  embed_scale: float | None = None
  attention_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  dtype: Literal["float32", "bfloat16"] = "float32"
  attention: str = "auto"
  remat: Literal["auto", "none", "full", "dots", "names", "offload"] = "auto"
  head_chunk: int | None = None
  unroll: int = 1

  def __post_init__(self):
    _check_choices(self)
    if self.unroll > self.periods:
      raise ValueError(
        f"model.unroll = {self.unroll} is more than the {self.periods} periods "
        f"of model.layer_pattern in model.layers = {self.layers}"
      )
    if self.heads % self.kv_heads:
      raise ValueError(
        f"model.heads = {self.heads} is not a multiple of "
        f"model.kv_heads = {self.kv_heads}"
      )
    windowed = "window" in self.kinds
    for name in ("window", "window_theta"):
      value = getattr(self, name)
      if value is not None and not windowed:
        raise ValueError(
          f"model.{name} = {value} has no effect: no layer of "
          f"model.layer_pattern = {self.layer_pattern} is 'window'"
        )
    if windowed and self.window is None:
      raise ValueError("model.layer_pattern has 'window': set model.window")
    _check_rotation(self)
    if self.tied and self.head_bias:
      raise ValueError("model.head_bias needs model.tied = False")

  @property
  def kinds(self):
    """The kind of each layer."""
    pattern = itertools.cycle(self.layer_pattern)
    return tuple(itertools.islice(pattern, self.layers))

  @property
  def periods(self):
    """Whole periods of the pattern; layers after them are the rest."""
    return self.layers // len(self.layer_pattern)

  @property
  def windows(self):
    """The window of each layer, None where it sees all."""
    return tuple(
      self.window if kind == "window" else None for kind in self.kinds
    )


def _check_choices(config):
  for field in dataclasses.fields(config):
    value, allowed = getattr(config, field.name), typing.get_args(field.type)
    if typing.get_origin(field.type) is Literal and value not in allowed:
      raise ValueError(f"model.{field.name} = {value!r} (allowed: {allowed})")
  if not config.layer_pattern or set(config.layer_pattern) - set(LAYER_KINDS):
    raise ValueError(
      f"model.layer_pattern = {config.layer_pattern} must be made of "
      f"{LAYER_KINDS}"
    )
  if len(config.layer_pattern) > config.layers:
    raise ValueError(
      f"model.layer_pattern has {len(config.layer_pattern)} layers, more than "
      f"model.layers = {config.layers}"
    )
  if config.residual != "sequential" and config.norm_place != "pre":
    raise ValueError(
      f"model.norm_place = {config.norm_place!r} needs "
      "model.residual = 'sequential'"
    )


def _check_rotation(config):
  learned = config.position == "learned"
  if learned and (config.rotary_dim or "nope" in config.layer_pattern):
    raise ValueError(
      f"model.rotary_dim = {config.rotary_dim} and 'nope' layers have no "
      "effect with model.position = 'learned'; set it to 0 and leave them out"
    )
  rotary_ok = 0 < config.rotary_dim <= config.head_dim
  if not learned and (config.rotary_dim % 2 or not rotary_ok):
    raise ValueError(
      f"model.rotary_dim = {config.rotary_dim} must be even and in "
      f"2..{config.head_dim} (model.head_dim)"
    )


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


def _gptj(layers, embed, heads):
  return dataclasses.replace(
    _gpt2(layers, embed, heads),
    max_positions=2048,
    residual="parallel_shared",
    position="rotary",
    rotary_dim=64,
    qkv_bias=False,
    out_bias=False,
    head_bias=True,
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
    qkv_bias=False,
    out_bias=False,
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
  "gpt-j-6b": _gptj(28, 4096, 16),
  "llama-7b": _llama(32, 4096, 32, 32, 11008, False, 1e4),
  "smollm2-135m": _llama(30, 576, 9, 3, 1536, True, 1e5),
}

# {name on the hub: (preset, vocabulary size)}: shapes that are known without
# the hub.
PUBLISHED = {
  "openai-community/gpt2": ("gpt2", 50257),
  "openai-community/gpt2-large": ("gpt2-large", 50257),
  "EleutherAI/gpt-j-6b": ("gpt-j-6b", 50400),
  "EleutherAI/pythia-70m": ("pythia-70m", 50304),
  "EleutherAI/pythia-1.4b": ("pythia-1.4b", 50304),
  "EleutherAI/pythia-2.8b": ("pythia-2.8b", 50304),
  "HuggingFaceTB/SmolLM2-135M": ("smollm2-135m", 49152),
  "HuggingFaceTB/SmolLM2-135M-Instruct": ("smollm2-135m", 49152),
}


def matmul_flops(config, vocab_size, tokens, scored, visible):
  """FLOPs of one forward pass's matmuls that the result needs.

  Args:
    config: ModelConfig.
    vocab_size: real tokens; padded columns are not needed work.
    tokens: positions that hold a token.
    scored: positions that the head runs on.
    visible: (query, key) pairs that the attention rule admits, of all layers.
  Returns: (FLOPs of products with weights, those of attention), a multiply-add
    counted as 2.
  """
  c = config
  projections = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  mlp = c.embed * c.mlp * (3 if c.gated else 2)
  dense = c.layers * (projections + mlp) * tokens
  attention = 2 * c.heads * c.head_dim * visible
  return 2 * (dense + c.embed * vocab_size * scored), 2 * attention


def step_flops(config, vocab_size, counts, *, on_base, reference):
  """FLOPs that updates need, without an adapter's own.

  Of products with weights one pass forward, one to the activations, and one to
  the weights if they are trained; of attention three. One more of each for the
  reference.

  Args:
    config, vocab_size: as in `matmul_flops`.
    counts: its (tokens, scored, visible), of all batches.
    on_base: whether the weights themselves are frozen.
    reference: whether a reference runs beside the policy.
  """
  by_weights, by_attention = matmul_flops(config, vocab_size, *counts)
  passes = (2 if on_base else 3) + reference
  return passes * by_weights + (3 + reference) * by_attention
