"""The device's own kernels, against plain attention and plain log-probs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import attention, logprobs
from dpo_jax.ops.attention import choice, cudnn, rule
from tests import worlds

HEAD_DIMS = (64, 80, 128)


def problem(packed, shared, head_dim, kv_heads=2):
  """(layout, (q, k, v), weight of each output) in bfloat16."""
  items = worlds.examples(4, seed=3, completions=2, longest=90)
  batch = worlds.batch(items, packed=packed, shared=shared, extra=3)
  layout = rule.Layout(*(jnp.asarray(batch[f]) for f in rule.Layout._fields))
  keys = jax.random.split(jax.random.key(0), 4)
  at = batch["tokens"].shape
  qkv = tuple(
    jax.random.normal(key, (*at, heads, head_dim), jnp.bfloat16)
    for key, heads in zip(keys, (4, kv_heads, kv_heads), strict=False)
  )
  real = jnp.asarray(batch["segment_ids"] > 0)[..., None, None]
  noise = jax.random.normal(keys[3], (*at, 4, head_dim))
  return layout, qkv, jnp.where(real, noise, 0)


def value_and_grad(fn, layout, qkv, weight, window):
  def total(qkv):
    out = fn(*qkv, layout, window=window, scale=0.15).astype(jnp.float32)
    return jnp.sum(jnp.where(weight != 0, out, 0) * weight)

  return jax.jit(jax.value_and_grad(total))(qkv)


def distance(got, want):
  """‖got − want‖ / ‖want‖ of each leaf."""
  return [
    float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  ]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_cudnn_is_as_near_to_the_rule_as_plain_bf16(
  packed, shared, head_dim, window
):
  layout, qkv, weight = problem(packed, shared, head_dim)
  exact = tuple(x.astype(jnp.float32) for x in qkv)
  with jax.default_matmul_precision("highest"):
    want = value_and_grad(rule.xla, layout, exact, weight, window)
  plain = value_and_grad(rule.xla, layout, qkv, weight, window)
  got = value_and_grad(cudnn.cudnn, layout, qkv, weight, window)
  for ours, theirs in zip(
    distance(got, want), distance(plain, want), strict=True
  ):
    assert ours < max(2 * theirs, 0.01), (ours, theirs)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_auto_runs_cudnn_and_holds_no_scores(head_dim):
  assert cudnn.broken(head_dim) is None
  layout, qkv, weight = problem(True, True, head_dim)
  assert choice.platform(jax.devices()[0]) == "cuda"
  auto = attention.ATTENTION["auto"]

  def total(qkv):
    out = auto(*qkv, layout, window=None, scale=0.15)
    return jnp.sum(out.astype(jnp.float32) * weight)

  text = jax.jit(jax.grad(total)).lower(qkv).compile().as_text()
  assert "cudnn" in text or "fmha" in text


def test_scores_and_their_gradients_equal_the_plain_ones():
  rows, length, embed, vocab = 2, 48, 64, 1000
  keys = jax.random.split(jax.random.key(1), 3)
  hidden = jax.random.normal(keys[0], (rows, length, embed))
  kernel = jax.random.normal(keys[1], (embed, vocab)) / 8
  targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
  source = jnp.broadcast_to(jnp.arange(length), (rows, length))
  mask = source % 7 > 0

  def scored(chunk):
    def total(hidden, kernel):
      head = logprobs.Head(kernel, None, vocab, chunk=chunk)
      found = logprobs.token_scores(hidden, head, source, targets, mask)
      return jnp.sum(found.logps**2)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, kernel)

  def plain(hidden, kernel):
    logits = jax.nn.log_softmax(hidden @ kernel)
    found = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(mask, found, 0) ** 2)

  with jax.default_matmul_precision("highest"):
    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(hidden, kernel)
    for chunk in (None, 16):
      got = scored(chunk)
      np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
      for a, b in zip(got[1], want[1], strict=True):
        assert jnp.linalg.norm(a - b) < 1e-4 * jnp.linalg.norm(b)
