"""Gain and bias of reward models."""

import json

import numpy as np
import pytest

from dpo_jax.run import gain

GROUPS = [[1.0, 3.0], [10.0], [-2.0, 0.0, 2.0]]
ASKED = {"reward": {"centred": True}}


def test_every_prompt_counts_once_however_many_completions_it_has():
  found = gain.of_scores(GROUPS, unit=False)
  assert found["gain"] == 1
  assert found["bias"] == -(2 + 10 + 0) / 3
  assert (found["prompts"], found["completions"]) == (3, 6)
  std = np.std([2, 10, 0], ddof=1)
  np.testing.assert_allclose(found["se"], std / 3**0.5)
  np.testing.assert_allclose(found["prompts_std"], std)
  assert found["furthest"] == 10 - 4
  alone = gain.of_scores([[2.0, 3.0]], unit=False)
  assert (alone["prompts_std"], alone["furthest"]) == (None, 0)


def test_behind_gain_and_bias_the_mean_is_zero_and_the_spread_one():
  found = gain.of_scores(GROUPS, unit=True)
  moved = [
    [found["gain"] * r + found["bias"] for r in group] for group in GROUPS
  ]
  again = gain.of_scores(moved, unit=True)
  np.testing.assert_allclose(
    [again["mean"], again["std"], again["gain"], again["bias"]],
    [0, 1, 1, 0],
    atol=1e-12,
  )


def test_the_spread_of_prompts_is_what_their_draws_do_not_explain():
  rng = np.random.default_rng(0)
  for own in (0.0, 2.0):
    means = own * rng.normal(size=2000)
    groups = [(m + rng.normal(size=4)).tolist() for m in means]
    # Of 2,000 prompts with an error of ½ each: 0.1 if there is nothing.
    assert abs(gain.of_scores(groups, unit=False)["spread"] - own) < 0.15
  assert gain.of_scores([[1.0], [2.0]], unit=False)["spread"] is None


def test_fresh_completions_of_the_reference_have_mean_zero_within_the_error():
  rng = np.random.default_rng(1)

  def drawn(prompts):
    means = 3 + rng.normal(size=prompts)
    return [(m + rng.normal(size=4)).tolist() for m in means]

  inside = 0
  for _ in range(200):
    found, fresh = (gain.of_scores(drawn(100), unit=False) for _ in "ab")
    moved = fresh["mean"] + found["bias"]
    inside += abs(moved) < 1.96 * np.hypot(found["se"], fresh["se"])
  # 95 % of 200, and three standard errors.
  assert 0.9 < inside / 200 < 1


@pytest.mark.parametrize(
  ("groups", "unit", "said"),
  [
    ([[1.0, float("nan")]], False, "are not finite"),
    ([[2.0, 2.0], [2.0]], True, r"reward\.unit = True: all completions .* 2,"),
  ],
)
def test_rewards_that_cannot_be_moved_are_refused(groups, unit, said):
  with pytest.raises(ValueError, match=said):
    gain.of_scores(groups, unit)


def test_gain_and_bias_of_another_step_are_not_taken(tmp_path):
  path = tmp_path / gain.FILE
  with pytest.raises(ValueError, match="not trained to its end"):
    gain.read(tmp_path, ASKED, 3)
  path.write_text(json.dumps({"step": 2, "gain": 2.0, "bias": 1.0}))
  with pytest.raises(ValueError, match="of step 3 are not there"):
    gain.read(tmp_path, ASKED, 3)
  assert gain.read(tmp_path, ASKED, 2) == (2.0, 1.0)
  assert gain.read(tmp_path, {"reward": {"centred": False}}, 3) == (1.0, 0.0)
