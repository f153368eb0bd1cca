"""Layers of their own in place of stacks: what `decode` reads fastest.

A loop over stacked layers copies a layer's weights, and its cache in and out,
in each turn: for one token that is a good part of the work.
"""

import jax
import jax.numpy as jnp

from dpo_jax.models import decoder, lora


def params_of(config, params):
  """Parameters for `decode`, a tuple of layers in place of each stack.

  They are ready for its products: kernels dequantised, and in the dtype of the
  activations; where that is f32, which rounds no more than the products do,
  adapters are merged.
  """
  c = config

  def ready(node):
    if not isinstance(node, dict):
      return node
    if "kernel" not in node:
      return {name: ready(child) for name, child in node.items()}
    kernel = lora.dequantize(node["kernel"])
    rest = {name: x for name, x in node.items() if name != "kernel"}
    if "lora_a" in node and c.dtype == "float32":
      a, b, scale = (rest.pop(f"lora_{name}") for name in ("a", "b", "scale"))
      kernel = kernel.astype(c.dtype) + scale * jnp.tensordot(a, b, 1)
    return {"kernel": kernel.astype(c.dtype), **rest}

  def layer(stack, index):
    return ready(jax.tree.map(lambda leaf: leaf[index], stack))

  out = {name: params[name] for name in params if name not in decoder.stacks(c)}
  tables = {name: x.astype(c.dtype) for name, x in params["embed"].items()}
  return {
    **{name: ready(child) for name, child in out.items()},
    "embed": tables,
    **{
      name: tuple(layer(params[name], i) for i in range(len(kinds)))
      for name, kinds in decoder.stacks(c).items()
    },
  }


def cache_of(cache):
  """A cache as `decode` takes it with the parameters of `params_of`."""
  return {
    name: tuple(zip(*stack, strict=True)) for name, stack in cache.items()
  }
