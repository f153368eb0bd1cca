"""The parts of a decoder: linear layers, norms, attention, mlp and the block.

Linen modules, used by models/decoder.py alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ad_checkpoint

from dpo_jax.models import axes, lora, rope
from dpo_jax.models import config as config_lib
from dpo_jax.ops import attention, linear

_ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "silu": nn.silu,
}


# What remat = "names" keeps of a block, and "offload" moves to the host.
KEPT = ("q", "k", "v", attention.KEPT)


class Context(NamedTuple):
  """What every layer shares.

  Attributes:
    layout: attention.Layout, or None when decoding.
    positions: i32[R, T].
    rope: {kind of layer: (cos, sin)}, empty without rotation.
  """

  layout: attention.Layout | None
  positions: jax.Array
  rope: dict


class Linear(nn.Module):
  """x[..., inputs] @ kernel[inputs, outputs] + bias[outputs], and an adapter.

  Where lora.graft put an adapter beside the kernel, its product is added.
  """

  config: config_lib.ModelConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  bias: bool
  last: bool = False  # of attention or mlp: starts smaller, as there are 2 L

  @nn.compact
  def __call__(self, x):
    c = self.config
    std = 0.02 * (2 * c.layers) ** -0.5 if self.last else 0.02
    init = nn.initializers.normal(std)
    kernel = self.param("kernel", init, self.inputs + self.outputs)
    x = x.astype(c.dtype)

    def product(x, kernel):
      kernel = lora.dequantize(kernel).astype(c.dtype)
      return linear.product(x, kernel, len(self.inputs))

    if not isinstance(kernel, jax.Array) or kernel.dtype != c.dtype:
      # Made anew in the backward pass, or all layers' would be kept for it.
      product = jax.checkpoint(product, prevent_cse=False)
    out = product(x, kernel)
    if self.bias:
      bias = self.param("bias", nn.initializers.zeros, self.outputs)
      out += bias.astype(c.dtype)
    if self.has_variable("params", "lora_a"):
      adapter = self.variables["params"]
      out += lora.product(x, adapter, len(self.inputs))
    return out


class RMSNorm(nn.Module):
  """x / √(mean x² + eps) · (scale + offset) over the last axes, in f32."""

  config: config_lib.ModelConfig
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    c = self.config
    init = nn.initializers.constant(1 - c.norm_offset)
    scale = self.param("scale", init, self.shape).astype(jnp.float32)
    x = x.astype(jnp.float32)
    over = tuple(range(-len(self.shape), 0))
    square = jnp.mean(jnp.square(x), axis=over, keepdims=True)
    x *= jax.lax.rsqrt(square + c.norm_eps) * (scale + c.norm_offset)
    return x.astype(c.dtype)


def norm(config, name):
  """The config's norm over D."""
  if config.norm == "rmsnorm":
    return RMSNorm(config, (config.embed,), name=name)
  return nn.LayerNorm(
    config.norm_eps, dtype=config.dtype, use_fast_variance=False, name=name
  )


class Attention(nn.Module):
  """Projections, rotation and the attention of ops.attention, or of a cache."""

  config: config_lib.ModelConfig
  kind: str

  @nn.compact
  def __call__(self, x, context, cache):
    c = self.config

    def project(name, heads):
      logical = "heads" if name == "q" else "kv_heads"
      shape = (heads, c.head_dim)
      out = Linear(c, (c.embed,), shape, c.qkv_bias, name=name)(x)
      out = axes.constrain(out, "rows", None, logical, None)
      if c.qk_norm == "none" or name == "v":
        return out
      over = (c.head_dim,) if c.qk_norm == "head" else shape
      return RMSNorm(c, over, name=f"norm_{name}")(out)

    q = project("q", c.heads)
    k = project("k", c.kv_heads)
    v = project("v", c.kv_heads)
    if self.kind in context.rope:
      tables = context.rope[self.kind]
      q, k = rope.rotate(q, tables), rope.rotate(k, tables)
    q, k, v = map(ad_checkpoint.checkpoint_name, (q, k, v), KEPT[:3])
    scale = c.attention_scale
    kwargs = {
      "window": c.window if self.kind == "window" else None,
      "scale": c.head_dim**-0.5 if scale is None else scale,
      "softcap": c.attention_softcap,
    }
    if cache == ():
      # Prompts: few beside what is made of them, and of no size that a kernel
      # was chosen for.
      out = attention.ATTENTION["tiled"](q, k, v, context.layout, **kwargs)
      cache = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    elif cache is None:
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
    shape = (c.heads, c.head_dim), (c.embed,)
    return Linear(c, *shape, c.out_bias, last=True, name="out")(out), cache


class Mlp(nn.Module):
  """Expansion to F, activation (gated or not), and back to D."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x):
    c = self.config

    def expand(name):
      out = Linear(c, (c.embed,), (c.mlp,), c.mlp_bias, name=name)(x)
      return axes.constrain(out, "rows", None, "mlp")

    act = _ACTIVATIONS[c.activation]
    x = act(expand("gate")) * expand("up") if c.gated else act(expand("up"))
    shape = (c.mlp,), (c.embed,)
    return Linear(c, *shape, c.mlp_bias, last=True, name="down")(x)


class Block(nn.Module):
  """One layer: attention and mlp, one after the other or side by side."""

  config: config_lib.ModelConfig
  kind: str = "full"

  @nn.compact
  def __call__(self, x, context, cache):
    c = self.config
    attn, mlp = Attention(c, self.kind, name="attn"), Mlp(c, name="mlp")

    def before(name, x):
      return x if c.norm_place == "post" else norm(c, name)(x)

    def after(name, x):
      return x if c.norm_place == "pre" else norm(c, name)(x)

    read = before("norm_attn", x)
    out, cache = attn(read, context, cache)
    if c.residual == "sequential":
      x = x + after("norm_attn_out", out)
      x = x + after("norm_mlp_out", mlp(before("norm_mlp", x)))
    else:
      shared = c.residual == "parallel_shared"
      x = x + out + mlp(read if shared else norm(c, "norm_mlp")(x))
    return axes.constrain(x, "rows", None, None), cache
