"""The decoder: invariants of its forward pass and of its cache."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import tree
from dpo_jax.algos import base
from dpo_jax.data.tokens import comparisons
from dpo_jax.models import axes, decoder, unstacked
from dpo_jax.models import config as model_config
from dpo_jax.ops import logprobs
from tests import worlds
from tests.models import parity

NAMES = list(worlds.MODELS)


ITEMS = worlds.examples(5, seed=2)
# One shape, so that a model has one program.
LAYOUT = {"extra": 4, "row_multiple": 2}


def token_logps(model, params, batch):
  return base.token_logps(model.apply, params, batch)


@functools.cache
def program(name):
  """f(batch) -> (log-probs f32[R, S], gradient of the sum of their sines)."""
  model, params = worlds.model(name)

  @jax.jit
  def both(params, batch):
    def total(params):
      logps = token_logps(model, params, batch)
      return jnp.sum(jnp.sin(logps)), logps

    (_, logps), grads = jax.value_and_grad(total, has_aux=True)(params)
    return logps, grads

  return functools.partial(both, params)


@pytest.mark.parametrize(
  "name",
  [
    *("window", "llama"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "neox")),
  ],
)
def test_decoding_with_a_cache_equals_the_full_forward_pass(name):
  model, params = worlds.model(name)
  tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, worlds.VOCAB)
  items = [
    comparisons.Example(i, 0, row[:1].tolist(), (row[1:].tolist(),), ())
    for i, row in enumerate(np.asarray(tokens))
  ]
  batch = worlds.batch(items, packed=False)
  forward = jax.jit(lambda batch: logprobs.logits(*model.apply(params, batch)))

  # As the sampler does it: a prompt, padded, then layers of their own.
  start, cache = jax.jit(model.prefill)(
    params, jnp.pad(tokens[:, :5], ((0, 0), (0, 2))), jnp.int32([5, 5])
  )
  room = (*[(0, 0)] * 3, (0, 9), (0, 0))
  cache = unstacked.cache_of(jax.tree.map(lambda x: jnp.pad(x, room), cache))
  layers = unstacked.params_of(model.config, params)
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  decode = jax.jit(model.decode)
  steps = [start[:, None]]
  for t in range(5, 12):
    at = slice(t, t + 1)
    step, cache = decode(layers, tokens[:, at], positions[:, at], cache)
    steps.append(step)
  # Logits of order 1 after two f32 layers.
  np.testing.assert_allclose(
    np.concatenate(steps, axis=1), forward(batch)[:, 4:], rtol=1e-4, atol=2e-5
  )


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_whatever_it_holds(name):
  """In value and gradient, with ids that would index out of the table."""
  batch = worlds.batch(ITEMS, **LAYOUT)
  want = program(name)(batch)
  padding = batch["segment_ids"] == 0
  assert padding.any()
  unscored = batch["target_slot"] == batch["completion_weights"][0].size
  poisoned = {
    **batch,
    "tokens": np.where(padding, 10**6, batch["tokens"]),
    "positions": np.where(padding, 10**6, batch["positions"]),
    "branch_ids": np.where(padding, 2, batch["branch_ids"]),
    "target_index": np.where(unscored, 10**6, batch["target_index"]),
    "source_index": np.where(unscored, 10**6, batch["source_index"]),
  }
  got = program(name)(poisoned)
  assert np.all(np.isfinite(want[0]))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", NAMES)
def test_packing_never_mixes_examples(name):
  """Another example's tokens in the same row move nothing of this one."""
  other = [ITEMS[0]] + [
    e._replace(prompt=[(t + 1) % worlds.VOCAB for t in e.prompt])
    for e in ITEMS[1:]
  ]
  batches = [worlds.batch(items, **LAYOUT) for items in (ITEMS, other)]
  row, _ = np.argwhere(
    (batches[0]["example_id"] == 0) & batches[0]["completion_weights"].any(-1)
  )[0]
  assert batches[0]["segment_ids"][row].max() > 1  # it is not alone
  one, two = (
    parity.by_completion(program(name)(batch)[0], batch) for batch in batches
  )
  for key, logps in one.items():
    assert np.array_equal(logps, two[key]) == (key[0] == 0), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_probabilities_of_all_sequences_sum_to_one(name):
  """All V³ sequences of an enumerable vocabulary, no EOS."""
  vocab, length = 5, 3  # its table is padded to the rows of any small one
  model = decoder.build(worlds.MODELS[name], vocab)
  _, params = worlds.model(name)
  items = [
    comparisons.Example(0, 0, [2, 4], (list(sequence),), ())
    for sequence in itertools.product(range(vocab), repeat=length)
  ]
  batch = worlds.batch(items, row_multiple=4)

  @jax.jit
  def total(params, batch):
    sums = base.completion_sums(token_logps(model, params, batch), batch)
    weights = batch["completion_weights"].reshape(sums.shape)
    return jnp.sum(jnp.where(weights > 0, jnp.exp(sums), 0.0))

  assert batch["completion_weights"].sum() == vocab**length
  assert abs(float(total(params, batch)) - 1) < 1e-5


