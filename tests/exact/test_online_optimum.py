"""Online DPO in worlds that can be listed reaches DPO's optimum."""

import jax
import numpy as np
import pytest

from dpo_jax.data.read import pairs
from tests.exact import on_policy
from tests.exact import world as world_lib


@pytest.mark.slow
@pytest.mark.parametrize(
  ("overrides", "within"),
  [
    # 16 answers and 150 steps of one noisy label a pair: .04 to .06 seen.
    (("train.steps=150",), 0.1),
    # Three times the pairs, four times the steps: .007 and .011 seen.
    (("train.steps=600", "rollout.draws=48", "rollout.seed=1"), 0.03),
  ],
)
def test_training_on_draws_reaches_the_exact_optimum(
  overrides, within, monkeypatch, tmp_path
):
  on_policy.in_the_language(monkeypatch)
  config = on_policy.config_of(tmp_path, "", *overrides)
  before, after = on_policy.distances(config, tmp_path)
  assert before.min() > 0.3
  assert after.max() < within


@pytest.mark.slow
def test_labels_that_are_swapped_lead_away_from_it(monkeypatch, tmp_path):
  right = pairs.judged

  def swapped(*args, **options):
    return [
      each._replace(winner=each.loser, loser=each.winner)
      for each in right(*args, **options)
    ]

  on_policy.in_the_language(monkeypatch)
  monkeypatch.setattr(pairs, "judged", swapped)
  config = on_policy.config_of(tmp_path, "", "train.steps=50")
  before, after = on_policy.distances(config, tmp_path)
  assert (after > before).all()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_whoever_draws_the_optimum_is_the_same(beta):
  """So that a policy may go on drawing while it moves."""
  world = world_lib.make()
  want = world_lib.optimum(world, beta)
  for drawer in (world.ref, want, (world.ref + want) / 2):
    wins = world_lib.comparisons(world_lib.normalised(drawer), world.reward)
    moved = world._replace(wins=wins)
    fields = {"beta": beta, "label_smoothing": 0.0}
    policy, _ = world_lib.learn("dpo", moved, **fields)
    # f64, of pairs as rare as e^-40 at β = 0.1.
    assert world_lib.total_variation(policy, want).max() < 1e-6


def test_a_policys_own_implicit_reward_teaches_it_nothing():
  """Why rollout.scorer is no reward of the policy that is trained."""
  world, beta = world_lib.make(), 0.5
  rng = np.random.default_rng(1)
  policy = world_lib.normalised(world.ref + rng.normal(size=world.ref.shape))
  own = world_lib.comparisons(policy, beta * (policy - world.ref))
  taught = world_lib.comparisons(policy, world.reward)
  sizes = {}
  for name, wins in (("own", own), ("taught", taught)):
    fields = {"beta": beta, "label_smoothing": 0.0}
    f, data = world_lib.objective("dpo", world._replace(wins=wins), **fields)
    slope = world_lib.compute(
      lambda z, *data, f=f: jax.vmap(jax.grad(f))(z, *data), policy, *data
    )
    sizes[name] = np.abs(slope).max()
  assert sizes["own"] < 1e-12  # f64
  assert sizes["taught"] > 1e-2
