"""The log-prob op against log_softmax, in every form it takes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import compat
from dpo_jax.ops import logprobs
from dpo_jax.parallel import mesh as mesh_lib

R, T, S, D, V, REAL = 4, 12, 10, 16, 128, 61


def problem(seed=0, bias=True, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 5)
  hidden = jax.random.normal(keys[0], (R, T, D)).astype(dtype)
  kernel = jax.random.normal(keys[1], (D, V))
  b = jax.random.normal(keys[2], (V,)) if bias else None
  source = jax.random.randint(keys[3], (R, S), 0, T)
  targets = jax.random.randint(keys[4], (R, S), 0, REAL)
  mask = jnp.arange(S)[None] < jnp.array([S, 7, 1, 0])[:, None]
  return hidden, kernel, b, source, targets, mask


def plain(hidden, kernel, bias, source, targets, mask, *, softcap, scale):
  """Straight from the definition, all logits at once, real columns only."""
  out = hidden.astype(jnp.float32) @ kernel
  out = out if bias is None else out + bias
  out = out if scale is None else out * scale
  out = out if softcap is None else softcap * jnp.tanh(out / softcap)
  logps = jax.nn.log_softmax(out[..., :REAL], axis=-1)
  rows = jnp.arange(R)[:, None]
  return jnp.where(mask, logps[rows, source, targets], 0.0)


def ours(hidden, kernel, bias, source, targets, mask, *, chunk, **head):
  return logprobs.token_logps(
    hidden,
    logprobs.Head(kernel, bias, REAL, chunk=chunk, **head),
    source,
    targets,
    mask,
  )


def value_and_grads(fn, *args):
  """The value, and apart from it the gradients; in one program."""
  weight = jax.random.normal(jax.random.key(9), (R, S))

  @jax.jit
  def both(wrt, *rest):
    def total(wrt):
      return jnp.sum(weight * fn(*wrt, *rest))

    return fn(*wrt, *rest), jax.grad(total)(wrt)

  return both(args[:3], *args[3:])


def assert_same(got, want, value=1e-5, gradient=1e-4):
  np.testing.assert_allclose(got[0], want[0], rtol=value, atol=value)
  for a, b in zip(
    jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True
  ):
    difference = jnp.linalg.norm((a - b).astype(jnp.float32))
    assert difference <= gradient * jnp.linalg.norm(b.astype(jnp.float32))


HEADS = [(True, 3.0, 0.5), (True, None, None), (False, None, 0.5)]


@functools.cache
def wanted(bias, softcap, scale):
  fn = functools.partial(plain, softcap=softcap, scale=scale)
  return value_and_grads(fn, *problem(bias=bias))


@pytest.mark.parametrize(
  ("bias", "softcap", "scale", "chunk"),
  [
    pytest.param(
      *head,
      chunk,
      # Every chunk of a head with all it may have, and every head in chunks.
      marks=[] if head == HEADS[0] or chunk == 4 else [pytest.mark.slow],
    )
    for head in HEADS
    for chunk in (None, 1, 4, 10, 64)
  ],
)
def test_value_and_gradient_equal_log_softmax(bias, softcap, scale, chunk):
  fn = functools.partial(ours, chunk=chunk, softcap=softcap, scale=scale)
  got = value_and_grads(fn, *problem(bias=bias))
  assert_same(got, wanted(bias, softcap, scale))


@pytest.mark.parametrize("chunk", [None, 4, 5])
def test_large_logits_overflow_nowhere(chunk):
  """Not in the padding of the last chunk either."""
  hidden, kernel, *rest = problem()
  args = (20 * hidden, 2 * kernel, *rest)
  got = value_and_grads(functools.partial(ours, chunk=chunk), *args)
  plainly = functools.partial(plain, softcap=None, scale=None)
  assert float(jnp.max(jnp.abs(args[0] @ args[1]))) > 200
  assert_same(got, value_and_grads(plainly, *args))


@pytest.mark.parametrize(
  ("sizes", "chunk"),
  [
    ((2, 2, 2, 1), None),
    ((1, 1, 8, 1), 4),
    pytest.param((2, 2, 2, 1), 4, marks=pytest.mark.slow),
    pytest.param((1, 1, 8, 1), None, marks=pytest.mark.slow),
    pytest.param((4, 1, 2, 1), None, marks=pytest.mark.slow),
    pytest.param((4, 1, 2, 1), 4, marks=pytest.mark.slow),
  ],
)
def test_rows_and_vocabulary_may_be_spread_over_a_mesh(sizes, chunk):
  args = problem()
  fn = functools.partial(ours, chunk=chunk, softcap=3.0)
  want = value_and_grads(fn, *args)
  mesh = compat.make_mesh(jax.devices(), sizes, mesh_lib.AXES)
  with jax.set_mesh(mesh):
    got = jax.jit(functools.partial(value_and_grads, fn))(*args)
  assert_same(got, want, value=1e-6, gradient=1e-6)


def test_bf16_hidden_states_lose_no_more_than_their_rounding():
  """Logits and log-sum-exp stay f32: only the inputs are rounded."""
  args = problem(dtype=jnp.bfloat16)
  rounded = args[1].astype(jnp.bfloat16).astype(jnp.float32)
  want = plain(args[0], rounded, *args[2:], softcap=None, scale=None)
  got = ours(*args, chunk=4)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 4])
def test_masked_positions_change_nothing(chunk):
  """Not even ids outside the vocabulary, or NaN at positions nobody reads."""
  hidden, kernel, bias, source, targets, mask = problem()
  fn = functools.partial(ours, chunk=chunk)
  want = value_and_grads(fn, hidden, kernel, bias, source, targets, mask)
  targets = jnp.where(mask, targets, 10**6)
  source = jnp.where(mask, source, -(10**6))
  got = value_and_grads(fn, hidden, kernel, bias, source, targets, mask)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert not np.any(got[0][3])


def test_chunked_memory_does_not_grow_with_scored_positions_times_vocabulary():
  def temporary_bytes(scored, chunk, vocab=4096):
    shapes = (1, scored, D), (D, vocab), (1, scored), (1, scored)
    hidden, kernel, source, targets = (
      jax.ShapeDtypeStruct(s, t)
      for s, t in zip(shapes, [jnp.float32] * 2 + [jnp.int32] * 2, strict=True)
    )

    def total(hidden, kernel, source, targets):
      head = logprobs.Head(kernel, None, vocab, chunk=chunk)
      mask = source >= 0
      return jnp.sum(logprobs.token_logps(hidden, head, source, targets, mask))

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(
      hidden, kernel, source, targets
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes

  logits = 4 * 4096 * 4096  # f32[S, V] at the larger S
  growth = temporary_bytes(4096, 64) - temporary_bytes(1024, 64)
  assert growth < 0.05 * logits
  assert temporary_bytes(4096, None) > logits  # the test can see such an array


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("sizes", [None, (2, 1, 4, 1)])
def test_entropy_and_top_1_hits_equal_their_definitions(sizes, chunk):
  hidden, kernel, bias, source, targets, mask = problem()
  rows = jnp.arange(R)[:, None]
  out = (hidden @ kernel + bias)[rows, source, :REAL]
  targets = targets.at[:, ::2].set(jnp.argmax(out, axis=-1)[:, ::2])
  logps = jax.nn.log_softmax(out)
  want = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
  hits = jnp.argmax(out, axis=-1) == targets
  head = logprobs.Head(kernel, bias, REAL, chunk=chunk)

  def fn(hidden):
    return logprobs.token_scores(hidden, head, source, targets, mask)

  @jax.jit
  def all_of_it(hidden):
    slopes = jax.grad(lambda h: jnp.sum(fn(h).logps))(hidden)
    none = jax.grad(lambda h: jnp.sum(fn(h).entropy + fn(h).top1))(hidden)
    return fn(hidden), slopes, none

  with contextlib.ExitStack() as stack:
    if sizes is not None:
      mesh = compat.make_mesh(jax.devices(), sizes, mesh_lib.AXES)
      stack.enter_context(jax.set_mesh(mesh))
    got, slopes, none = all_of_it(hidden)
  np.testing.assert_allclose(got.entropy, jnp.where(mask, want, 0), atol=1e-5)
  np.testing.assert_array_equal(got.top1, jnp.where(mask, hits, 0))
  assert 0 < int(jnp.sum(hits & mask)) < int(jnp.sum(mask))
  rest = kernel, bias, source, targets, mask

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def alone(hidden):
    logps = ours(hidden, *rest, chunk=chunk)
    return jnp.sum(logps), logps

  (_, logps), want = alone(hidden)
  np.testing.assert_allclose(got.logps, logps, rtol=1e-6)
  np.testing.assert_allclose(slopes, want, rtol=1e-5, atol=1e-6)
  assert not np.any(none)


def test_completion_sums_and_selection_equal_a_loop():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(3, 7)).astype(np.float32)
  slot = rng.integers(0, 6, (3, 7))  # 5 is padding
  index = rng.integers(0, 5, (3, 4, 2))
  sums = np.zeros((3, 5), np.float32)
  for r in range(3):
    for s in range(7):
      if slot[r, s] < 5:
        sums[r, slot[r, s]] += values[r, s]
  got = logprobs.completion_logps(jnp.asarray(values), jnp.asarray(slot), 5)
  np.testing.assert_allclose(got, sums, rtol=1e-6)
  chosen = logprobs.select(jnp.asarray(sums), jnp.asarray(index))
  want = np.stack([sums[r][index[r]] for r in range(3)])
  np.testing.assert_array_equal(chosen, want)


@pytest.mark.parametrize("chunk", [None, 4])
def test_what_pads_the_vocabulary_may_hold_anything(chunk):
  hidden, kernel, bias, *rest = problem()
  fn = functools.partial(ours, chunk=chunk, softcap=None)
  want = value_and_grads(fn, hidden, kernel, bias, *rest)
  bias = bias.at[REAL:].set(1e4)
  got = value_and_grads(fn, hidden, kernel, bias, *rest)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert not np.any(got[1][1][:, REAL:])
