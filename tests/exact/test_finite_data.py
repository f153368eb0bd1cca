"""Finitely many comparisons: what is certain of them (PAPER 4.4, nos. 6, 9)."""

import functools

import numpy as np
import scipy.sparse
import scipy.stats

from tests.exact import world as world_lib

BETA = 0.5
REPEATS = 400
WORLD = world_lib.make(prompts=1)


def drawn(count, repeats, seed):
  """A World whose prompts are repeats of one data set of `count` pairs."""
  rng = np.random.default_rng(seed)
  counts = rng.multinomial(count, WORLD.wins[0].ravel(), repeats)
  world, _ = world_lib.tile(WORLD, np.zeros(repeats))
  return world._replace(wins=counts.reshape(world.wins.shape).astype(float))


def implied(policy, world):
  """The reward that a policy implies, β Δ, to mean 0."""
  reward = BETA * (policy - world.ref)
  return reward - reward.mean(-1, keepdims=True)


@functools.cache
def fitted(count):
  """(error of the implied reward f64[400, K], KL(π ‖ π*) f64[400])."""
  world = drawn(count, REPEATS, seed=count)
  # Divided by their number so that a rounding of the loss is one of a mean.
  world = world._replace(wins=world.wins / count)
  policy, _ = world_lib.learn("dpo", world, beta=BETA, label_smoothing=0.0)
  true = WORLD.reward - WORLD.reward.mean()
  best = world_lib.optimum(WORLD, BETA)
  return implied(policy, world) - true, world_lib.kl(policy, best)


def test_the_error_of_the_reward_is_chi_squared_with_k_minus_1_degrees():
  """T = (r̂ − r*)ᵀ H (r̂ − r*) with the Fisher information H of N pairs."""
  count = 100_000
  error, _ = fitted(count)
  p = world_lib.beats(WORLD.reward[0])
  pairs = count * WORLD.wins[0] * (1 - p)  # N W P (1 − P) of both orders
  information = np.diag(pairs.sum(1)) - pairs
  statistic = np.einsum("ri,ij,rj->r", error, information, error)
  # The mean of 400 draws of χ²_7 has the standard error (14 / 400)^½ = 0.19.
  assert abs(statistic.mean() - 7.0) < 0.6
  # That of a share of 0.95 is 0.011; PAPER allows 0.03.
  inside = np.mean(statistic < scipy.stats.chi2.ppf(0.95, 7))
  assert 0.92 <= inside <= 0.98


def test_the_error_falls_as_the_root_of_the_number_of_pairs():
  counts = np.array([1_000, 10_000, 100_000, 1_000_000])
  fits = [fitted(int(count)) for count in counts]
  worst = [np.median(np.abs(error).max(-1)) for error, _ in fits]
  divergence = [np.median(kl) for _, kl in fits]

  def slope(values):
    return np.polyfit(np.log(counts), np.log(values), 1)[0]

  # Medians of 400; at 1,000 pairs the asymptotics are not yet exact.
  assert abs(slope(worst) + 0.5) < 0.075
  assert abs(slope(divergence) + 1.0) < 0.15


def connected(wins):
  """Whether every answer beats every other, directly or through others."""
  parts, _ = scipy.sparse.csgraph.connected_components(
    wins > 0, connection="strong"
  )
  return parts == 1


def least_losses(world):
  """(DPO's policy and loss, a reward model's rewards and loss)."""
  dpo = world_lib.learn("dpo", world, beta=BETA, label_smoothing=0.0)
  rm = world_lib.learn(
    "bradley_terry", world, label_smoothing=0.0, centring=0.0
  )
  return *dpo, *rm


def test_dpo_equals_the_best_reward_model_and_its_optimum():
  """Theorem 1, on data in which every answer has won and lost."""
  world = drawn(300, 4, seed=5)
  world = world._replace(wins=world.wins / 300)
  assert all(connected(wins) for wins in world.wins)
  policy, loss, reward, reward_loss = least_losses(world)
  np.testing.assert_allclose(loss, reward_loss, rtol=0, atol=1e-8)
  two_stages = world_lib.normalised(world.ref + reward / BETA)
  assert np.abs(policy - two_stages).max() < 1e-6


def test_an_answer_that_never_lost_leaves_the_losses_equal_and_no_optimum():
  world = drawn(300, 4, seed=5)
  wins = world.wins / 300
  best = int(WORLD.reward.argmax())
  wins[:, :, best] = 0.0
  world = world._replace(wins=wins)
  assert not any(connected(each) for each in world.wins)
  policy, loss, _, reward_loss = least_losses(world)
  np.testing.assert_allclose(loss, reward_loss, rtol=0, atol=1e-8)
  # It runs off: an odds ratio of e^20 and more to every other answer.
  h = BETA * (policy - world.ref)
  others = np.delete(h, best, axis=1)
  assert np.all(h[:, [best]] - others > 20)


def test_the_smallest_data_of_the_slopes_all_have_an_optimum():
  """Else their medians would be of runaways."""
  world = drawn(1_000, REPEATS, seed=1_000)
  assert all(connected(wins) for wins in world.wins)
