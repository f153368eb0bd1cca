"""LoRA: an adapter beside the kernels is the same as one merged into them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import tree
from dpo_jax.algos import base as base_lib
from dpo_jax.models import decoder, lora, unstacked
from tests import worlds

ALL = (r"(attn|mlp)/\w+/kernel$",)
SCALE = lora.scale_of(4, 6.0, False)


BATCH = worlds.batch(worlds.examples(4, seed=3))


NAMES = [
  # neox has what gpt2 has for an adapter to lie beside: biases, a plain MLP.
  pytest.param(name, marks=pytest.mark.slow) if name == "gpt2" else name
  for name in worlds.MODELS
]


@functools.cache
def world(name):
  """(model, base, an adapter that is not zero)."""
  model, base = worlds.model(name)
  adapter = lora.init(jax.random.key(1), base, 4, ALL)
  return model, base, worlds.noisy(adapter, 2)


@functools.cache
def logps(name):
  """f(params) -> log-probs of BATCH; a program each for plain and grafted."""
  model, _, _ = world(name)
  return jax.jit(lambda p: base_lib.token_logps(model.apply, p, BATCH))


merge = jax.jit(lora.merge)


@pytest.mark.parametrize("zero", ["b", "a"])
@pytest.mark.parametrize("name", NAMES)
def test_a_new_adapter_changes_nothing(name, zero):
  _, base, _ = world(name)
  new = lora.init(jax.random.key(1), base, 4, ALL, zero)
  # A factor is 0, so that A B adds an exact 0: no bit depends on the other.
  jax.tree.map(np.testing.assert_array_equal, merge(base, new, SCALE), base)
  got = logps(name)(lora.graft(base, new, SCALE))
  zeros = jax.tree.map(np.zeros_like, new)
  np.testing.assert_array_equal(
    got, logps(name)(lora.graft(base, zeros, SCALE))
  )
  # Without an adapter it is another program, which XLA may fuse otherwise:
  # rounding of f32 log-probs of order 5.
  np.testing.assert_allclose(got, logps(name)(base), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_grafted(name):
  _, base, adapter = world(name)
  grafted = logps(name)(lora.graft(base, adapter, SCALE))
  merged = logps(name)(merge(base, adapter, SCALE))
  # Log-probs of order 5, two ways to add products of order 1 in f32.
  np.testing.assert_allclose(grafted, merged, atol=2e-5)
  assert np.max(np.abs(grafted - logps(name)(base))) > 0.1


@pytest.mark.parametrize(
  "name",
  [
    "window",
    pytest.param("llama", marks=pytest.mark.slow),
    pytest.param("gpt2", marks=pytest.mark.slow),
  ],
)
def test_gradients_reach_the_adapter_as_through_the_merged_kernel(name):
  model, base, adapter = world(name)

  def total(params):
    values = base_lib.token_logps(model.apply, params, BATCH)
    return jnp.sum(jnp.sin(values))

  @jax.jit
  def both(adapter):
    grad = jax.grad(lambda a: total(lora.graft(base, a, SCALE)))(adapter)
    want = jax.grad(lambda a: total(lora.merge(base, a, SCALE)))(adapter)
    return grad, want

  got, want = both(adapter)
  for (path, a), (_, b) in zip(tree.named(got), tree.named(want), strict=True):
    # Relative to the leaf: f32 sums in another order.
    assert float(tree.norm([a - b]) / tree.norm([b])) < 1e-4, path


def test_a_graft_holds_what_was_grafted_and_copies_nothing():
  _, base, adapter = world("llama")
  got = dict(tree.named(lora.graft(base, adapter, SCALE)))
  for given in (base, adapter):
    for path, x in tree.named(given):
      assert got[path] is x


def test_decoding_with_a_cache_sees_the_adapter():
  model, base, adapter = world("window")
  tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, worlds.VOCAB)
  positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

  @jax.jit
  def decode(params):
    out, _ = model.decode(params, tokens, positions, model.init_cache(2, 9))
    return out

  grafted = decode(lora.graft(base, adapter, SCALE))
  merged = decode(lora.merge(base, adapter, SCALE))
  np.testing.assert_allclose(grafted, merged, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_their_own_compute_what_the_stack_does(kind, dtype):
  """With an adapter, which is merged in f32 alone, on a quantised base."""
  model, base, adapter = world("llama")
  config = dataclasses.replace(model.config, dtype=dtype)
  model = decoder.build(config, worlds.VOCAB)
  held = {path: lora.store(path, x, kind) for path, x in tree.named(base)}
  params = lora.graft(tree.nest(held), adapter, SCALE)
  tokens = jax.random.randint(jax.random.key(3), (2, 1), 0, worlds.VOCAB)
  cache = model.init_cache(2, 3)
  at = jnp.zeros((2, 1), jnp.int32)
  layers = unstacked.params_of(config, params)
  for leaf in jax.tree.leaves(layers["layers"][0]["mlp"]["up"]["kernel"]):
    assert leaf.dtype == dtype
  merged = "lora_a" not in layers["layers"][0]["mlp"]["up"]
  assert merged == (dtype == "float32")
  decode = jax.jit(model.decode)
  want, _ = decode(params, tokens, at, cache)
  got, _ = decode(layers, tokens, at, unstacked.cache_of(cache))
  # Logits of order 1, of f32 sums in another order; bf16 has 8 bits.
  tolerance = 2e-5 if dtype == "float32" else 5e-2
  want, got = (np.asarray(x)[..., : worlds.VOCAB] for x in (want, got))
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
  ("kind", "changes"),
  [
    pytest.param("float32", {}, marks=pytest.mark.slow),
    pytest.param("float32", {"remat": "full"}, marks=pytest.mark.slow),
    ("float32", {"remat": "full", "layer_pattern": ("window", "full")}),
    pytest.param("int8", {}, marks=pytest.mark.slow),
    ("nf4", {}),
    pytest.param("float32", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
  ],
)
def test_a_gradient_keeps_no_second_copy_of_the_layers(kind, changes):
  """Of 8 layers: what is made of one may be there, of all may not."""
  if "layer_pattern" in changes:
    changes = {**changes, "window": 5}
  config = dataclasses.replace(
    worlds.MODELS["llama"],
    **{"layers": 8, "embed": 256, "heads": 4, "kv_heads": 4, "mlp": 1024},
    head_dim=64,
    rotary_dim=64,
  )
  model = decoder.build(dataclasses.replace(config, **changes), worlds.VOCAB)
  batch = worlds.batch(worlds.examples(2, seed=3))
  whole = jax.eval_shape(model.init, jax.random.key(0))
  held = jax.eval_shape(
    lambda p: tree.map_named(lambda path, x: lora.store(path, x, kind), p),
    whole,
  )
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), whole, 2, ALL))

  def total(adapter, base):
    params = lora.graft(base, adapter, SCALE)
    return jnp.sum(base_lib.token_logps(model.apply, params, batch))

  program = jax.jit(jax.grad(total)).lower(adapter, held).compile()
  temporary = program.memory_analysis().temp_size_in_bytes
  assert temporary < 0.75 * tree.nbytes(whole["layers"])


def test_targets_choose_kernels_by_path():
  _, base, _ = world("window")
  adapter = lora.init(jax.random.key(0), base, 2, (r"attn/(q|v)/kernel$",))
  assert [path for path, _ in tree.named(adapter)] == [
    f"{stack}/attn/{name}/lora_{which}"
    for stack in ("layers", "rest")
    for name in ("q", "v")
    for which in "ab"
  ]
  only = lora.init(jax.random.key(0), base, 2, (r"^layers/mlp/down",))
  shapes = {path: x.shape for path, x in tree.named(only)}
  assert shapes == {
    "layers/mlp/down/lora_a": (2, 64, 2),
    "layers/mlp/down/lora_b": (2, 2, 32),
  }
  for wrong in ("attn/w/kernel", "embed/tokens", "norm"):
    with pytest.raises(ValueError, match="matches no kernel of a layer"):
      lora.init(jax.random.key(0), base, 2, (wrong,))


def test_either_factor_of_a_new_adapter_is_zero_and_the_other_is_not():
  _, base, _ = world("llama")
  for zero, other in (("b", "a"), ("a", "b")):
    new = lora.init(jax.random.key(0), base, 64, ALL, zero)
    for path, x in tree.named(new):
      assert np.any(x) == path.endswith(other), path
  b = new["layers"]["attn"]["q"]["lora_b"]
  # Normal, 1/√r: 4,096 draws, so a gradient through it keeps its size.
  assert math.isclose(float(jnp.std(b)), 64**-0.5, rel_tol=0.05)
  with pytest.raises(ValueError, match=r"lora\.zero = 'c' is not"):
    lora.init(jax.random.key(0), base, 4, ALL, "c")


def test_the_scale_is_alpha_over_rank_or_over_its_root():
  assert lora.scale_of(16, 32.0, False) == 2
  assert lora.scale_of(16, 32.0, True) == 8
  a = lora.init(jax.random.key(0), world("llama")[1], 64, ALL)
  a = a["layers"]["attn"]["q"]["lora_a"]  # of 32 inputs
  assert float(jnp.max(jnp.abs(a))) <= 32**-0.5
  # Uniform: its standard deviation is the bound over √3; 4,096 draws.
  assert math.isclose(float(jnp.std(a)), (32 * 3) ** -0.5, rel_tol=0.05)


@pytest.mark.parametrize(
  ("name", "kind", "worst"),
  [
    ("llama", "bfloat16", 1 / 256),
    ("llama", "int8", 1 / 250),
    ("window", "nf4", 0.153),
  ],
)
def test_a_base_is_within_its_rounding_and_the_model_reads_it(
  name, kind, worst
):
  """Half a step of each format: NF4's widest is 0.304 of a tile's largest."""
  _, base, adapter = world(name)
  held = tree.map_named(lambda path, x: lora.store(path, x, kind), base)
  plain, stored = lora.flat(base), lora.flat(held)
  for path, x in plain.items():
    error = jnp.abs(lora.dequantize(stored[path]).astype(jnp.float32) - x)
    assert float(jnp.max(error) / jnp.max(jnp.abs(x))) <= worst, path
  back = tree.nest({p: lora.dequantize(x) for p, x in stored.items()})
  grafted = logps(name)(lora.graft(held, adapter, SCALE))
  merged = logps(name)(merge(back, adapter, SCALE))
  np.testing.assert_allclose(grafted, merged, atol=2e-5)
