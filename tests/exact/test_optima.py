"""The population optimum of every loss, where theory has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import losses
from dpo_jax.ops.losses import divergences
from tests.exact import optima, solver
from tests.exact import world as world_lib


def name_of(case):
  return case.split("/")[0].split(" under ")[0]


def solve(name):
  """(learned, theory) of a case, f64[X, K]."""
  case = optima.CASES[name]
  world = world_lib.make(**case.world)
  loss = losses.LOSSES[name_of(name)]
  if case.divergence:
    fn = divergences.under(case.divergence, loss.fn)
    loss = loss._replace(function=fn)
  options = {"free": case.free, "loss": loss, **case.fields}
  if case.kept:
    options["kept"] = case.kept(world, case.fields)
  want = case.policy(world, case.fields)
  if case.kinked:
    f, data = world_lib.objective(name_of(name), world, **options)
    margin = solver.search(f, *data)
    logits = np.stack([margin, 0 * margin], axis=-1)
    return world_lib.normalised(logits), want
  found, _ = world_lib.learn(name_of(name), world, **options)
  if loss.of_rewards:
    found = found - found.mean(-1, keepdims=True)
  return found, want


@pytest.mark.parametrize("case", optima.CASES)
def test_population_optimum(case):
  found, want = solve(case)
  # Newton's method ends at rounding (1e-14 seen, of values up to 11); a search
  # by values alone cannot tell apart what differs by the root of it.
  tolerance = 1e-6 if optima.CASES[case].kinked else 1e-10
  assert np.abs(found - want).max() < tolerance


@pytest.mark.parametrize("name", optima.BOUNDARY)
def test_no_finite_optimum(name):
  """Two answers: the slope of the loss along their margin never vanishes."""
  fields, share = optima.BOUNDARY[name]
  logit = 50.0 if share == 1 else np.log(share / (1 - share))
  world = world_lib.World(
    ref=np.log(np.full((1, 2), 0.5)),
    reward=np.array([[logit / 2, -logit / 2]]),
    wins=np.array([[[0.0, share], [1 - share, 0.0]]]),
    lengths=np.array([[3.0, 2.0]]),
  )
  if name == "kto":  # σ(r) is how often an answer alone is desirable
    world = world._replace(reward=2 * world.reward)
  f, data = world_lib.objective(name, world, **fields)
  row = jax.tree.map(lambda x: x[0], data)

  def slope(margin):
    return jax.grad(lambda m: f(jnp.stack([m / 2, -m / 2]), *row))(margin)

  margins = np.array([0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0])
  assert np.all(world_lib.compute(jax.vmap(slope), margins) < 0)


def test_unlikelihood_is_unbounded_below_where_an_answer_loses_too_often():
  """P(y ≻ μ) < α P(μ ≻ y): the less likely y, the lower the loss."""
  world = world_lib.make()
  won, lost = world.wins.sum(2), world.wins.sum(1)
  worst = np.argmin(won - lost, axis=-1)
  assert np.all(np.take_along_axis(won - lost, worst[:, None], 1) < 0)
  f, data = world_lib.objective("unlikelihood", world, alpha=1.0)
  there = world.ref - 100 * np.eye(8)[worst]
  further = world.ref - 1000 * np.eye(8)[worst]
  near, far = (
    world_lib.compute(jax.vmap(f), z, *data) for z in (there, further)
  )
  assert np.all(far < near - 10)


def test_every_loss_and_divergence_is_in_the_tables():
  compared = {name_of(case) for case in optima.CASES}
  known = compared | set(optima.BOUNDARY) | set(optima.NOT_COMPARED)
  assert known == set(losses.LOSSES)
  # Only this has no theory in any circumstances.
  bounded = compared | set(optima.BOUNDARY)
  assert set(losses.LOSSES) - bounded == {"discopop"}
  divergences = {case.divergence for case in optima.CASES.values()}
  assert divergences == {*losses.DIVERGENCES, None}
