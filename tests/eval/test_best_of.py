"""Best-of-N from one set of draws: its weights, its KL, its tables."""

import itertools
import math

import numpy as np
import pytest

from dpo_jax.eval import best_of
from tests.exact import world as world_lib


def brute_force(scores, values, n):
  """Mean value of the best of every subset; of several best, their mean."""
  out = []
  for subset in itertools.combinations(range(len(scores)), n):
    best = max(scores[i] for i in subset)
    out.append(np.mean([values[i] for i in subset if scores[i] == best]))
  return np.mean(out)


@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
@pytest.mark.parametrize("n", range(1, 9))
def test_the_weights_average_over_all_subsets(n, levels):
  rng = np.random.default_rng([n, levels])
  scores = rng.integers(0, levels, 8).astype(float)
  values = rng.normal(size=8)
  weights = best_of.weights(scores, n)
  # Sums of eight f64 values of order 1.
  assert weights.sum() == pytest.approx(1, abs=1e-14)
  want = brute_force(scores, values, n)
  assert weights @ values == pytest.approx(want, abs=1e-12)


def test_the_weights_are_the_binomials_of_the_formula():
  """Whole numbers of any size, so without error."""
  scores, n = np.arange(300.0), 128
  want = [math.comb(j, n - 1) / math.comb(300, n) for j in range(300)]
  # Products of 300 factors, each of one rounding.
  np.testing.assert_allclose(best_of.weights(scores, n), want, rtol=1e-13)


