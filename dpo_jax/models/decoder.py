"""One scanned decoder for every family of models/families.py, by config.

Linen stays inside this file: `build` returns pure functions of a nested dict.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo_jax import lookup
from dpo_jax.models import axes, layers, rope
from dpo_jax.models import config as config_lib
from dpo_jax.ops import attention, logprobs
from dpo_jax.ops.attention import choice, cudnn

_policies = jax.checkpoint_policies
_POLICIES = {  # of ModelConfig.remat
  "full": _policies.nothing_saveable,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "names": _policies.save_only_these_names(*layers.KEPT),
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(layers.KEPT),
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


class Model(NamedTuple):
  """Pure functions of a decoder.

  Attributes:
    init: rng -> params, a nested dict of f32 arrays.
    apply: (params, batch) -> (hidden [R, T, D], logprobs.Head); reads tokens,
      positions, segment_ids, branch_ids and example_index of the batch.
    prefill: (params, tokens i32[B, T], lengths i32[B]) -> (logits f32[B, V]
      after the last token of each, cache of T positions).
    decode: (params, tokens i32[B, T], positions i32[B, T], cache, at) ->
      (logits f32[B, V], cache): the logits of position at[b], or f32[B, T, V]
      with at = None; padded columns are −1e30. Parameters and cache are stacked
      as they are held, or both as models/unstacked.py lays them.
    init_cache: (B, S) -> an empty cache for sequences of up to S positions.
    config: the ModelConfig.
    vocab_size: real tokens.
  """

  init: Callable
  apply: Callable
  prefill: Callable
  decode: Callable
  init_cache: Callable
  config: config_lib.ModelConfig
  vocab_size: int


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
    if c.embed_scale is not None:
      x *= jnp.asarray(c.embed_scale, c.dtype)
    if c.position == "learned":
      table = self.param("positions", init, (c.max_positions, c.embed))
      x += axes.constrain(table.astype(c.dtype), None, None)[positions]
    return axes.constrain(x, "rows", None, None)


class Decoder(nn.Module):
  """tokens -> final hidden states [R, T, D], through a scanned stack.

  The parameters of all layers are stacked: "layers" those of whole periods of
  the pattern, "rest" those after them.
  """

  config: config_lib.ModelConfig
  vocab: int

  @nn.compact
  def __call__(self, tokens, positions, layout, cache):
    c = self.config
    x = Embed(c, self.vocab, name="embed")(tokens, positions)
    context = layers.Context(layout, positions, _rope(c, positions))
    cache = {} if cache is None else cache
    out = {}
    for name, kinds in stacks(c).items():
      if self.is_initializing():
        stack = nn.scan(
          layers.Block,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          in_axes=nn.broadcast,
          length=len(kinds),
        )
        x, _ = stack(c, name=name)(x, context, None)
        continue
      params = self.variables["params"][name]
      x, out[name] = _run(c, kinds, params, x, context, cache.get(name))
    x = layers.norm(c, "final_norm")(x)
    if not c.tied:
      # `build` reads its parameters; the head itself runs in ops.logprobs.
      shape = (c.embed,), (self.vocab,)
      head = layers.Linear(c, *shape, c.head_bias, name="head")
      if self.is_initializing():
        head(x)
    return x, out


def stacks(config):
  """{"layers": kinds of whole periods, "rest": kinds after them}, if any."""
  whole = config.periods * len(config.layer_pattern)
  stacks = {"layers": config.kinds[:whole], "rest": config.kinds[whole:]}
  return {name: kinds for name, kinds in stacks.items() if kinds}


def _rope(config, positions):
  """(cos, sin) for each kind of layer that rotates."""
  c = config
  if c.position != "rotary":
    return {}
  full = rope.tables(positions, c.rotary_dim, c.rope_theta, c.rope_scaling)
  if c.window_theta is None:
    return {"full": full, "window": full}
  near = rope.tables(positions, c.rotary_dim, c.window_theta)
  return {"full": full, "window": near}


def _run(config, kinds, params, x, context, cache):
  """(x, cache) behind a stack of layers: a loop over the pattern's periods.

  The cache is None, or (keys, values) [layers, B, K, S, H]; () has those of
  the layout's tokens returned. Layers of a tuple are not looped over.
  """
  c = config
  if isinstance(params, tuple):
    caches = []
    for kind, layer, kept in zip(kinds, params, cache, strict=True):
      module = layers.Block(c, kind)
      x, kept = module.apply({"params": layer}, x, context, kept)
      caches.append(kept)
    return x, tuple(caches)
  period = kinds[: len(c.layer_pattern)]
  turns = len(kinds) // len(period)
  unroll = min(c.unroll, turns)

  def block(kind, index, inputs, x, context):
    # The slice is inside what is recomputed, so that it is not stored.
    params, cache = jax.tree.map(lambda leaf: leaf[index], inputs)
    module = layers.Block(c, kind)
    return module.apply({"params": params}, x, context, cache)

  if c.remat not in ("auto", "none"):
    # A loop of one turn is no loop: there the compiler would merge the two.
    block = jax.checkpoint(
      block,
      prevent_cse=unroll == turns,
      static_argnums=(0, 1),
      policy=_POLICIES[c.remat],
    )

  def body(x, inputs):
    if len(period) == 1:  # the parameters as they are: no copy, nothing stored
      return block(period[0], ..., inputs, x, context)
    out = []
    for index, kind in enumerate(period):
      x, cache = block(kind, index, inputs, x, context)
      out.append(cache)
    return x, jax.tree.map(lambda *caches: jnp.stack(caches), *out)

  inputs = params, cache
  if len(period) == 1:
    return jax.lax.scan(body, x, inputs, unroll=unroll)
  inputs = jax.tree.map(
    lambda leaf: leaf.reshape(turns, len(period), *leaf.shape[1:]), inputs
  )
  x, cache = jax.lax.scan(body, x, inputs, unroll=unroll)
  return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cache)


def with_kernel(model, device, shared, points):
  """The Model with the attention kernel of a device, where it has one.

  Args:
    model: Model.
    device: one of those that it runs on.
    shared: whether completions share one copy of the prompt.
    points: of a sweep that train in one program.
  Raises: ValueError if model.config.attention does not fit.
  """
  asked = model.config.attention
  name, _ = choice.resolve(
    asked, choice.platform(device), **_attention_facts(model.config, shared)
  )
  if name == "cudnn":
    problem = cudnn.broken(model.config.head_dim)
    if points > 1:
      problem = "it takes no points of a sweep together"
    if problem is not None and asked != "auto":
      raise ValueError(f"model.attention = 'cudnn': {problem}; set 'auto'")
    if problem is not None:
      warnings.warn(f"attention tiled, not cudnn: {problem}", stacklevel=2)
      name = "tiled"
  config = dataclasses.replace(model.config, attention=name)
  return build(config, model.vocab_size)


def attention_line(asked, model, device, shared, shapes, splits):
  """What a run attends with and why, in a line for its log.

  Args:
    asked: config.model.attention.
    model, device, shared: of `with_kernel`, before or after it.
    shapes: the data.batch.rows.Shape of the batches.
    splits: how many ways devices and microbatches split rows, and heads.
  """
  if asked == "auto" and model.config.attention == "tiled":
    asked = "tiled"  # a kernel that did not work here, see `with_kernel`
  return choice.describe(
    asked,
    choice.platform(device),
    shapes,
    model.config.heads,
    splits,
    **_attention_facts(model.config, shared),
  )


def _attention_facts(config, shared):
  """What ops.attention.choice depends on, but for the platform."""
  return {
    "shared": shared,
    "dtype": config.dtype,
    "head_dim": config.head_dim,
    "softcap": config.attention_softcap,
  }


def _prompts(tokens, lengths):
  """The Layout of prompts, one a row and padded on the right."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  inside = (positions < lengths[:, None]).astype(jnp.int32)
  branches = jnp.zeros_like(inside)
  return attention.Layout(positions, inside, branches, positions[:, None])


