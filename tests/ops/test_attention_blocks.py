"""Blockwise attention: what is not visible costs nothing, in any direction."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import attention
from dpo_jax.ops.attention import blockwise, rule
from tests import worlds

BLOCK = 16


def layout_of(segments, branches, block=BLOCK):
  """A row of whole blocks, from the segment and branch of each."""
  segment, branch = (
    jnp.repeat(jnp.int32(x), block)[None] for x in (segments, branches)
  )
  # Blockwise reads no index of examples.
  at = jnp.arange(segment.shape[1], dtype=jnp.int32)[None]
  return attention.Layout(at, segment, branch, at[:, None])


def random_qkvw(length, heads=2, width=8):
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(k, (1, length, heads, width)) for k in keys]


# Three examples of two blocks; a prompt with two completions of two blocks.
PACKED = layout_of([1, 1, 2, 2, 3, 3], [0] * 6)
TREE = layout_of([1] * 6, [0, 0, 1, 1, 2, 2])


def gradients(q, k, v, weight, layout, alive):
  """Gradients of what the positions that are alive get, and that."""

  def total(q, k, v):
    out = blockwise.blockwise(
      q, k, v, layout, window=None, scale=0.3, block=BLOCK
    )
    return jnp.sum(jnp.where(alive, out * weight, 0.0)), out

  grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  return *grads, out


def poisoned_and_clean(layout, dead, vmapped):
  """`gradients` with NaN in keys and values that are dead, and without."""
  q, k, v, weight = random_qkvw(layout.positions.shape[1])
  dead = dead[..., None, None]
  bad = [jnp.where(dead, jnp.nan, x) for x in (k, v)]

  def fn(q, k, v):
    return gradients(q, k, v, weight, layout, ~dead)

  if vmapped:  # the same rows through several models
    fn = jax.vmap(fn)
    q, k, v, *bad = (jnp.stack([x, 2 * x]) for x in (q, k, v, *bad))
  fn = jax.jit(fn)
  return fn(q, *bad), fn(q, k, v)


@pytest.mark.parametrize(
  ("case", "vmapped"),
  [
    ("another example", True),
    ("another completion", False),
    pytest.param("another example", False, marks=pytest.mark.slow),
    pytest.param("another completion", True, marks=pytest.mark.slow),
  ],
)
def test_invisible_blocks_are_never_touched(case, vmapped):
  """0 · NaN is NaN, so a block that was computed and masked would show."""
  if case == "another example":
    layout, dead = PACKED, PACKED.segment_ids == 2
    beside = ~dead
  else:
    # The prompt's gradient has a part from the dead completion, 0 · NaN.
    layout, dead = TREE, TREE.branch_ids == 1
    beside = TREE.branch_ids == 2
  got, want = poisoned_and_clean(layout, dead, vmapped)
  for a, b in zip(got, want, strict=True):
    a, b = (jnp.where(beside[..., None, None], x, 0.0) for x in (a, b))
    np.testing.assert_array_equal(a, b)


def test_the_poison_shows_where_blocks_are_masked_but_computed(monkeypatch):
  """Planted: all blocks up to the diagonal count as visible."""

  def all_blocks(positions, segment_ids, branch_ids, *, window, block):
    count = positions.shape[0] // block
    return jnp.tril(jnp.ones((count, count), bool))

  monkeypatch.setattr(blockwise, "visible_blocks", all_blocks)
  got, _ = poisoned_and_clean(PACKED, PACKED.segment_ids == 2, False)
  beside = (PACKED.segment_ids == 3)[0]
  assert bool(jnp.all(jnp.isnan(got[-1][0, beside])))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_no_visible_block_is_left_out_and_few_others_are_in(
  packed, shared, window
):
  items = worlds.examples(6, seed=3, completions=4, longest=20)
  batch = worlds.batch(items, packed=packed, shared=shared, extra=3)
  block, ids = 4, [batch[name] for name in rule.Layout._fields[:3]]
  pad = -ids[0].shape[1] % block

  @jax.jit
  def both(*ids):
    blocks = functools.partial(
      blockwise.visible_blocks, window=window, block=block
    )
    padded = (jnp.pad(x, ((0, 0), (0, pad))) for x in ids)
    return jax.vmap(blocks)(*ids), rule.visible(*padded, window)

  seen, mask = map(np.asarray, both(*ids))
  rows, count = seen.shape[:2]
  exact = mask.reshape(rows, count, block, count, block).any(axis=(2, 4))
  assert not (exact & ~seen).any()
  # Blocks with the end of one example and the start of the next.
  assert seen.sum() <= 1.2 * exact.sum()


@pytest.mark.parametrize("vmapped", [False, True])
def test_time_falls_with_packing(vmapped):
  """The same program, on one example of 768 tokens and on 12 of 64."""
  count, block = 24, 32
  q, k, v, weight = random_qkvw(count * block, heads=2, width=16)

  def total(qkv, layout):
    out = blockwise.blockwise(*qkv, layout, window=None, scale=0.3, block=block)
    return jnp.sum(out * weight)

  fn, qkv = jax.grad(total), (q, k, v)
  if vmapped:
    fn = jax.vmap(fn, in_axes=(0, None))
    qkv = tuple(jnp.stack([x, x]) for x in qkv)
  fn = jax.jit(fn)
  one = layout_of([1] * count, [0] * count, block)
  many = layout_of(np.arange(count) // 2 + 1, [0] * count, block)

  def seconds(layout):
    start = time.perf_counter()
    jax.block_until_ready(fn(qkv, layout))
    return time.perf_counter() - start

  for layout in (one, many):
    seconds(layout)
  times = np.array([[seconds(one), seconds(many)] for _ in range(5)])
  # 300 pairs of blocks against 36: an eighth, but for other work and noise.
  best = times.min(axis=0)
  assert best[1] < 0.4 * best[0], times


def test_memory_grows_with_the_row_not_with_its_square():
  def temporary(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    index = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    layout = attention.Layout(ids, ids, ids, index)

    def total(q, k, v, layout):
      kwargs = {"window": None, "scale": 0.3, "block": 64}
      return jnp.sum(blockwise.blockwise(q, k, v, layout, **kwargs))

    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    compiled = grad.lower(x, x, x, layout).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # Scores of two heads would be 128 MiB; four times the row, four times all.
  assert temporary(4096) < 8 * 2**20
  assert temporary(4096) < 5 * temporary(1024)
