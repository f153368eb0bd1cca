"""One scanned decoder for GPT-2, GPT-NeoX and Llama blocks, by config.

Linen stays inside this file: `build` returns pure functions of a nested dict.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax import lookup
from dpo_jax.models import axes
from dpo_jax.models import config as config_lib
from dpo_jax.ops import attention, logprobs

_ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "silu": nn.silu,
}


class Model(NamedTuple):
  """Pure functions of a decoder.

  Attributes:
    init: rng -> params, a nested dict of f32 arrays.
    apply: (params, batch) -> (hidden [R, T, D], logprobs.Head); reads tokens,
      positions, segment_ids, branch_ids and example_index of the batch.
    decode: (params, tokens i32[B, T], positions i32[B, T], cache, at) ->
      (logits f32[B, V], cache): the logits of position at[b], or f32[B, T, V]
      with at = None; padded columns are −1e30.
    init_cache: (B, S) -> an empty cache for sequences of up to S positions.
    config: the ModelConfig.
    vocab_size: real tokens.
  """

  init: Callable
  apply: Callable
  decode: Callable
  init_cache: Callable
  config: config_lib.ModelConfig
  vocab_size: int


class _Context(NamedTuple):
  """What every layer shares."""

  layout: attention.Layout | None  # None when decoding
  positions: jax.Array
  rope: tuple[jax.Array, jax.Array] | None  # cos, sin f32[..., T, 1, rot/2]


class Linear(nn.Module):
  """x[..., inputs] @ kernel[inputs, outputs] + bias[outputs]."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  bias: bool
  std: float
  dtype: Any

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(self.std)
    kernel = self.param("kernel", init, self.inputs + self.outputs)
    x = jnp.tensordot(
      x.astype(self.dtype), kernel.astype(self.dtype), len(self.inputs)
    )
    if self.bias:
      bias = self.param("bias", nn.initializers.zeros, self.outputs)
      x += bias.astype(self.dtype)
    return x


def _norm(config, name):
  if config.norm == "rmsnorm":
    return nn.RMSNorm(config.norm_eps, dtype=config.dtype, name=name)
  return nn.LayerNorm(
    config.norm_eps, dtype=config.dtype, use_fast_variance=False, name=name
  )


def rope_tables(positions, rotary_dim, theta):
  """cos and sin f32[..., T, 1, rotary_dim / 2] of integer positions."""
  exponent = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
  angles = positions[..., None, None] * theta**-exponent
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x, rope):
  """Rotates the first dimensions of each head, halves paired (NeoX order)."""
  cos, sin = rope
  half = cos.shape[-1]
  first, second, rest = jnp.split(
    x.astype(jnp.float32), (half, 2 * half), axis=-1
  )
  return jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin, rest), axis=-1
  ).astype(x.dtype)


class Attention(nn.Module):
  """Projections, rotation and the attention of ops.attention, or of a cache."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x, context, cache):
    c = self.config

    def project(name, heads):
      logical = "heads" if name == "q" else "kv_heads"
      shape = (c.embed,), (heads, c.head_dim)
      out = Linear(*shape, c.attention_bias, 0.02, c.dtype, name=name)(x)
      return axes.constrain(out, "rows", None, logical, None)

    q = project("q", c.heads)
    k = project("k", c.kv_heads)
    v = project("v", c.kv_heads)
    if context.rope is not None:
      q, k = rotate(q, context.rope), rotate(k, context.rope)
    kwargs = {"window": c.window, "scale": c.head_dim**-0.5}
    if cache is None:
      fn = attention.ATTENTION[c.attention]
      out = fn(q, k, v, context.layout, **kwargs)
    else:
      write = jax.vmap(lambda buffer, i, new: buffer.at[:, i].set(new))
      cache = tuple(
        write(buffer, context.positions, jnp.swapaxes(new, 1, 2))
        for buffer, new in zip(cache, (k, v), strict=True)
      )
      out = attention.cached(q, *cache, context.positions, **kwargs)
    out = axes.constrain(out, "rows", None, "heads", None)
    std = 0.02 * (2 * c.layers) ** -0.5
    shape = (c.heads, c.head_dim), (c.embed,)
    out = Linear(*shape, c.attention_bias, std, c.dtype, name="out")(out)
    return out, cache


class Mlp(nn.Module):
  """Expansion to F, activation (gated or not), and back to D."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x):
    c = self.config

    def expand(name):
      shape = (c.embed,), (c.mlp,)
      out = Linear(*shape, c.mlp_bias, 0.02, c.dtype, name=name)(x)
      return axes.constrain(out, "rows", None, "mlp")

    act = _ACTIVATIONS[c.activation]
    x = act(expand("gate")) * expand("up") if c.gated else act(expand("up"))
    std = 0.02 * (2 * c.layers) ** -0.5
    shape = (c.mlp,), (c.embed,)
    return Linear(*shape, c.mlp_bias, std, c.dtype, name="down")(x)


