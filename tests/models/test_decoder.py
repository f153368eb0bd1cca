"""The decoder: invariants of its forward pass and of its cache."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.algos import base
from dpo_jax.data.tokens import comparisons
from dpo_jax.models import axes, decoder
from dpo_jax.models import config as model_config
from dpo_jax.ops import logprobs
from tests import worlds

NAMES = list(worlds.MODELS)


def token_logps(model, params, batch):
  return base.token_logps(model.apply, params, batch)


def by_example(logps, batch):
  """{(example, completion): [log-probs of its tokens]}."""
  completions = batch["completion_weights"].shape[2]
  out = {}
  for row, position in np.ndindex(logps.shape):
    slot = int(batch["target_slot"][row, position])
    p, c = divmod(slot, completions)
    if p < batch["example_id"].shape[1]:
      key = int(batch["example_id"][row, p]), c
      out.setdefault(key, []).append(float(logps[row, position]))
  return out


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_a_cache_equals_the_full_forward_pass(name):
  model, params = worlds.model(name)
  tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, worlds.VOCAB)
  items = [
    comparisons.Example(i, 0, row[:1].tolist(), (row[1:].tolist(),), ())
    for i, row in enumerate(np.asarray(tokens))
  ]
  batch = worlds.batch(items, packed=False)
  hidden, head = model.apply(params, batch)
  full = logprobs.logits(hidden, head)

  cache = model.init_cache(2, 16)
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  decode = jax.jit(model.decode)
  start, cache = decode(params, tokens[:, :5], positions[:, :5], cache)
  steps = [start]
  for t in range(5, 12):
    at = slice(t, t + 1)
    step, cache = decode(params, tokens[:, at], positions[:, at], cache)
    steps.append(step)
  # Logits of order 1 after two f32 layers.
  np.testing.assert_allclose(
    jnp.concatenate(steps, axis=1), full, rtol=1e-4, atol=2e-5
  )


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_whatever_it_holds(name):
  """In value and gradient, with ids that would index out of the table."""
  model, params = worlds.model(name)
  items = worlds.examples(5, seed=2)
  batch = worlds.batch(items, extra=4, row_multiple=2)

  @jax.jit
  def value_and_grad(params, batch):
    def total(params):
      logps = token_logps(model, params, batch)
      return jnp.sum(jnp.sin(logps)), logps

    (_, logps), grads = jax.value_and_grad(total, has_aux=True)(params)
    return logps, grads

  want = value_and_grad(params, batch)
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
  got = value_and_grad(params, poisoned)
  assert bool(jnp.all(jnp.isfinite(want[0])))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", NAMES)
def test_packing_never_mixes_examples(name):
  """Another example's tokens in the same row move nothing of this one."""
  model, params = worlds.model(name)
  items = worlds.examples(4, seed=4)
  other = [items[0]] + [
    e._replace(prompt=[(t + 1) % worlds.VOCAB for t in e.prompt])
    for e in items[1:]
  ]
  run = jax.jit(lambda batch: token_logps(model, params, batch))
  batches = worlds.batch(items), worlds.batch(other)
  one, two = (by_example(run(b), b) for b in batches)
  for key in one:
    if key[0] == 0:
      assert one[key] == two[key]
    else:
      assert one[key] != two[key]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_probabilities_of_all_sequences_sum_to_one(name):
  """All V³ sequences of an enumerable vocabulary, no EOS."""
  vocab, length = 5, 3
  config = worlds.MODELS[name]
  model = decoder.build(config, vocab)
  params = worlds.noisy(jax.jit(model.init)(jax.random.key(0)), 1, 0.3)
  items = [
    comparisons.Example(0, 0, [2, 4], (list(sequence),), ())
    for sequence in itertools.product(range(vocab), repeat=length)
  ]
  batch = worlds.batch(items, row_multiple=4)
  logps = token_logps(model, params, batch)
  sums = base.completion_sums(logps, batch)
  weights = batch["completion_weights"].reshape(sums.shape)
  total = jnp.sum(jnp.where(weights > 0, jnp.exp(sums), 0.0))
  assert weights.sum() == vocab**length
  assert abs(float(total) - 1) < 1e-5


@pytest.mark.parametrize("remat", ["full", "dots", "names", "offload"])
def test_what_is_computed_again_changes_no_gradient(remat):
  model, params = worlds.model("llama")
  batch = worlds.batch(worlds.examples(4))

  def loss(model):
    return lambda params: jnp.sum(token_logps(model, params, batch))

  again, _ = worlds.model("llama", remat=remat)
  traced = str(jax.make_jaxpr(jax.grad(loss(again)))(params))
  assert "remat" in traced
  assert ("<host>" in traced) == (remat == "offload")
  got, want = (
    jax.jit(jax.value_and_grad(loss(m)))(params) for m in (again, model)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_kept_for_the_backward_pass_shrinks_with_remat():
  """From all, over some products, to the input of each block."""
  batch = worlds.batch(worlds.examples(12))
  config = {"layers": 6, "head_chunk": 8}

  def temporary(remat):
    model, _ = worlds.model("gpt2", remat=remat, **config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    loss = jax.grad(lambda p: jnp.sum(token_logps(model, p, batch)))
    compiled = jax.jit(loss).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  none, dots, names, full = map(temporary, ("none", "dots", "names", "full"))
  assert full < names < dots < none


def test_bf16_computes_the_same_function():
  model, params = worlds.model("llama")
  batch = worlds.batch(worlds.examples(4))

  def loss(model, params):
    return jnp.sum(token_logps(model, params, batch))

  want = loss(model, params)
  half, _ = worlds.model("llama", dtype="bfloat16")
  hidden, _ = half.apply(params, batch)
  assert hidden.dtype == jnp.bfloat16
  # bf16 keeps 8 bits: 2% of a sum of some 40 log-probs.
  np.testing.assert_allclose(loss(half, params), want, rtol=0.02)


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
