"""The attention rule against a loop, and every implementation against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import attention
from dpo_jax.ops.attention import blockwise, cudnn, rule, splash, tiled
from tests import worlds

ITEMS = worlds.examples(6, seed=3, completions=4)
LAYOUTS = [(p, s) for p in (True, False) for s in (True, False)]


def layout_of(batch):
  fields = attention.Layout._fields
  return attention.Layout(*(jnp.asarray(batch[name]) for name in fields))


def rule_by_loop(batch, row, window):
  segment, branch = batch["segment_ids"][row], batch["branch_ids"][row]
  position = batch["positions"][row]
  length = len(segment)
  seen = np.zeros((length, length), bool)
  for i in range(length):
    for j in range(i + 1):
      same = segment[i] == segment[j] != 0
      branch_ok = branch[j] in (0, branch[i])
      near = window is None or position[i] - position[j] < window
      seen[i, j] = same and branch_ok and near
  return seen


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("packed", "shared"), LAYOUTS)
def test_the_mask_is_the_rule_of_the_design(packed, shared, window):
  batch = worlds.batch(ITEMS, packed=packed, shared=shared, extra=3)
  layout = layout_of(batch)
  mask = attention.visible(*layout[:3], window)
  for row in range(mask.shape[0]):
    np.testing.assert_array_equal(mask[row], rule_by_loop(batch, row, window))


def random_qkv(batch, seed=0):
  shape = (*batch["tokens"].shape, 4, 8)
  keys = jax.random.split(jax.random.key(seed), 4)
  q = jax.random.normal(keys[0], shape)
  k = jax.random.normal(keys[1], (*shape[:2], 2, 8))
  v = jax.random.normal(keys[2], (*shape[:2], 2, 8))
  real = jnp.asarray(batch["segment_ids"] > 0)[..., None, None]
  weight = jnp.where(real, jax.random.normal(keys[3], shape), 0.0)
  return (q, k, v), weight


# On a CPU: kernels by their interpreter, cuDNN by what computes the same.
IMPLEMENTATIONS = {
  "tiled": tiled.tiled,
  "blockwise": functools.partial(blockwise.blockwise, block=32),
  "cudnn": functools.partial(cudnn.cudnn, implementation="xla"),
  "splash": functools.partial(splash.splash, interpret=True),
}
# Long enough for several chunks and blocks, and for padding inside them.
LONG = worlds.examples(2, seed=3, completions=4, longest=50)


@functools.cache
def long_batch(packed, shared):
  return worlds.batch(LONG, packed=packed, shared=shared, extra=3)


def value_and_grad(fn, batch, dtype=jnp.float32, **kwargs):
  """(Σ weight · attention of the real tokens, its gradients)."""
  qkv, weight = random_qkv(batch)
  layout = layout_of(batch)

  def total(qkv):
    out = fn(*qkv, layout, scale=0.3, **kwargs).astype(jnp.float32)
    return jnp.sum(jnp.where(weight != 0, out * weight, 0.0))

  qkv = tuple(x.astype(dtype) for x in qkv)
  return jax.jit(jax.value_and_grad(total))(qkv)


@functools.cache
def oracle(packed, shared, window, softcap):
  batch = long_batch(packed, shared)
  return value_and_grad(rule.xla, batch, window=window, softcap=softcap)


def supported(name, shared, softcap):
  if name == "splash":
    return not shared
  return name != "cudnn" or softcap is None


ALL_CASES = [
  (name, packed, shared, window, softcap)
  for name in IMPLEMENTATIONS
  for packed, shared in LAYOUTS
  for window, softcap in ((None, None), (9, None), (None, 2.0), (9, 2.0))
  if supported(name, shared, softcap) and (packed or softcap is None)
]
# All that an implementation has at once; nothing of it; and a layout of each.
FAST_CASES = [
  ("tiled", True, True, 9, 2.0),
  ("tiled", True, False, None, None),
  ("tiled", False, True, 9, None),
  ("blockwise", True, True, 9, 2.0),
  ("blockwise", True, False, None, None),
  ("blockwise", False, True, 9, None),
  ("cudnn", True, True, 9, None),
  ("cudnn", True, False, None, None),
  ("cudnn", False, True, 9, None),
  ("splash", True, False, 9, 2.0),
  ("splash", False, False, None, None),
]


@pytest.mark.parametrize(
  ("name", "packed", "shared", "window", "softcap"),
  [
    pytest.param(*case, marks=[] if case in FAST_CASES else pytest.mark.slow)
    for case in ALL_CASES
  ],
)
def test_implementation_equals_the_dense_oracle(
  name, packed, shared, window, softcap
):
  """In value and gradient, with two query heads for each of keys."""
  fn = IMPLEMENTATIONS[name]
  batch = long_batch(packed, shared)
  got = value_and_grad(fn, batch, window=window, softcap=softcap)
  want = oracle(packed, shared, window, softcap)
  # f32 sums of up to 200 terms of order 1, in another order; the value sums
  # 10,000 of them.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=2e-4)
  for a, b in zip(got[1], want[1], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bf16_costs_the_rounding_of_its_inputs_and_no_more(name):
  fn = IMPLEMENTATIONS[name]
  batch = long_batch(True, False)
  got = value_and_grad(fn, batch, jnp.bfloat16, window=None)
  want = oracle(True, False, None, None)
  for a, b in zip(got[1], want[1], strict=True):
    assert a.dtype == jnp.bfloat16
    difference = jnp.linalg.norm(a.astype(jnp.float32) - b)
    # 8 bits: 2⁻⁹ each of q, k, v, probabilities and result.
    assert difference < 0.01 * jnp.linalg.norm(b)


def test_every_registered_name_is_tested():
  named = set(attention.ATTENTION) - {"xla", "auto"}
  assert named == set(IMPLEMENTATIONS)
  assert set(FAST_CASES) <= set(ALL_CASES)


def test_splash_of_a_prompt_with_several_completions_is_nan_not_wrong():
  batch = worlds.batch(ITEMS[1:2])
  (q, k, v), _ = random_qkv(batch)
  fn = functools.partial(IMPLEMENTATIONS["splash"], window=None, scale=0.3)
  out = jax.jit(fn)(q, k, v, layout_of(batch))
  assert bool(jnp.all(jnp.isnan(out)))


def test_splash_takes_a_prompt_with_one_completion_as_it_is():
  items = [e._replace(completions=e.completions[:1], pairs=()) for e in ITEMS]
  batch = worlds.batch(items)
  got = value_and_grad(IMPLEMENTATIONS["splash"], batch, window=None)
  want = value_and_grad(rule.xla, batch, window=None)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_window_by_row_index_would_be_seen():
  """Planted bug: in a shared row the second completion's row indices run on
  past the first, so a window over them hides what the rule shows."""
  batch = worlds.batch(ITEMS, packed=True, shared=True)
  layout = layout_of(batch)
  rows = jnp.broadcast_to(
    jnp.arange(layout.positions.shape[1]), layout.positions.shape
  )
  right = attention.visible(*layout[:3], 4)
  planted = attention.visible(rows, layout.segment_ids, layout.branch_ids, 4)
  assert bool(jnp.any(right & ~planted))


def test_attention_is_causal_inside_a_branch_and_blind_across_branches():
  """Changing the values of completion 2 leaves completion 1 as it was."""
  batch = worlds.batch(ITEMS[1:2])
  layout = layout_of(batch)
  (q, k, v), _ = random_qkv(batch)
  second = (layout.branch_ids == 2)[..., None, None]
  changed = jnp.where(second, v + 1.0, v)
  fn = jax.jit(functools.partial(tiled.tiled, window=None, scale=0.3))
  before, after = fn(q, k, v, layout), fn(q, k, changed, layout)
  moved = jnp.any(before != after, axis=(-1, -2))
  np.testing.assert_array_equal(moved, layout.branch_ids == 2)


def test_the_gradient_of_tiling_is_a_gather():
  batch = worlds.batch(ITEMS)
  layout = layout_of(batch)
  qkv, weight = random_qkv(batch)

  def total(qkv):
    out = tiled.tiled(*qkv, layout, window=None, scale=0.3)
    return jnp.sum(out * weight)

  text = jax.jit(jax.grad(total)).lower(qkv).as_text()
  scatters = [line for line in text.splitlines() if "scatter" in line]
  # The one scatter left builds the inverse index, in integers.
  assert not [line for line in scatters if "xf32" in line]
