"""Probabilities of rankings (PAPER 4.4, no. 8; the optimum: test_optima)."""

import itertools

import numpy as np
import pytest

from tests.exact import algebra


@pytest.mark.parametrize("answers", [2, 3, 4, 5])
def test_the_probabilities_of_all_orders_sum_to_one(answers):
  policy, ref = algebra.random_logps(answers, seed=answers)
  orders = np.array(list(itertools.permutations(range(answers))))
  present = np.ones(orders.shape, bool)
  found = algebra.loss_of(
    "plackett_luce", policy[orders], ref[orders], beta=0.7, present=present
  )
  assert abs(np.exp(-found).sum() - 1) < 1e-12


def test_a_ranking_of_two_is_a_pair():
  policy, ref = algebra.random_logps(50, 2)
  found = algebra.loss_of(
    "plackett_luce", policy, ref, beta=0.7, present=np.ones((50, 2), bool)
  )
  want = algebra.loss_of("dpo", policy, ref, beta=0.7, label_smoothing=0.0)
  np.testing.assert_allclose(found, want, rtol=1e-12)


def test_a_ranking_costs_its_probability_under_the_implied_reward():
  """Eq. 18: the best is drawn ∝ e^r, then the next from those that are left."""
  policy, ref = algebra.random_logps(4)
  rewards = 0.7 * (policy - ref)
  want = -sum(rewards[k] - np.log(np.exp(rewards[k:]).sum()) for k in range(4))
  present = np.ones(4, bool)
  found = algebra.loss_of(
    "plackett_luce", policy, ref, beta=0.7, present=present
  )
  np.testing.assert_allclose(found, want, rtol=1e-12)
