"""Statistics of verdicts, against scipy, scikit-learn and by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import metrics

from dpo_jax.eval import intervals
from dpo_jax.eval.judge import (
  agreement,
  lengths,
  matched,
  rates,
  verdicts,
)
from tests.eval import judge_stub


@pytest.mark.parametrize(("right", "of"), [(0, 20), (5, 10), (428, 640)])
def test_the_interval_of_a_share_is_wilsons(right, of):
  theirs = stats.binomtest(right, of).proportion_ci(method="wilson")
  assert intervals.wilson(right / of, of) == pytest.approx(
    (theirs.low, theirs.high), abs=1e-7
  )


def test_the_papers_win_rate_has_the_error_that_was_worked_out_for_it():
  """158 of 256 (PAPER: 61.7 %): one standard error is about 3 points."""
  low, high = intervals.wilson(158 / 256, 256)
  assert (high - low) / (2 * 1.959964) == pytest.approx(0.0304, abs=5e-4)


def test_the_bootstrap_of_a_mean_covers_what_the_normal_does():
  values = np.random.default_rng(0).normal(2.0, 3.0, 400)
  low, high = intervals.bootstrap([values], intervals.mean, seed=1)
  half = 1.959964 * values.std() / 20
  # 2,000 draws tell a quantile to a twentieth of its distance.
  assert (high - low) / 2 == pytest.approx(half, rel=0.08)
  assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.05 * half * 2)
  again = intervals.bootstrap([values], intervals.mean, seed=1)
  assert again == (low, high)
  assert intervals.bootstrap([values], intervals.mean, seed=2) != again
  assert intervals.bootstrap([values[:1]], intervals.mean, seed=1) is None


def test_what_prompts_share_is_no_spread_of_a_difference():
  """Two policies that differ by 0.1 on every prompt, which all differ."""
  first = np.random.default_rng(0).normal(size=50)
  low, high = intervals.bootstrap(
    [first + 0.1, first], intervals.difference, seed=0
  )
  assert (low, high) == pytest.approx((0.1, 0.1), abs=1e-12)


def test_the_rate_at_equal_length_is_the_minimum_of_its_formula():
  rng = np.random.default_rng(0)
  gaps = rng.normal(size=300)
  wins = (rng.random(300) < 1 / (1 + np.exp(-(0.4 + gaps)))).astype(float)
  wins[:30] = 0.5
  d = np.tanh(gaps / gaps.std())

  def loss(x):
    z = x[0] + x[1] * d
    terms = wins * np.logaddexp(0, -z) + (1 - wins) * np.logaddexp(0, z)
    return terms.sum() + x[1] ** 2 / 200

  best = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x
  got = lengths.at_equal_length(wins, d)
  # BFGS ends where its gradient is 1e-6 or so.
  assert got == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-6)
  several = lengths.at_equal_length(np.stack([wins, wins[::-1]]), d)
  assert several[0] == pytest.approx(float(got), abs=1e-12)


def test_a_judge_of_length_alone_sees_no_difference_at_equal_length():
  """Ours are longer in most pairs, and win as often as that says."""
  rng = np.random.default_rng(0)
  ours = ["x" * n for n in rng.integers(15, 40, 4000)]
  theirs = ["y" * 20] * 4000
  d = lengths.differences(ours, theirs)
  wins = (rng.random(4000) < 1 / (1 + np.exp(-2 * d))).astype(float)
  assert wins.mean() > 0.65
  # Three standard errors: 3 · 0.5 / √4000, and a half more for γ.
  assert lengths.at_equal_length(wins, d) == pytest.approx(0.5, abs=0.035)
  split = lengths.at_equal_length((1 + np.sign(d)) / 2, d)
  assert 0.4 < split < 0.6  # length tells all: it stays finite


def test_without_differences_of_length_the_rate_is_the_win_rate():
  d = lengths.differences(["ab"] * 4, ["c"] * 4)
  assert not d.any()
  for wins in ([1, 0, 0, 0.5], [0.5] * 4):
    got = lengths.at_equal_length(np.array(wins), d)
    assert got == pytest.approx(np.mean(wins), abs=1e-9)
  for value in (0.0, 1.0):  # θ is without end: steps of 1 come as far as 60
    got = lengths.at_equal_length(np.full(4, value), d)
    assert got == pytest.approx(value, abs=1e-9)


def test_the_difference_of_lengths_is_in_characters_and_bounded():
  d = lengths.differences(["aaaa", "a", "aa"], ["a", "aaa", "aa"])
  spread = np.std([3, -2, 0])
  np.testing.assert_allclose(d, np.tanh(np.array([3, -2, 0]) / spread))


def test_kappa_by_hand_and_by_scikit_learn():
  # Of 50: both yes 20, both no 15, they differ in 5 and 10.
  first = ["y"] * 25 + ["n"] * 25
  second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
  # p_o = 0.7, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5
  assert agreement.kappa(first, second) == pytest.approx(0.4, abs=1e-12)
  rng = np.random.default_rng(0)
  a = rng.choice([0, 0.5, 1], 200).tolist()
  b = [x if rng.random() < 0.6 else float(rng.integers(2)) for x in a]
  codes = [[int(2 * x) for x in each] for each in (a, b)]
  want = metrics.cohen_kappa_score(*codes)
  assert agreement.kappa(a, b) == pytest.approx(want, abs=1e-12)


def test_kappa_of_judges_that_always_say_the_same_is_none():
  assert agreement.kappa([1, 1], [1, 1]) is None
  assert agreement.kappa([], []) is None
  assert agreement.kappa([1, 1], [0, 0]) == 0
  assert agreement.kappa([1, 0], [1, 0]) == 1


def pair(number, ours="ours", theirs="their"):
  return matched.Pair("f", f"p{number}", ours, theirs)


def test_rates_by_hand():
  said = {
    "decided": (1.0, ["A", "B"]),
    "lost": (0.0, ["B", "A"]),
    "flip": (0.5, ["A", "A"]),
  }
  judged = [
    verdicts.Verdict(said[w][0], w.replace("lost", "decided"),
                     {"said": said[w][1]})
    for w in ["decided"] * 5 + ["lost"] * 2 + ["flip"] * 2
  ]  # fmt: skip
  judged.append(verdicts.Verdict(0.5, "identical", {}))
  judged.append(verdicts.Verdict(None, "malformed", {"said": ["A", None]}))
  judged.append(verdicts.Verdict(None, "not asked", {}))
  got = rates.of_samples([pair(n) for n in range(12)], judged, seed=0)
  counts = [got[k] for k in ("pairs", "judged", "wins", "ties", "losses")]
  assert counts == [12, 10, 5, 3, 2]
  assert got["win_rate"] == pytest.approx(0.65)
  assert got["wilson"] == pytest.approx(intervals.wilson(0.65, 10))
  assert got["tie_rate"] == pytest.approx(0.3)
  assert got["flip_rate"] == pytest.approx(2 / 9)
  assert got["first_rate"] == pytest.approx((5 + 2 + 4) / 18)
  assert got["at_equal_length"] == pytest.approx(0.65, abs=1e-9)
  assert got["lengths"] == [4, 5]
  assert got["why"] == {
    "decided": 7, "flip": 2, "identical": 1, "malformed": 1, "not asked": 1,
  }  # fmt: skip


def test_without_a_verdict_there_is_no_rate():
  nobody = [verdicts.Verdict(None, "not asked", {})]
  got = rates.of_samples([pair(0)], nobody, seed=0)
  assert got["judged"] == 0
  assert [got[k] for k in ("win_rate", "wilson", "bootstrap")] == [None] * 3
  empty = {"prompts": 0, "difference": None, "bootstrap": None}
  assert rates.between(nobody, nobody, seed=0) == empty


def test_a_difference_is_of_the_prompts_that_both_have():
  of = {x: verdicts.Verdict(x, "decided", {}) for x in (0.0, 0.5, 1.0, None)}
  first = [of[x] for x in (0.0, 1.0, 0.5, None)]
  second = [of[x] for x in (1.0, 1.0, None, 0.0)]
  got = rates.between(first, second, seed=0)
  assert (got["prompts"], got["difference"]) == (2, 0.5)
  assert got["bootstrap"] == (0, 1)


@pytest.mark.parametrize(
  ("ours", "theirs", "value", "why"),
  [(1.5, 0, 1.0, "decided"), (-1, 0, 0.0, "decided"), (2, 2, 0.5, "equal")],
)
def test_the_higher_score_wins_and_equal_ones_tie(ours, theirs, value, why):
  got = verdicts.of_scores(ours, theirs)
  assert (got.value, got.why) == (value, why)


def judged_file(path, values):
  rows = [
    {"prompt": f"p{n}", "ours": "a", "theirs": "b", "verdict": value}
    for n, value in enumerate(values)
  ]
  judge_stub.write(path, rows)
  return rows


def test_judges_are_compared_on_the_pairs_that_both_judged(tmp_path):
  ours = judged_file(tmp_path / "a.jsonl", [1.0, 0.0, 0.5, None, 1.0])
  theirs = [1.0, 1.0, 0.5, 0.0, None, 1.0]
  judged_file(tmp_path / "b.jsonl", theirs)
  got = agreement.compare(ours, str(tmp_path / "b.jsonl"))
  assert (got["pairs"], got["decided"]) == (3, 2)
  assert got["agree"] == pytest.approx(2 / 3)
  assert got["agree_decided"] == 0.5
  # p_e of win, tie, loss: ⅓·⅔ + ⅓·⅓ + ⅓·0 = ⅓
  assert got["kappa"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([{"prompt": "x", "ours": "a", "theirs": "b", "verdict": 1}], "no pair in"),
    ([{"prompt": "p0", "completion": "a"}], "no field 'ours'"),
  ],
)
def test_another_judges_file_must_be_one_of_the_same_pairs(
  tmp_path, rows, message
):
  path = judge_stub.write(tmp_path / "b.jsonl", rows)
  ours = judged_file(tmp_path / "a.jsonl", [1.0])
  with pytest.raises(ValueError, match=message):
    agreement.compare(ours, path)


def test_the_wilson_interval_covers_as_often_as_it_says():
  """Exactly, by summing over the binomial: within 3 points of 95 %."""
  for n, p in itertools.product((50, 256), (0.3, 0.5, 0.617)):
    wins = np.arange(n + 1)
    ends = [intervals.wilson(k / n, n) for k in wins]
    inside = [low <= p <= high for low, high in ends]
    covered = stats.binom.pmf(wins, n, p)[inside].sum()
    assert covered == pytest.approx(0.95, abs=0.03)
