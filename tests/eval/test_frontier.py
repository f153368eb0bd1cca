"""Means by prompt, distinct n-grams, and two estimates of one KL."""

import jax
import numpy as np
import pytest

from dpo_jax.config import load as load_lib
from dpo_jax.data.tokens import comparisons
from dpo_jax.eval import completions, frontier, generate, rewards
from dpo_jax.run import build, forward, trained
from tests import conftest, folders, worlds


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  sampled = (
    *("sample.prompts=toy", "sample.count=24", "sample.draws=8"),
    *("sample.max_new_tokens=8", "sample.batch_size=64"),
    *("sample.scorers=vader", "data.batch_size=64", "data.max_shapes=1"),
  )
  return load_lib.load_config(config, (*sampled, *overrides))


@pytest.fixture(scope="module")
def setup():
  return build.prepare_model(load())


@pytest.fixture(scope="module")
def trees(setup):
  """The parameters of a policy and of its reference."""
  initial = jax.device_get(trained.initial(setup))
  ref = worlds.noisy(initial, 1, 0.2)
  return jax.device_get((worlds.noisy(ref, 2, 0.02), ref))


@pytest.fixture(scope="module")
def measured(setup, trees):
  return frontier.measure(setup, *trees)


def test_the_mean_is_over_prompts_and_so_is_its_error():
  rows = [
    {"id": number, "x": value}
    for number, value in [(0, 1.0), (1, 7.0), (0, 3.0), (2, 0.0), (2, 1.0)]
  ]
  # Prompts have 2, 7 and ½; squares of their distances from 19/6 sum to
  # 49/36 + 529/36 + 256/36 = 834/36.
  got = frontier.mean(rows, "x")
  assert got["mean"] == pytest.approx(19 / 6)
  assert got["se"] == pytest.approx((834 / 36 / 2 / 3) ** 0.5)
  # Not the mean over rows.
  assert got["mean"] != pytest.approx(12 / 5)


def test_draws_of_a_single_prompt_have_no_standard_error():
  got = frontier.mean([{"id": 3, "x": 1.0}, {"id": 3, "x": 2.0}], "x")
  assert got["mean"] == 1.5
  assert np.isnan(got["se"])


@pytest.mark.parametrize(
  ("texts", "n", "want"),
  [
    ([[1, 2, 1], [1, 2]], 1, 2 / 5),
    ([[1, 2, 1], [1, 2]], 2, 2 / 3),  # none spans two texts
    ([[1, 2], [2, 1]], 2, 1),
    ([[1], []], 2, 0),
    ([[5, 5, 5, 5]], 2, 1 / 3),
  ],
)
def test_distinct_counts_ngrams_of_all_texts_together(texts, n, want):
  assert frontier.distinct(texts, n) == pytest.approx(want)


def test_the_reference_is_at_no_distance_from_itself(setup, trees):
  summary, rows = frontier.measure(setup, trees[1], trees[1])
  for name in ("kl", "log_ratio"):
    # Sums of eight f32 log-probs of order 5, computed twice.
    assert max(abs(row[name]) for row in rows) < 1e-5
    assert abs(summary["means"][name]["mean"]) < 1e-5


def test_the_kl_and_the_log_ratio_estimate_the_same(measured):
  """Of 192 samples; the KL is the log-ratio's expectation token by token."""
  summary, rows = measured
  means = summary["means"]
  gap = [{"id": row["id"], "x": row["log_ratio"] - row["kl"]} for row in rows]
  difference = frontier.mean(gap, "x")
  assert abs(difference["mean"]) < 4 * difference["se"]
  # Far enough apart that half of the KL would be told from it.
  assert means["kl"]["mean"] > 8 * difference["se"]
  assert means["log_ratio"]["mean"] > 4 * means["log_ratio"]["se"]
  # Of the two the KL has less variance, which is why it is reported.
  assert means["kl"]["se"] < means["log_ratio"]["se"]
  assert min(row["kl"] for row in rows) > 0
  assert min(row["log_ratio"] for row in rows) < 0


def test_a_sample_has_the_values_of_its_own_tokens(setup, trees, measured):
  """The same in the opposite order, so in other batches and rows."""
  _, rows = measured
  encode = setup.tokenizer.encode
  examples = [
    comparisons.Example(i, 0, encode([row["prompt"]])[0], (row["tokens"],), ())
    for i, row in enumerate(rows)
  ][::-1]
  loader = forward.loader_of(setup, examples)
  seen = 0
  for index, kl, ours, theirs in forward.token_kl(setup, *trees, loader):
    row = rows[examples[index].example_id]
    # f32 log-probs, in batches of another packing.
    np.testing.assert_allclose(row["kl"], kl.sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      row["log_ratio"], ours.sum() - theirs.sum(), atol=1e-4
    )
    seen += 1
  assert seen == len(rows) == 192


def test_the_summary_is_that_of_the_rows(setup, trees, measured):
  summary, rows = measured
  assert summary["samples"] == len(rows) == 192
  assert set(summary["means"]) == {"reward/vader", "kl", "log_ratio", "length"}
  for name, value in summary["means"].items():
    assert value == frontier.mean(rows, name)
  assert summary["finished"] == np.mean([row["finished"] for row in rows])
  eos = setup.tokenizer.eos_id
  texts = [[i for i in row["tokens"] if i != eos] for row in rows]
  assert sum(map(len, texts)) < sum(row["length"] for row in rows)
  assert 0 < summary["distinct_1"] < summary["distinct_2"] < 1
  for n in (1, 2):
    assert summary[f"distinct_{n}"] == frontier.distinct(texts, n)


@pytest.mark.parametrize("override", ["temperature=0.7", "top_p=0.9"])
def test_samples_that_are_not_of_the_policy_itself_have_no_kl(
  setup, trees, override
):
  draw = setup.programs.sample

  def as_compiled(*args, **options):
    return draw(*args, **{**options, "temperature": 1.0, "top_p": 1.0})

  programs = setup.programs._replace(sample=as_compiled)
  here = folders.asking(setup, load(f"sample.{override}"))
  summary, rows = frontier.measure(here._replace(programs=programs), *trees)
  assert set(summary["means"]) == {"reward/vader", "length"}
  assert not any("kl" in row for row in rows)


def test_a_scorer_sees_the_prompts_before_anything_is_drawn(
  setup, trees, monkeypatch
):
  def make(_):
    def check(prompts):
      assert prompts == [text for text, _ in generate.prompts(setup)]
      raise ValueError("too long")

    def score(prompts, completions):
      raise AssertionError

    score.check = check
    return score

  def draw(*_, **__):
    raise AssertionError

  monkeypatch.setitem(rewards.SCORERS, "short", make)
  here = folders.asking(setup, load("sample.scorers=short:2"))
  programs = here.programs._replace(sample=draw)
  with pytest.raises(ValueError, match="too long"):
    frontier.measure(here._replace(programs=programs), *trees)


def test_the_rows_are_the_draws_of_the_policy(setup, trees, measured):
  _, rows = measured
  given = generate.prompts(setup)
  drawn = [d for batch in generate.draws(setup, trees[0], given) for d in batch]
  scorers = [rewards.load("vader")]
  described = completions.describe(drawn, scorers, 8, None)
  for row, want in zip(rows, described, strict=True):
    assert row == {**want, "kl": row["kl"], "log_ratio": row["log_ratio"]}
