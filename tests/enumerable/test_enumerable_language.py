"""The language whose every answer can be listed, against plain counting."""

import itertools

import jax
import numpy as np
import pytest

from dpo_jax.algos import base
from dpo_jax.enumerable import language as language_lib
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder

LANGUAGE = language_lib.make(words=3, length=3, prompts=2, seed=1)
SAID = language_lib.answers(3, 3)


@pytest.fixture(scope="module")
def model():
  built = decoder.build(model_config.PRESETS["micro"], 3)
  return built, jax.jit(built.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def log_policy(model):
  built, params = model
  batch = language_lib.prefixes(LANGUAGE)
  return np.asarray(
    jax.jit(
      lambda params: language_lib.log_policy(
        LANGUAGE, built.apply, params, batch
      )
    )(params)
  )


def test_answers_are_all_there_are_and_know_their_places():
  assert len({tuple(row) for row in SAID.tolist()}) == 27
  np.testing.assert_array_equal(language_lib.number_of(SAID, 3), np.arange(27))


def test_probabilities_of_all_answers_sum_to_one(log_policy):
  np.testing.assert_allclose(np.exp(log_policy).sum(-1), 1, atol=1e-6)


def test_log_probs_are_those_that_training_sees(model, log_policy):
  built, params = model
  every = itertools.product(range(2), SAID.reshape(9, 3, 3))
  prompts, said = zip(*every, strict=True)
  batch = language_lib.batch_of(
    language_lib.examples_of(prompts, np.array(said)), 0
  )
  tokens = base.token_logps(built.apply, params, batch)
  got = base.completion_sums(tokens, batch).reshape(2, 27)
  np.testing.assert_allclose(got, log_policy, atol=2e-6)


def test_the_frontier_is_no_lower_than_any_policy(log_policy):
  """No policy of the same KL has more reward than the optimum has."""
  rng = np.random.default_rng(0)
  best = language_lib.frontier(log_policy, LANGUAGE.reward)
  assert np.all(np.diff(best.kl) > -1e-12)
  for scale in (0.1, 0.5, 1.0, 2.0):
    other = log_policy + scale * rng.normal(size=log_policy.shape)
    other -= np.log(np.exp(other).sum(-1, keepdims=True))
    other = np.float64(other)
    is_worth = language_lib.measure(
      other, np.float64(log_policy), LANGUAGE.reward
    )
    assert is_worth["reward"] < best.at(float(is_worth["kl"]))


def test_the_frontiers_slope_is_the_temperature(log_policy):
  """dE[r]/dKL = τ along π_ref e^(r/τ) / Z."""
  best = language_lib.frontier(log_policy, LANGUAGE.reward)
  temperature = language_lib.TEMPERATURES[::-1]
  middle = (best.kl[2:] > 0.1) & (best.kl[:-2] < 1.5)
  rise, run = (x[2:] - x[:-2] for x in (best.reward, best.kl))
  slope = rise[middle] / run[middle]
  np.testing.assert_allclose(slope, temperature[1:-1][middle], rtol=2e-3)
  assert middle.sum() > 20


def test_the_best_of_n_is_that_of_counting_all_draws(log_policy):
  """N = 3 of 27 answers, ranks with ties, all 27³ draws listed."""
  ranks = np.round(4 * LANGUAGE.reward)  # several answers of each rank
  got = np.exp(language_lib.best_of(log_policy, ranks, 3))
  for x in range(2):
    p = np.exp(np.float64(log_policy[x]))
    p /= p.sum()
    want = np.zeros(27)
    draws = np.array(list(itertools.product(range(27), repeat=3)))
    chosen = draws[np.arange(len(draws)), np.argmax(ranks[x][draws], axis=1)]
    np.add.at(want, chosen, p[draws].prod(axis=1))
    np.testing.assert_allclose(got[x], want, atol=1e-6)  # log π is f32
  many = language_lib.best_of(log_policy, ranks, 4096)
  assert np.isfinite(
    float(language_lib.measure(many, np.float64(log_policy), ranks)["kl"])
  )
  alone = language_lib.best_of(log_policy, ranks, 1)
  np.testing.assert_allclose(alone, log_policy, atol=1e-6)


def test_comparisons_are_labelled_as_they_say(log_policy):
  options = {"groups": 400, "draws": 4, "scale": 8.0, "seed": 5}
  exact = language_lib.compared(
    LANGUAGE, log_policy, labels="deterministic", **options
  )
  drawn = language_lib.compared(
    LANGUAGE, log_policy, labels="bradley_terry", **options
  )
  np.testing.assert_array_equal(exact.said, drawn.said)  # the same answers
  number = language_lib.number_of(exact.said, 3)
  rewards = LANGUAGE.reward[exact.prompts[:, None], number]

  def ahead(groups):
    sides = np.take_along_axis(rewards[:, None], groups.pairs, axis=-1)
    return (sides[..., 0] - sides[..., 1])[groups.weights > 0]

  assert ahead(exact).min() > 0
  margins = np.abs(ahead(drawn))
  right = ahead(drawn) > 0
  p = 1 / (1 + np.exp(-8 * margins))
  error = np.sqrt(np.sum(p * (1 - p)))
  assert abs(right.sum() - p.sum()) < 4 * error
  # Two draws of one answer compare nothing.
  same = np.take_along_axis(number[:, None], drawn.pairs, axis=-1)
  assert np.all(drawn.weights[same[..., 0] == same[..., 1]] == 0)


def test_draws_are_of_the_policy(log_policy):
  rng = np.random.default_rng(2)
  prompts, drawn = language_lib.draw(LANGUAGE, log_policy, 4000, 5, rng)
  for x in range(2):
    counts = np.bincount(drawn[prompts == x].ravel(), minlength=27)
    expected = counts.sum() * np.exp(log_policy[x])
    chi = np.sum((counts - expected) ** 2 / expected)
    assert chi < 26 + 4 * np.sqrt(52)  # mean and four deviations of χ²_26