DEEP = {"layers": 6, "head_chunk": 8}


@functools.cache
def deep(**changes):
  """(model, params, batch) of six layers, with what the head keeps in parts."""
  config = dataclasses.replace(worlds.MODELS["gpt2"], **DEEP, **changes)
  params = tree.nest(parity.random(config, worlds.VOCAB))
  batch = worlds.batch(worlds.examples(12))
  return decoder.build(config, worlds.VOCAB), params, batch


@functools.cache
def with_remat(remat):
  """(traced text, compiled program, its value and gradient)."""
  model, params, batch = deep(remat=remat)
  loss = jax.value_and_grad(lambda p: jnp.sum(token_logps(model, p, batch)))
  traced = jax.jit(loss).trace(params)
  compiled = traced.lower().compile()
  return str(traced.jaxpr), compiled, compiled(params)


@pytest.mark.parametrize("remat", ["full", "dots", "names", "offload"])
def test_what_is_computed_again_changes_no_gradient(remat):
  traced, _, got = with_remat(remat)
  assert "remat" in traced
  assert ("<host>" in traced) == (remat == "offload")
  want = with_remat("none")[2]
  whole = tree.norm(want[1])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # Of the leaf; the bias of the keys has no gradient here, but rounding.
    size = np.maximum(np.linalg.norm(b), 1e-3 * whole)
    assert np.linalg.norm(a - b) <= 1e-4 * size


def test_what_is_kept_for_the_backward_pass_shrinks_with_remat():
  """From all, over some products, to the input of each block."""
  none, dots, names, full = (
    with_remat(remat)[1].memory_analysis().temp_size_in_bytes
    for remat in ("none", "dots", "names", "full")
  )
  assert full < names < dots < none


def test_bf16_computes_the_same_function():
  model, params, batch = deep(dtype="bfloat16")

  @jax.jit
  def half(params):
    logps = token_logps(model, params, batch)
    return jnp.sum(logps), model.apply(params, batch)[0]

  loss, hidden = half(params)
  assert hidden.dtype == jnp.bfloat16
  # bf16 keeps 8 bits: 2% of a sum of some 100 log-probs.
  np.testing.assert_allclose(loss, with_remat("none")[2][0], rtol=0.02)


@pytest.mark.parametrize("preset", sorted(model_config.PRESETS))
def test_every_preset_builds_and_has_axes_for_every_parameter(preset):
  config = model_config.PRESETS[preset]
  model = decoder.build(config, 50257)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  flat = jax.tree_util.tree_leaves_with_path(shapes)
  for path, leaf in flat:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = axes.spec(name, leaf.shape, {"data": 1, "fsdp": 1, "tensor": 1})
    assert leaf.ndim < 2 or any(spec) or "norm" in name or "bias" in name, name
  sizes = {
    "gpt2": 124e6,
    "gpt2-large": 774e6,
    "pythia-70m": 70e6,
    "pythia-1.4b": 1414e6,
    "pythia-2.8b": 2775e6,
    "gpt-j-6b": 6.05e9,
    "llama-7b": 6.9e9,
    "smollm2-135m": 135e6,
  }
  if preset in sizes:
    count = sum(np.prod(leaf.shape) for _, leaf in flat)
    assert abs(count / sizes[preset] - 1) < 0.03  # vocabularies differ a little


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm": "batchnorm"}, "model.norm"),
    ({"kv_heads": 3}, "model.kv_heads"),
    ({"rotary_dim": 7}, "model.rotary_dim"),
    ({"position": "learned"}, "model.rotary_dim"),
    ({"head_bias": True}, "model.tied"),
  ],
)
def test_impossible_shapes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    worlds.model("llama", **changes)


def test_a_dimension_that_does_not_divide_names_path_dim_and_axis():
  with pytest.raises(
    ValueError, match=r"layers/attn/k/kernel: dimension 2 .*'te"
  ):
    axes.spec(
      "params/layers/attn/k/kernel", (2, 32, 3, 8), {"fsdp": 1, "tensor": 2}
    )
