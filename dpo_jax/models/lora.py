"""LoRA as pure functions on parameter trees, and quantised bases for it.

An adapter is a tree with `lora_a` [L, inputs, r] and `lora_b` [L, r, outputs]
in the place of some kernels [L, inputs, outputs]. Policy and reference share
the base:

    policy     graft(base, adapter, scale): x·W + scale · (x·A)·B
    reference  base

Source: arXiv:2106.09685; rank-stabilised scale: arXiv:2312.03732; 4-bit
NormalFloat base: arXiv:2305.14314 (of qwix, as int8).
"""

import math
import re

import jax
import jax.numpy as jnp

from dpo_jax import lookup, tree
from dpo_jax.models import axes
from dpo_jax.ops import linear

_KERNELS = r"^(layers|rest)/.*/kernel$"
# How the frozen base may be held.
BASES = ("float32", "bfloat16", "int8", "nf4")
# Which factor of a new adapter is 0: b, as in the paper, or a.
ZERO = ("b", "a")
_TILE = 64  # weights that share a scale in nf4, along the inputs


def scale_of(rank, alpha, rank_stabilised):
  """alpha / r, or alpha / √r."""
  return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def paths(base, targets):
  """The kernels that `targets` select, in tree order.

  Args:
    base: parameter tree, or its shapes.
    targets: regexes, searched for in paths as "layers/attn/q/kernel".
  Raises: ValueError for one that finds no kernel of a layer.
  """
  kernels = [p for p in flat(base) if re.search(_KERNELS, p)]
  for pattern in targets:
    if not any(tree.matches([pattern], path) for path in kernels):
      raise ValueError(
        f"lora.targets: {pattern!r} matches no kernel of a layer"
        f"{lookup.nearest(pattern, kernels)}"
      )
  return [path for path in kernels if tree.matches(targets, path)]


def init(rng, base, rank, targets, zero="b"):
  """A new adapter, which adds 0 as one factor is.

      zero = b   A uniform within ± 1/√inputs
      zero = a   B normal, with standard deviation 1/√r

  The factor that is 0 alone has a gradient at first. B's is that of the kernel
  through a random projection to r numbers, in which examples may nearly cancel;
  an optimiser that divides by its size then steps in the direction of rounding.
  A's is that of the kernel through B.

  Args:
    rng: PRNG key.
    base: parameter tree, or its shapes.
    rank: r.
    targets: see `paths`.
    zero: of ZERO.
  Returns: nested dict of f32 arrays.
  """
  lookup.lookup(ZERO, zero, "lora.zero")
  by_path, adapter = flat(base), {}
  chosen = paths(base, targets)
  for path, key in zip(chosen, jax.random.split(rng, len(chosen)), strict=True):
    shape = by_path[path].shape
    cut = 1 + axes.inputs(path)
    of_a, of_b = (*shape[:cut], rank), (shape[0], rank, *shape[cut:])
    if zero == "b":
      bound = math.prod(shape[1:cut]) ** -0.5
      a = bound * jax.random.uniform(key, of_a, jnp.float32, -1, 1)
      b = jnp.zeros(of_b)
    else:
      a = jnp.zeros(of_a)
      b = rank**-0.5 * jax.random.normal(key, of_b)
    where = path.removesuffix("kernel")
    adapter |= {f"{where}lora_a": a, f"{where}lora_b": b}
  return tree.nest(adapter)


def graft(base, adapter, scale):
  """The policy: `base`, uncopied, with the adapter beside its kernels."""

  def scaled(node):
    if "lora_a" in node:
      layers = node["lora_a"].shape[0]
      return {**node, "lora_scale": jnp.full(layers, scale, jnp.float32)}
    return {key: scaled(value) for key, value in node.items()}

  return tree.graft(base, scaled(adapter))


def merge(base, adapter, scale):
  """`base` with W + scale · A·B, in f32, for each W with an adapter."""
  products = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))

  def merged(node, added):
    if "lora_a" not in added:
      return {key: merged(node[key], x) for key, x in added.items()}
    whole = dequantize(node["kernel"]).astype(jnp.float32)
    return {
      "kernel": whole + scale * products(added["lora_a"], added["lora_b"])
    }

  return tree.graft(base, merged(base, adapter))


def product(x, adapter, inputs):
  """scale · (x·A)·B of one layer; x [..., inputs] with `inputs` axes."""
  low = linear.product(x, adapter["lora_a"].astype(x.dtype), inputs)
  low *= adapter["lora_scale"].astype(x.dtype)
  return linear.product(low, adapter["lora_b"].astype(x.dtype))


def store(path, x, kind, *, stacked=True):
  """A parameter as the base holds it.

  Args:
    path: "layers/attn/q/kernel".
    x: f32 or bf16, with the axis of layers unless not `stacked`.
    kind: of BASES. int8 has a scale an output, nf4 one for each 64 inputs; both
      are for kernels of layers, and hold what else there is in bfloat16.
  Returns: array, or qwix.QArray.
  """
  if kind in ("float32", "bfloat16"):
    return x.astype(kind)
  if not re.search(_KERNELS, path):
    return x.astype(jnp.bfloat16)
  import qwix  # slow to import, and seldom needed

  first = 1 if stacked else 0
  inputs = range(first, first + axes.inputs(path))
  if kind == "int8":
    outside = tuple(axis for axis in range(x.ndim) if axis not in inputs)
    return qwix.quantize(x, qtype=jnp.int8, channelwise_axes=outside)
  tiled = inputs[-1]
  return qwix.quantize(
    x,
    qtype="nf4",
    channelwise_axes=tuple(axis for axis in range(x.ndim) if axis != tiled),
    tiled_axes={tiled: math.gcd(_TILE, x.shape[tiled])},
  )


def dequantize(kernel):
  """An array, from one or from a qwix.QArray."""
  if isinstance(kernel, jax.Array):
    return kernel
  import qwix

  return qwix.dequantize(kernel)


def flat(params):
  """{path: leaf}, quantised kernels being one leaf."""
  leaves = jax.tree_util.tree_flatten_with_path(
    params, lambda x: not isinstance(x, dict)
  )[0]
  return {tree.path_str(path): leaf for path, leaf in leaves}
