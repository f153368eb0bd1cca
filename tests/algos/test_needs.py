"""What losses need beside sums of log-probs, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.algos import base, needs
from dpo_jax.ops import logprobs
from tests import worlds

ITEMS = worlds.examples(5, seed=2, completions=4)
BATCH = worlds.batch(ITEMS, extra=3)
SHAPE = BATCH["target_slot"].shape
RNG = np.random.default_rng(0)


def scored(batch=BATCH, values=None, step=0):
  if values is None:
    values = RNG.normal(size=batch["target_slot"].shape).astype(np.float32)
  values = jnp.where(base.scored_mask(batch), values, 0.0)
  return needs.Scored(batch, values, 2 * values, None, base.rng_of(step))


def comparisons(batch=BATCH):
  """(row, place in Q, slots) of each comparison."""
  for r, q in np.argwhere(batch["weights"] > 0):
    yield r, q, batch["pairs"][r, q]


def tokens_of(values, r, slot, batch=BATCH):
  return np.asarray(values)[r][batch["target_slot"][r] == slot]


def test_the_prefix_is_as_long_as_the_shorter_completion():
  s = scored()
  got = needs.NEEDS["prefix_logps"](s)
  ref = needs.NEEDS["ref_prefix_logps"](s)
  for r, q, slots in comparisons():
    both = [tokens_of(s.token_logps, r, slot) for slot in slots]
    shortest = min(map(len, both))
    for side, tokens in enumerate(both):
      want = tokens[:shortest].sum()
      np.testing.assert_allclose(got[r, q, side], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(ref, 2 * got, rtol=1e-6)


def drawn(step, batch=BATCH):
  """bool[S, R, Q, 2]: which tokens SamPO counts for each comparison."""
  R, S = batch["target_slot"].shape

  def of(token):
    one = jnp.broadcast_to(jnp.arange(S) == token, (R, S)).astype(jnp.float32)
    return needs.NEEDS["common_logps"](scored(batch, one, step))

  return np.asarray(jax.jit(jax.vmap(of))(jnp.arange(S))) > 0.5


def test_equally_many_tokens_of_both_are_drawn_and_none_of_others():
  chosen = drawn(step=3)
  for r, q, slots in comparisons():
    member = [BATCH["target_slot"][r] == slot for slot in slots]
    shortest = min(m.sum() for m in member)
    for side, own in enumerate(member):
      taken = chosen[:, r, q, side]
      assert taken.sum() == shortest
      assert not np.any(taken & ~own)


def test_draws_change_with_the_step_and_cover_every_token_alike():
  def sizes(comparison):
    r, _, slots = comparison
    return [int(np.sum(BATCH["target_slot"][r] == s)) for s in slots]

  unequal = max(comparisons(), key=lambda c: np.ptp(sizes(c)))
  (r, _, slots), counts = unequal, sizes(unequal)
  side, steps = int(np.argmax(counts)), 200
  each = jax.jit(
    jax.vmap(lambda step: needs._random_rank(BATCH, base.rng_of(step)))
  )(jnp.arange(steps))
  own = BATCH["target_slot"][r] == slots[side]
  ranks = np.asarray(each)[:, r, own]
  # A permutation at each step, and each token in each place 1 / n of the time.
  np.testing.assert_array_equal(
    np.sort(ranks, axis=1), np.broadcast_to(np.arange(max(counts)), ranks.shape)
  )
  share = np.mean(ranks < min(counts), axis=0)
  want = min(counts) / max(counts)
  assert np.all(np.abs(share - want) < 4 * np.sqrt(want * (1 - want) / steps))


def test_draws_follow_the_example_wherever_it_lies():
  """Alone, reversed, in rows of its own: the same tokens are drawn."""
  together = needs.NEEDS["common_logps"]

  def by_example(batch):
    ids = batch["tokens"].astype(np.float32)
    values = np.take_along_axis(ids, batch["target_index"], axis=1)
    out = np.asarray(together(scored(batch, values, 7)))
    per = batch["example_id"].shape[1]
    count = batch["completion_weights"].shape[2]
    found = {}
    for r, q, slots in comparisons(batch):
      p = slots[0] // count
      assert p < per
      key = int(batch["example_id"][r, p]), *(int(s) % count for s in slots)
      found[key] = out[r, q].tolist()
    return found

  want = by_example(BATCH)
  assert by_example(worlds.batch(ITEMS[::-1])) == want
  assert by_example(worlds.batch(ITEMS, packed=False, shared=False)) == want


@pytest.mark.parametrize("chunk", [None, 3])
def test_sums_of_squares_and_kls_are_those_of_the_whole_distributions(chunk):
  model, params = worlds.model("llama", head_chunk=chunk)
  ref = worlds.noisy(params, 4)
  outputs, ref_outputs = model.apply(params, BATCH), model.apply(ref, BATCH)

  def log_probs(outputs):
    hidden, head = outputs
    at = jnp.take_along_axis(hidden, BATCH["source_index"][..., None], axis=1)
    return np.asarray(jax.nn.log_softmax(logprobs.logits(at, head)), np.float64)

  p, q = log_probs(outputs), log_probs(ref_outputs)
  batch = {**BATCH, "ref_outputs": ref_outputs}
  zeros = jnp.zeros(SHAPE)
  s = needs.Scored(batch, zeros, zeros, outputs, base.rng_of(0))
  mask = np.asarray(base.scored_mask(BATCH))
  for name, per_token in (
    ("sum_sq_probs", np.log(np.sum(np.exp(2 * p), axis=-1))),
    ("sequence_kl", np.sum(np.exp(q) * (q - p), axis=-1)),
  ):
    got = needs.NEEDS[name](s)
    for r, c, slots in comparisons():
      for side, slot in enumerate(slots):
        want = tokens_of(np.where(mask, per_token, 0.0), r, slot).sum()
        np.testing.assert_allclose(got[r, c, side], want, rtol=1e-4, atol=1e-5)


def test_lengths_scores_and_presence_are_those_of_the_examples():
  items = [
    e._replace(
      scores=tuple(10.0 * e.example_id + k for k in range(len(e.completions)))
    )
    for e in ITEMS
  ]
  batch = worlds.batch(items)
  s = scored(batch)
  lengths, scores = needs.NEEDS["lengths"](s), needs.NEEDS["scores"](s)
  present = needs.NEEDS["present"](s)
  count = batch["completion_weights"].shape[2]
  for r, q, slots in comparisons(batch):
    for side, slot in enumerate(slots):
      example = items[int(batch["example_id"][r, slot // count])]
      k = slot % count
      assert lengths[r, q, side] == len(example.completions[k])
      assert scores[r, q, side] == example.scores[k]
      assert present[r, q, side]
  assert not np.any(np.asarray(present)[batch["weights"] == 0])