@pytest.mark.parametrize("draws", [1, 5, 20_000])
def test_one_of_n_is_the_mean_and_all_of_n_the_maximum(draws):
  scores = np.random.default_rng(0).normal(size=draws)
  np.testing.assert_allclose(best_of.weights(scores, 1), 1 / draws, rtol=1e-11)
  chosen = best_of.weights(scores, draws)
  assert chosen[scores.argmax()] == 1
  assert np.count_nonzero(chosen) == 1
  some = best_of.weights(scores, max(1, draws // 3))
  assert some.sum() == pytest.approx(1, abs=1e-12)


def test_the_order_of_the_draws_does_not_matter():
  rng = np.random.default_rng(1)
  scores, order = rng.integers(0, 9, 40), rng.permutation(40)
  moved = best_of.weights(scores[order], 7)
  np.testing.assert_array_equal(moved, best_of.weights(scores, 7)[order])


def exact(ref, score, n):
  """log π_N f64[K] of the best of n: every answer, by its cdf.

  Equally ranked answers share by their π, as draws of them do.
  """
  p = np.exp(ref)
  up = np.array([p[score <= s].sum() for s in score])
  alike = np.array([p[score == s].sum() for s in score])
  with np.errstate(divide="ignore"):
    return ref + np.log((up**n - (up - alike) ** n) / alike)


@pytest.fixture(scope="module")
def world():
  return world_lib.make(prompts=1, answers=12, seed=3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_best_of_n_of_a_world_keeps_within_the_bound(n, tied, world):
  ref, score = world.ref[0], world.reward[0]
  score = score.round() if tied else score
  logps = exact(ref, score, n)
  assert np.exp(logps).sum() == pytest.approx(1, abs=1e-12)
  distance = world_lib.kl(logps, ref)
  assert distance <= best_of.bound(n) + 1e-12
  if n == 1:
    assert distance == pytest.approx(0, abs=1e-12)
    assert best_of.bound(1) == 0
  else:  # twelve answers are far from continuous
    assert distance < 0.9 * best_of.bound(n)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_draws_of_a_world_tell_its_reward_and_its_kl(n, tied, world):
  """One scorer ranks, another measures: 2,000 prompts alike, of 64 draws."""
  rng = np.random.default_rng(n)
  ref, truth = world.ref[0], world.reward[0]
  score = truth + rng.normal(size=len(truth))
  score = score.round() if tied else score
  logps = exact(ref, score, n)
  drawn = rng.choice(len(ref), (2000, 64), p=np.exp(ref))
  got = [best_of.weights(score[d], n) @ truth[d] for d in drawn]
  se = np.std(got) / 2000**0.5
  want = np.exp(logps) @ truth
  # Unbiased, ties and duplicates included: three errors either way.
  assert abs(np.mean(got) - want) < 3 * se
  if n > 1:
    assert abs(np.mean(got) - np.exp(ref) @ truth) > 3 * se
  # The KL is a plug-in of the cdf: consistent, of many draws exact.
  many = rng.choice(len(ref), 200_000, p=np.exp(ref))
  want = world_lib.kl(logps, ref)
  assert best_of.kl(score[many], n) == pytest.approx(want, abs=0.01)
  assert best_of.kl(score[drawn[0]], n) <= best_of.bound(n) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 17, 128])
def test_without_ties_the_kl_is_the_bound(n):
  scores = np.random.default_rng(0).normal(size=128)
  # A telescoping sum of 128 terms of order 1.
  assert best_of.kl(scores, n) == pytest.approx(best_of.bound(n), abs=1e-12)
  assert best_of.kl(np.zeros(128), n) == pytest.approx(0, abs=1e-14)


def samples(prompts=40, draws=16, seed=0, **more):
  rng = np.random.default_rng(seed)
  for number in range(prompts):
    level = rng.normal()
    for _ in range(draws):
      truth = level + rng.normal()
      yield {
        "id": number,
        "reward/truth": truth,
        "reward/learned": truth + rng.normal(),
        "length": int(rng.integers(1, 9)),
        **{name: rng.normal() for name in more},
      }


def test_the_reward_rises_with_n_when_what_ranks_is_what_measures():
  counts = (1, 2, 4, 8, 16)
  rows = list(samples())
  of_truth = {}
  for key in ("reward/truth", "reward/learned"):
    result = best_of.measure(rows, counts, key)
    means = [item["means"] for item in result["best_of"]]
    assert [item["n"] for item in result["best_of"]] == list(counts)
    own = [m[key]["mean"] for m in means]
    assert (np.diff(own) > 0).all()
    of_truth[key] = [m["reward/truth"]["mean"] for m in means]
    assert (result["prompts"], result["draws"]) == (40, 16)
  truth, learned = of_truth.values()
  everything = [row["reward/truth"] for row in rows]
  assert truth[0] == pytest.approx(np.mean(everything), abs=1e-12)
  assert learned[0] == truth[0]
  highest = [max(everything[i : i + 16]) for i in range(0, 640, 16)]
  assert truth[-1] == pytest.approx(np.mean(highest), abs=1e-12)
  # A ranking that is half noise finds less of it.
  assert all(a > b for a, b in zip(truth[1:], learned[1:], strict=True))


def test_errors_are_over_prompts():
  rows = list(samples(prompts=9, draws=3))
  (item,) = best_of.measure(rows, (3,), "reward/learned")["best_of"]
  chosen = [
    max(rows[i : i + 3], key=lambda row: row["reward/learned"])
    for i in range(0, 27, 3)
  ]
  for name in ("reward/truth", "reward/learned", "length"):
    values = [row[name] for row in chosen]
    assert item["means"][name] == pytest.approx(
      {"mean": np.mean(values), "se": np.std(values, ddof=1) / 3}
    )
  one = best_of.measure(rows[:3], (2,), "reward/truth")["best_of"][0]
  assert math.isnan(one["means"]["reward/truth"]["se"])


def test_from_another_reference_the_log_ratio_of_the_chosen_is_added():
  rows = list(samples(log_ratio=True))
  alone = [{k: v for k, v in r.items() if k != "log_ratio"} for r in rows]
  with_it, without = (
    best_of.measure(r, (1, 4), "reward/truth") for r in (rows, alone)
  )
  for item, plain in zip(with_it["best_of"], without["best_of"], strict=True):
    away = item["means"].pop("kl_from_reference")
    assert item == plain
    shares = [
      best_of.weights([r["reward/truth"] for r in rows[i : i + 16]], item["n"])
      for i in range(0, 640, 16)
    ]
    ratios = np.reshape([r["log_ratio"] for r in rows], (40, 16))
    want = np.mean(np.sum(np.asarray(shares) * ratios, axis=1))
    assert away["mean"] - item["bound"] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_named(value):
  rows = list(samples(prompts=2, draws=3))
  rows[4]["reward/learned"] = value
  with pytest.raises(ValueError, match=r"reward/learned of 1 of 6 draws"):
    best_of.measure(rows, (2,), "reward/truth")


def test_the_table_has_a_line_an_n_with_errors_and_the_bound():
  result = best_of.measure(list(samples()), (1, 16), "reward/learned")
  head, names, *lines = best_of.table(result).splitlines()
  assert head == "best of N of 16 draws of 40 prompts, ranked by learned:"
  titles = ["N", "truth", "learned", "length", "KL ≤", "KL by ties"]
  assert names.split() == " ".join(titles).split()
  assert [line.split()[0] for line in lines] == ["1", "16"]
  assert len({len(line) for line in (names, *lines)}) == 1
  means = result["best_of"][1]["means"]["reward/truth"]
  assert f"{means['mean']:.3f} ± {means['se']:.3f}" in lines[1]
  assert f"{best_of.bound(16):.3f}" in lines[1]
