"""A scorer of one's own that scores rows of tokens on the devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.eval import rewards
from dpo_jax.run import build
from tests.algos import rewarded

LETTERS = range(ord("a"), ord("z") + 1)


def share_of_letters(batch):
  """f32[R, P, C]: of the tokens of each completion, how many are letters."""
  tokens = jnp.take_along_axis(batch["tokens"], batch["target_index"], axis=1)
  hit = (tokens >= LETTERS[0]) & (tokens <= LETTERS[-1])
  shape = batch["completion_weights"].shape
  slots = jnp.arange(shape[1] * shape[2])
  member = batch["target_slot"][..., None] == slots
  counts = jnp.sum(member, axis=1)
  hits = jnp.sum(member & hit[..., None], axis=1)
  return (hits / jnp.maximum(counts, 1)).reshape(shape)


def test_a_traced_scorer_of_rows_scores_what_rollouts_drew(monkeypatch):
  monkeypatch.setitem(rewards.SCORERS, "rows", rewards.Rows(share_of_letters))
  config = rewarded.config_of("rollout.scorer=rows")
  run = build.prepare(config)
  state = rewarded.state_of(run)
  batch, _ = run.feed.batch(0, state)
  scores, weights = batch["scores"], batch["completion_weights"]
  np.testing.assert_allclose(
    np.asarray(scores), np.asarray(weights * share_of_letters(batch)), rtol=1e-6
  )
  assert len(np.unique(np.asarray(scores)[np.asarray(weights) > 0])) > 1


def test_a_scorer_of_rows_says_that_it_scores_no_texts(monkeypatch):
  monkeypatch.setitem(rewards.SCORERS, "rows", rewards.Rows(share_of_letters))
  scorer = rewards.load("rows")
  with pytest.raises(ValueError, match="scores rows of tokens while a run"):
    scorer.score(["a"], ["b"])


def test_rewards_of_rows_that_are_not_finite_are_refused(monkeypatch):
  entry = rewards.Rows(lambda batch: jnp.nan * batch["completion_weights"])
  monkeypatch.setitem(rewards.SCORERS, "rows", entry)
  run = build.prepare(rewarded.config_of("rollout.scorer=rows"))
  with pytest.raises(ValueError, match="scorer 'rows' returned nan"):
    run.feed.batch(0, rewarded.state_of(run))
