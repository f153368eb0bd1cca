"""What is said of methods from a few seeds, against hands and scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

from dpo_jax.eval import statistics

RNG = np.random.default_rng(0)


def test_an_envelope_is_the_best_reward_until_a_kl():
  kl, reward = [0.0, 0.5, 1.0, 2.0], [0.4, 0.7, 0.6, 0.9]
  got = statistics.envelope(kl, reward, [0.0, 0.4, 0.5, 1.5, 3.0])
  np.testing.assert_array_equal(got, [0.4, 0.4, 0.7, 0.7, 0.9])


def test_points_of_runs_begin_at_the_policy_that_they_begin_from():
  curves = [
    {"kl": [1.0], "reward": [0.6]},
    {"kl": [2.0, 3.0], "reward": [1, 2]},
  ]
  kl, reward = statistics.points(curves, 0.5)
  np.testing.assert_array_equal(kl, [0.0, 1.0, 2.0, 3.0])
  np.testing.assert_array_equal(reward, [0.5, 0.6, 1.0, 2.0])


def test_a_kl_without_a_checkpoint_near_it_is_seen():
  got = statistics.near([0.0, 0.95, 2.3], [0.5, 1.0, 2.0], 0.1)
  np.testing.assert_array_equal(got, [False, True, False])


def test_a_checkpoint_is_dominated_by_one_that_is_no_worse_on_both_axes():
  ours, theirs = ([1.0, 2.0], [0.7, 0.8]), ([1.0, 0.5, 3.0], [0.7, 0.6, 0.9])
  # (1, .7) by its equal; (.5, .6) by none; (3, .9) by none.
  assert statistics.dominated(*theirs, *ours) == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_sign_flips_are_those_of_scipy(count):
  differences = RNG.normal(0.4, 1.0, count)
  want = stats.permutation_test(
    (differences, np.zeros(count)),
    lambda a, b, axis: np.mean(a - b, axis=axis),
    permutation_type="samples",
    alternative="greater",
    n_resamples=np.inf,
  ).pvalue
  assert statistics.sign_flip(differences) == pytest.approx(want, abs=1e-12)


def test_eight_seeds_that_all_agree_have_p_of_one_in_256():
  assert statistics.sign_flip([0.1] * 8) == 1 / 256
  assert statistics.sign_flip([-0.1] * 8) == 1.0
  assert statistics.sign_flip(np.zeros(8)) == 1.0


def test_too_many_pairs_to_flip_are_refused():
  with pytest.raises(ValueError, match="21 pairs"):
    statistics.sign_flip(np.ones(21))


def test_holm_steps_down():
  # .01 · 4, .02 · 3, then .03 · 2 = .06 and .04 · 1 below it.
  got = statistics.holm([0.04, 0.01, 0.03, 0.02])
  np.testing.assert_allclose(got, [0.06, 0.04, 0.06, 0.06])
  assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]


def test_holm_controls_false_claims_where_single_tests_do_not():
  ps = RNG.random((4000, 5))
  single = np.mean(ps.min(axis=1) < 0.05)
  adjusted = np.mean([min(statistics.holm(row)) < 0.05 for row in ps])
  assert single > 0.2
  assert adjusted == pytest.approx(0.05, abs=0.0104)  # three standard errors


def test_an_interval_is_the_bias_corrected_one_of_scipy():
  values = RNG.normal(1.0, 0.3, 8)
  low, high = statistics.interval(values, resamples=2000, seed=3)
  want = stats.bootstrap(
    (values,), np.mean, n_resamples=2000, rng=np.random.default_rng(3)
  ).confidence_interval
  assert (low, high) == (want.low, want.high)
  assert low < values.mean() < high


def test_an_interval_of_seeds_that_agree_is_a_point():
  assert statistics.interval([0.2] * 8, resamples=100, seed=0) == (0.2, 0.2)


def test_the_trend_is_pages():
  values = np.arange(5) + RNG.normal(0, 0.1, (6, 5))
  # L = Σ_j j Σ_i rank_ij is largest, and one of 5!^6 arrangements.
  assert statistics.trend(values) == pytest.approx(120.0**-6, rel=1e-6)
  down = statistics.trend(values[:, ::-1])
  assert down == pytest.approx(1.0)


def test_a_trend_of_two_by_three_is_counted_by_hand():
  values = np.array([[1, 2, 3], [1, 3, 2]])
  orders = list(itertools.permutations((1, 2, 3)))
  weights = np.arange(1, 4)
  every = [weights @ (np.add(a, b)) for a in orders for b in orders]
  want = np.mean(np.array(every) >= weights @ values.sum(axis=0))
  assert statistics.trend(values) == pytest.approx(want)


def compare(ours, theirs):
  grid = list(range(np.shape(ours)[1]))
  return statistics.compare(ours, theirs, grid, resamples=1000, seed=0)


def test_a_reward_that_is_not_finite_is_refused():
  with pytest.raises(ValueError, match="not finite"):
    compare([[np.nan]] * 8, [[0.1]] * 8)


def said(comparison, level=0.01, margin=0.01):
  return statistics.verdict(
    comparison, comparison.p, level=level, margin=margin
  )


def test_ahead_in_every_seed_at_every_kl_is_reproduced():
  ours = 0.8 + RNG.normal(0, 0.005, (8, 3))
  comparison = compare(ours, ours - 0.05 - RNG.normal(0, 0.002, (8, 3)))
  assert comparison.difference == pytest.approx(0.05, abs=0.005)
  assert said(comparison) == statistics.REPRODUCED


def test_five_seeds_cannot_reproduce():
  ours = 0.8 + RNG.normal(0, 0.005, (5, 3))
  comparison = compare(ours, ours - 0.05)
  assert comparison.p == 1 / 32
  assert said(comparison) == statistics.NOT_REPRODUCED


def test_behind_at_one_kl_is_not_reproduced():
  theirs = 0.8 + RNG.normal(0, 0.001, (8, 3))
  ahead = np.array([0.1, 0.1, -0.03]) + RNG.normal(0, 0.002, (8, 3))
  comparison = compare(theirs + ahead, theirs)
  assert comparison.low > 0
  assert comparison.worst < -2
  assert said(comparison) == statistics.NOT_REPRODUCED


def test_near_one_another_is_on_par_and_behind_is_not_reproduced():
  theirs = 0.8 + RNG.normal(0, 0.01, (8, 3))
  noise = RNG.normal(0, 0.002, (8, 3))
  assert said(compare(theirs - 0.002 + noise, theirs)) == statistics.ON_PAR
  behind = compare(theirs - 0.05 + noise, theirs)
  assert said(behind) == statistics.NOT_REPRODUCED
  assert behind.high < 0
