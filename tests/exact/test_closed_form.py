"""The DPO loss against π* = π_ref e^(r/β) / Z (PAPER 4.4, nos. 1 to 5, 7
and 10)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from dpo_jax.ops import losses
from tests.exact import checks, solver
from tests.exact import world as world_lib

CHECKS = (
  checks.closed_form,
  checks.implicit_reward,
  checks.loss_floor,
  checks.gradient_identity,
  checks.reference_shared,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds_in_the_exact_world(check):
  check()


def test_lbfgs_finds_the_closed_form():
  world, beta = world_lib.tile(checks.WORLD, world_lib.BETAS)
  f, data = world_lib.objective("dpo", world, beta=beta, label_smoothing=0.0)

  def total(z):
    # Scaled so that all β ask for steps of like size.
    each = jax.vmap(f)(z.reshape(world.ref.shape) / beta[:, None], *data)
    return jnp.sum(each)

  with jax.enable_x64(True):
    slope = jax.jit(jax.value_and_grad(total))
    found = scipy.optimize.minimize(
      lambda z: tuple(map(np.asarray, slope(z))),
      (world.ref * beta[:, None]).ravel(),
      jac=True,
      method="L-BFGS-B",
      options={"maxiter": 3000, "ftol": 0.0, "gtol": 1e-10, "maxcor": 50},
    )
  policy = world_lib.normalised(
    found.x.reshape(world.ref.shape) / beta[:, None]
  )
  want = world_lib.optimum(world, beta[:, None])
  assert np.abs(policy - want).max() < 1e-4
  assert world_lib.total_variation(policy, want).max() < 1e-5
  assert world_lib.kl(policy, want).max() < 1e-8


def test_adam_in_f32_finds_the_closed_form():
  world, beta = world_lib.tile(checks.WORLD, world_lib.BETAS)
  rate = 0.05 / np.minimum(beta, 1.0)
  f, data = world_lib.objective("dpo", world, beta=beta, label_smoothing=0.0)
  data = jax.tree.map(jnp.float32, data)
  steps, tx = 3000, optax.scale_by_adam()

  def step(carry, i):
    z, state = carry
    gradient = jax.vmap(jax.grad(f))(z, *data)
    updates, state = tx.update(gradient, state)
    decay = jnp.minimum(1.0, 2 * (1 - i / steps))  # over the last half
    return (z - decay * rate[:, None] * updates, state), None

  @jax.jit
  def train(z):
    start = z, tx.init(z)
    return jax.lax.scan(step, start, jnp.arange(steps))[0][0]

  z = train(jnp.float32(world.ref))
  assert z.dtype == jnp.float32
  policy = world_lib.normalised(np.asarray(z, float))
  want = world_lib.optimum(world, beta[:, None])
  assert np.abs(policy - want).max() < 1e-3
  assert world_lib.total_variation(policy, want).max() < 1e-5
  assert world_lib.kl(policy, want).max() < 1e-8


def test_rewards_that_differ_by_a_function_of_the_prompt_give_one_policy():
  """Lemmas 1 and 2: f(x) cancels in the labels and in the optimum."""
  world = checks.WORLD
  shift = np.random.default_rng(2).normal(scale=3, size=(len(world.ref), 1))
  reward = world.reward + shift
  moved = world._replace(
    reward=reward, wins=world_lib.comparisons(world.ref, reward)
  )
  _, _, policy, _ = checks.learned(world)
  _, _, other, _ = checks.learned(moved)
  # Two of Newton's solutions, each at rounding.
  assert np.abs(policy - other).max() < 1e-10


def value_of(world, policy, beta):
  """E_π r − β KL(π ‖ π_ref), f64[X]: the objective of RLHF, Eq. 3."""
  reward = np.sum(np.exp(policy) * world.reward, axis=-1)
  return reward - beta * world_lib.kl(policy, world.ref)


@pytest.mark.parametrize("beta", world_lib.BETAS)
def test_regret_is_beta_times_the_kl_to_the_optimum(beta):
  """β log Z − (E_π r − β KL(π ‖ π_ref)) = β KL(π ‖ π*), of any π."""
  world = checks.WORLD
  want = world_lib.optimum(world, beta)
  best = beta * world_lib.log_partition(world, beta)
  rng = np.random.default_rng(3)
  for _ in range(20):
    z = 3 * rng.normal(size=world.ref.shape)
    policy = world_lib.normalised(z)
    regret = best - value_of(world, policy, beta)
    divergence = beta * world_lib.kl(policy, want)
    # Sums of a few terms of order 10 in f64.
    assert np.abs(regret - divergence).max() < 1e-12


def test_exact_gradient_ascent_on_the_reward_reaches_the_same_policy():
  """The limit of PPO on the true reward. Not compared in log π: where π is
  e^-40 the policy gradient has vanished long before."""
  world, beta = world_lib.tile(checks.WORLD, world_lib.BETAS)

  def regret(z, ref, reward, beta):
    policy = jax.nn.log_softmax(z)
    return jnp.sum(jnp.exp(policy) * (beta * (policy - ref) - reward))

  data = world.ref, world.reward, beta
  z, least = solver.minimise(regret, world.ref, *data, steps=200)
  want = world_lib.optimum(world, beta[:, None])
  policy = world_lib.normalised(z)
  assert world_lib.total_variation(policy, want).max() < 1e-8
  best = beta * world_lib.log_partition(world, beta[:, None])
  # What is left is β KL(π ‖ π*), of policies that near; where the gradient has
  # vanished, rounding decides after which step the search ends.
  assert np.abs(least + best).max() < 1e-9


def test_along_the_frontier_reward_rises_by_beta_for_each_nat():
  """dE[r]/dKL = β and dE[r]/d(1/β) = Var r, of policies learned with DPO."""
  middle = np.array([0.2, 0.5, 1.0, 2.0, 5.0])  # below, Var r underflows
  step = 1e-3
  betas = np.concatenate([middle * (1 - step), middle, middle * (1 + step)])
  world, _, policy, _ = checks.learned(betas=betas)
  probs = np.exp(policy)
  reward = np.sum(probs * world.reward, axis=-1)
  spread = np.sum(probs * world.reward**2, axis=-1) - reward**2
  divergence = world_lib.kl(policy, world.ref)
  shape = 3, len(middle), -1
  reward, divergence, spread = (
    x.reshape(shape) for x in (reward, divergence, spread)
  )
  assert spread.min() > 1e-4
  rise = (reward[2] - reward[0]) / (divergence[2] - divergence[0])
  # Central differences of relative step 1e-3 err by about its square.
  np.testing.assert_allclose(
    rise, np.broadcast_to(middle[:, None], rise.shape), rtol=1e-4
  )
  inverse = 1 / (middle * (1 + step)) - 1 / (middle * (1 - step))
  slope = (reward[2] - reward[0]) / inverse[:, None]
  np.testing.assert_allclose(slope, spread[1], rtol=1e-4)
  assert np.all(np.diff(reward[1], axis=0) < 0)
  assert np.all(np.diff(divergence[1], axis=0) < 0)


def test_certain_labels_leave_no_finite_optimum_whatever_beta_is():
  """Two answers, one of which always wins: DPO never stops."""
  beta = np.array(world_lib.BETAS)
  dpo = losses.LOSSES["dpo"].fn

  def slope(h, beta):
    def loss(h):
      pair = jnp.stack([h, jnp.zeros_like(h)])
      fields = {"beta": beta, "label_smoothing": 0.0}
      return dpo(pair, jnp.zeros(2), **fields)["loss"]

    return jax.grad(loss)(h)

  for margin in (0.0, 1.0, 10.0, 100.0, 700.0):  # e^-700 is not yet 0
    found = world_lib.compute(jax.vmap(slope), margin / beta, beta)
    assert np.all(found < 0)


def certain():
  """(World of two answers of which the first always wins, β by prompt)."""
  one = world_lib.World(
    ref=np.log(np.full((1, 2), 0.5)),
    reward=np.zeros((1, 2)),
    wins=np.array([[[0.0, 1.0], [0.0, 0.0]]]),
    lengths=np.ones((1, 2)),
  )
  return world_lib.tile(one, world_lib.BETAS)


def test_certain_labels_move_ipo_to_its_target_and_no_further():
  world, beta = certain()
  policy, _ = world_lib.learn("ipo", world, beta=beta, dialect="original")
  # log σ(1 / (2τ)); of IPO's own rounding 1e-10 is far away.
  want = -np.log1p(np.exp(-1 / (2 * beta)))
  assert np.abs(policy[:, 0] - want).max() < 1e-10


def test_certain_labels_move_smoothed_dpo_to_the_odds_of_a_flip():
  world, beta = certain()
  policy, _ = world_lib.learn("dpo", world, beta=beta, label_smoothing=0.1)
  h = beta * (policy[:, 0] - policy[:, 1])
  assert np.abs(h - np.log(0.9 / 0.1)).max() < 1e-10
