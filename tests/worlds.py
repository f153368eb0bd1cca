"""Small models, random examples and batches that many tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.batch import rows
from dpo_jax.data.tokens import comparisons
from dpo_jax.data.tokens import examples as examples_lib
from dpo_jax.models import axes, decoder
from dpo_jax.models import config as model_config
from dpo_jax.ops import logprobs

VOCAB = 61  # not a multiple of 128: the padded columns are always in play

_MICRO = model_config.PRESETS["micro"]

# One of each: RoPE with GQA; learned positions; parallel residual with partial
# rotary, biases and an untied head; and Gemma's: layers with a window shorter
# than the examples and a rotation of its own, and layers without; one layer
# after whole periods; norms on both sides, of queries and of keys; softcaps.
MODELS = {
  "llama": _MICRO,
  "gpt2": dataclasses.replace(
    model_config.PRESETS["gpt2"],
    **{k: getattr(_MICRO, k) for k in ("layers", "embed", "heads", "head_dim")},
    kv_heads=4,
    mlp=64,
    max_positions=64,
  ),
  "neox": dataclasses.replace(
    model_config.PRESETS["pythia-70m"],
    **{k: getattr(_MICRO, k) for k in ("layers", "embed", "heads", "head_dim")},
    kv_heads=4,
    mlp=64,
    rotary_dim=4,
    head_bias=True,
  ),
  "window": dataclasses.replace(
    _MICRO,
    layers=3,
    window=5,
    layer_pattern=("window", "full"),
    window_theta=100.0,
    norm_place="both",
    norm_offset=1.0,
    qk_norm="head",
    embed_scale=32**0.5,
    attention_softcap=4.0,
    logit_softcap=8.0,
  ),
}


def model(name, **changes):
  """(decoder.Model, params with no zero leaf)."""
  config = dataclasses.replace(MODELS[name], **changes)
  return decoder.build(config, VOCAB), _params(name)


@functools.cache
def _params(name):
  init = jax.jit(decoder.build(MODELS[name], VOCAB).init)
  return noisy(init(jax.random.key(0)), 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def noisy(params, seed, scale=0.1):
  """Params plus noise, so that biases and norms matter too."""
  leaves, treedef = jax.tree.flatten(params)
  rngs = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [
    x + scale * jax.random.normal(r, x.shape)
    for x, r in zip(leaves, rngs, strict=True)
  ]
  return jax.tree.unflatten(treedef, noise)


def examples(count, seed=0, completions=2, longest=9):
  """Random examples; every third has four completions and six pairs."""
  rng = np.random.default_rng(seed)

  def ids(low=1):
    return rng.integers(0, VOCAB, rng.integers(low, longest)).tolist()

  out = []
  for number in range(count):
    many = 4 if completions == 4 and number % 3 == 0 else 2
    pairs = [(w, l, 1.0) for w in range(many) for l in range(w + 1, many)]
    texts = tuple(ids() for _ in range(many))
    out.append(comparisons.Example(number, 0, ids(), texts, tuple(pairs)))
  return out


def plain(examples):
  """A list of examples whose ids are lists: those can be compared."""
  return [
    e._replace(
      prompt=list(e.prompt), completions=tuple(map(list, e.completions))
    )
    for e in examples
  ]


def batch(
  items, *, packed=True, shared=True, row_multiple=1, extra=0, max_row=None
):
  """The batch of some examples; `extra` adds padding to T, S, E and P."""
  layout = rows.Layout(packed, shared, row_multiple, max_row)
  need = rows.needs(items, layout)
  assigned = rows.assign(need.length, layout)
  shape = rows.needed_shape(need, assigned)
  parts = 1 if packed or shared else shape.completions
  shape = shape._replace(
    length=shape.length + extra * parts,
    scored=shape.scored + extra,
    tile=shape.tile + extra,
    per_row=shape.per_row + (1 if extra and packed else 0),
  )
  shape = shape._replace(tile=min(shape.tile, shape.length))
  extras = examples_lib.of(items).extras
  return rows.build(items, assigned, shape, layout, extras)


def arranged(items, kind, with_scores=False):
  """Examples as a loss compares them, see comparisons.arrange."""
  items = [comparisons.arrange(item, kind, with_scores) for item in items]
  if kind == "mismatched":
    return list(comparisons.mismatched(items, "these"))
  return items


@functools.cache
def tables():
  """Parameters of `tables_apply`: an embedding, positions and a head."""
  rng, vocab, embed = np.random.default_rng(0), 128, 16
  shapes = {
    "embed": {"tokens": (vocab, embed), "positions": (64, embed)},
    "head": {"kernel": (embed, vocab)},
  }
  return jax.tree.map(
    lambda shape: jnp.float32(rng.normal(scale=0.5, size=shape)),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def tables_apply(params, batch, chunk=None):
  """A decoder.Model.apply that sees one token and its position alone."""
  table = params["embed"]
  tokens = axes.constrain(table["tokens"], "vocab", None)[batch["tokens"]]
  hidden = jnp.tanh(tokens + table["positions"][batch["positions"]])
  hidden = axes.constrain(hidden, "rows", None, None)
  head = logprobs.Head(params["head"]["kernel"], None, VOCAB, chunk=chunk)
  return hidden, head
