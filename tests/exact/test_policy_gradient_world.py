"""Policy gradients against exact expectations (PAPER 4.4, no. 4 and 12)."""

import functools

import numpy as np
import pytest

from tests.exact import policy_gradient_checks as checks
from tests.exact import policy_gradients
from tests.exact import world as world_lib

slow = pytest.mark.slow
# What another check proves too, in other words.
SLOW = (checks.grpo, checks.ppo_of_any_critic)


@pytest.mark.parametrize(
  "check",
  [
    pytest.param(c, id=c.__name__, marks=slow if c in SLOW else ())
    for c in checks.CHECKS
  ],
)
def test_holds_of_policy_gradients(check):
  check()


@pytest.mark.parametrize(
  ("name", "draws"),
  [
    ("rloo", 4),
    pytest.param("grpo", 4, marks=slow),
    pytest.param("reinforce", 1, marks=slow),
  ],
)
def test_on_samples_the_gradient_is_the_exact_one(name, draws):
  # 4 SE in eight directions: 5 in 10,000 of such tests would fail by chance.
  assert checks.policy_gradient_on_samples(name, draws) < 4


@functools.cache
def trained(name, **changes):
  """(log π f64[X, Y], metrics) of an estimator after 400 exact steps."""
  groups = 2 if name in ("rloo", "grpo") else None
  c = policy_gradients.config(name, **changes)
  options = {"steps": 400, "rate": 1e-2, "exact": name == "ppo"}
  return policy_gradients.train(c, groups, **options)


@pytest.mark.parametrize(
  "name",
  [
    "ppo",
    pytest.param("rloo", marks=slow),
    pytest.param("grpo", marks=slow),
    pytest.param("reinforce", marks=slow),
  ],
)
def test_training_reaches_the_optimum_of_the_rlhf_objective(name):
  """π_ref e^(r/β) / Z, by the run's own step on the exact expectation."""
  policy, metrics = trained(name)
  want = policy_gradients.optimum()
  ref = policy_gradients.log_ref()
  assert world_lib.total_variation(ref, want).min() > 0.1
  assert world_lib.total_variation(policy, want).max() < 1e-3
  # A step an iteration: the policy that is trained is the one that drew.
  assert float(metrics["policy/clipfrac"]) == 0
  assert float(metrics["policy/approx_kl"]) < 1e-10
  kl = world_lib.kl(policy, ref).mean()
  np.testing.assert_allclose(float(metrics["objective/kl"]), kl, rtol=1e-3)


def test_regret_of_a_policy_that_ppo_trained_is_its_kl_to_the_optimum():
  """β log Z − (E r − β KL(π ‖ π_ref)) = β KL(π ‖ π*), on the way as well."""
  beta, ref = policy_gradients.BETA, policy_gradients.log_ref()
  world = world_lib.World(ref, policy_gradients.REWARDS, None, None)
  best = beta * world_lib.log_partition(world, beta)
  want = world_lib.optimum(world, beta)
  start = policy_gradients.answer_logps(policy_gradients.policy())
  for policy in (start, trained("ppo")[0]):
    policy = world_lib.normalised(policy)
    value = np.sum(np.exp(policy) * world.reward, axis=-1)
    value -= beta * world_lib.kl(policy, ref)
    regret = best - value
    # Sums of a few terms of order 1 in f64.
    np.testing.assert_allclose(
      regret, beta * world_lib.kl(policy, want), atol=1e-12
    )
  assert regret.max() < 1e-4


def test_the_adaptive_coefficient_of_reinforce_holds_its_target():
  """And the policy is the optimum of the coefficient that it ends at."""
  target = 0.25  # nats; at β = 0.5 the optimum has 0.6
  policy, metrics = held(target)
  kl = world_lib.kl(policy, policy_gradients.log_ref()).mean()
  assert abs(kl / target - 1) < 0.1
  coefficient = float(metrics["objective/kl_coefficient"])
  assert coefficient > 1.2 * policy_gradients.BETA
  want = policy_gradients.optimum(coefficient)
  assert world_lib.total_variation(policy, want).max() < 5e-3


def held(target):
  c = policy_gradients.config("reinforce", kl_target=target, kl_horizon=20)
  return policy_gradients.train(c, None, steps=600, rate=1e-2)
