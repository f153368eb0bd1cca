"""A transformer in a language that can be listed (PAPER 4.4, no. 12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib
from tests.exact import language
from tests.exact import world as world_lib

CHECKS = language.answers_sum_to_one, language.weights_shared


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds_in_the_language(check):
  check()


def test_training_reaches_the_exact_optimum():
  """The train step on the population loss: soft labels as weights."""
  beta, steps, rate = 0.5, 300, 1e-2
  reward = np.random.default_rng(0).normal(
    size=(len(language.PROMPTS), len(language.TEXTS))
  )
  # Any pairs with full support have this optimum; these are drawn evenly.
  even = world_lib.normalised(np.zeros_like(reward))
  rows = language.batch(world_lib.comparisons(even, reward))
  built, params = language.model()
  ref = language.log_policy(params, rows)
  want = world_lib.normalised(ref + reward / beta)
  assert world_lib.kl(ref, want).min() > 0.5

  options = common.optim("adamw")
  options.update({"warmup": 0, "schedule": "linear"})
  optimizer = optim.make(options, steps)
  algorithm = language.algorithm_of(built)
  state = state_lib.create(
    params, optimizer, {"ref": params}, algorithm.extra(params)
  )
  step = jax.jit(
    step_lib.make(algorithm, optimizer, accumulation=1, axis_name=None)
  )
  hparams = {"beta": beta, "label_smoothing": 0.0, "learning_rate": rate}
  hparams = {name: jnp.float32(value) for name, value in hparams.items()}
  for _ in range(steps):
    state, metrics = step(state, rows, hparams)

  policy = language.log_policy(state.params, rows)
  # 1e-7 seen, the rounding of f32 log-probs; the model can represent it all.
  assert world_lib.kl(policy, want).max() < 1e-3
  p = world_lib.beats(reward)
  entropy = -np.mean(
    np.sum(world_lib.comparisons(even, reward) * np.log(p), axis=(1, 2))
  )
  np.testing.assert_allclose(metrics["loss"], entropy, atol=1e-5)