class Block(nn.Module):
  """One layer: attention and mlp, one after the other or side by side."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x, context, cache):
    c = self.config
    attn, mlp = Attention(c, name="attn"), Mlp(c, name="mlp")
    norm_attn, norm_mlp = _norm(c, "norm_attn"), _norm(c, "norm_mlp")
    out, cache = attn(norm_attn(x), context, cache)
    if c.residual == "parallel":
      x = x + out + mlp(norm_mlp(x))
    else:
      x = x + out
      x = x + mlp(norm_mlp(x))
    return axes.constrain(x, "rows", None, None), cache


class Embed(nn.Module):
  """Token embedding, plus learned positions where the family has them."""

  config: config_lib.ModelConfig
  vocab: int

  @nn.compact
  def __call__(self, tokens, positions):
    c = self.config
    init = nn.initializers.normal(0.02)
    table = self.param("tokens", init, (self.vocab, c.embed))
    x = axes.constrain(table.astype(c.dtype), "vocab", None)[tokens]
    if c.position == "learned":
      table = self.param("positions", init, (c.max_positions, c.embed))
      x += axes.constrain(table.astype(c.dtype), None, None)[positions]
    return axes.constrain(x, "rows", None, None)


class Decoder(nn.Module):
  """tokens -> final hidden states [R, T, D], through a scanned stack."""

  config: config_lib.ModelConfig
  vocab: int

  @nn.compact
  def __call__(self, tokens, positions, layout, cache):
    c = self.config
    x = Embed(c, self.vocab, name="embed")(tokens, positions)
    rope = None
    if c.position == "rotary":
      rope = rope_tables(positions, c.rotary_dim, c.rope_theta)
    context = _Context(layout, positions, rope)
    stack = nn.scan(
      nn.remat(Block, prevent_cse=False) if c.remat else Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),
      length=c.layers,
      unroll=c.unroll,
    )
    x, cache = stack(c, name="layers")(x, context, cache)
    x = _norm(c, "final_norm")(x)
    if not c.tied:
      # `build` reads its parameters; the head itself runs in ops.logprobs.
      shape = (c.embed,), (self.vocab,)
      head = Linear(*shape, c.head_bias, 0.02, c.dtype, name="head")
      if self.is_initializing():
        head(x)
    return x, cache


def build(config, vocab_size):
  """The Model of a ModelConfig for a vocabulary of `vocab_size` tokens."""
  lookup.lookup(attention.ATTENTION, config.attention, "model.attention")
  vocab = config_lib.padded_vocab(vocab_size)
  module = Decoder(config, vocab)

  def run(params, tokens, positions, layout, cache):
    return module.apply({"params": params}, tokens, positions, layout, cache)

  def head_of(params):
    if config.tied:
      kernel = axes.constrain(params["embed"]["tokens"], "vocab", None).T
      return logprobs.Head(kernel, None, vocab_size)
    head = params["head"]
    return logprobs.Head(head["kernel"], head.get("bias"), vocab_size)

  def init(rng):
    tokens = jnp.zeros((1, 1), jnp.int32)
    layout = attention.Layout(tokens, tokens + 1, tokens, tokens[:, :, None])
    variables = module.init(rng, tokens, tokens, layout, None)
    return variables["params"]

  def apply(params, batch):
    layout = attention.Layout(
      *(batch[name] for name in attention.Layout._fields)
    )
    # What padding holds must not matter, not even an id outside the table.
    tokens = jnp.where(layout.segment_ids > 0, batch["tokens"], 0)
    hidden, _ = run(params, tokens, layout.positions, layout, None)
    return hidden, head_of(params)

  def decode(params, tokens, positions, cache, at=None):
    hidden, cache = run(params, tokens, positions, None, cache)
    if at is not None:
      hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    return logprobs.logits(hidden, head_of(params)), cache

  def init_cache(batch_size, length):
    # Heads before positions: a step's products then need no transposed copy.
    shape = (config.layers, batch_size, config.kv_heads, length)
    zeros = jnp.zeros((*shape, config.head_dim), config.dtype)
    return zeros, zeros

  return Model(init, apply, decode, init_cache, config, vocab_size)