def _empty_cache(config, batch_size, length):
  """Keys and values of each stack, [layers, B, K, S, H] of zeros."""
  # Heads before positions: a step's products then need no transposed copy.
  shape = (batch_size, config.kv_heads, length, config.head_dim)
  return {
    name: tuple(jnp.zeros((len(kinds), *shape), config.dtype) for _ in "kv")
    for name, kinds in stacks(config).items()
  }


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
      bias = None
    else:
      kernel, bias = params["head"]["kernel"], params["head"].get("bias")
    return logprobs.Head(
      kernel,
      bias,
      vocab_size,
      softcap=config.logit_softcap,
      chunk=config.head_chunk,
    )

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

  def logits(params, hidden, at):
    if at is not None:
      hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    return logprobs.logits(hidden, head_of(params))

  def prefill(params, tokens, lengths):
    layout = _prompts(tokens, lengths)
    tokens = jnp.where(layout.segment_ids, tokens, 0)
    fill = dict.fromkeys(stacks(config), ())
    hidden, cache = run(params, tokens, layout.positions, layout, fill)
    return logits(params, hidden, lengths - 1), cache

  def decode(params, tokens, positions, cache, at=None):
    hidden, cache = run(params, tokens, positions, None, cache)
    return logits(params, hidden, at), cache

  init_cache = functools.partial(_empty_cache, config)
  return Model(init, apply, prefill, decode, init_cache, config, vocab_size)
