"""A reward model through the project's own rows, against what is known.

Every answer of tests/exact/language.py has a reward of its own here: a table in
the place of a model, read by `algos.reward` at the answer's last token. So the
rows, the places and the comparisons are the project's, and the maximum of the
likelihood can be compared with one in f64 that knows none of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from configs import base as base_config
from configs import losses as losses_config
from dpo_jax.algos import reward
from tests.exact import language
from tests.exact import world as world_lib

BETA = 0.5
ANSWERS = len(language.TEXTS)


def drawn(pairs=4000, seed=0):
  """A World of the language: r*, π_ref, and wins of a finite data set."""
  rng = np.random.default_rng(seed)
  shape = len(language.PROMPTS), ANSWERS
  ref = world_lib.normalised(0.5 * rng.normal(size=shape))
  true = rng.normal(size=shape)
  every = world_lib.comparisons(ref, true)
  wins = np.stack(
    [rng.multinomial(pairs, each.ravel()).reshape(each.shape) for each in every]
  )
  return world_lib.World(ref, true, wins / pairs, np.ones(shape))


PROMPT_LENGTHS = np.asarray([[len(prompt)] for prompt in language.PROMPTS])
TOKENS = language.EOS + 1
BEGINNINGS = 1 + TOKENS + TOKENS**2  # of an answer: none, one token, two


def apply(params, batch):
  """Hidden states that name the prompt and what is read of the answer."""
  tokens = batch["tokens"]
  place = batch["positions"] - PROMPT_LENGTHS  # in the answer
  before = jnp.roll(tokens, 1, axis=1)
  one, two = 1 + tokens, 1 + TOKENS + TOKENS * before + tokens
  read = jnp.where(place == 0, one, jnp.where(place == 1, two, 0))
  name = BEGINNINGS * jnp.arange(len(tokens))[:, None] + read
  size = BEGINNINGS * len(language.PROMPTS)
  return jax.nn.one_hot(name, size, dtype=jnp.float64), None


def trained(world):
  """(rewards f64[2, K], mean loss) of the most likely reward model."""
  config = base_config.get_config()
  config.algo, config.ref = "reward", "none"
  config.loss = losses_config.loss("bradley_terry")
  batch = language.batch(world.wins)
  algorithm = reward.make(config, apply)
  hparams = {"label_smoothing": 0.0, "centring": 0.0}

  def head(kernel):
    return {"model": {}, "reward": {"kernel": kernel, "bias": 0.0}}

  def loss(kernel):
    terms = algorithm.objective(head(kernel), {}, batch, hparams)
    values, weights = terms.losses["bradley_terry"]
    return jnp.sum(values * weights)

  with jax.enable_x64(True):
    slope = jax.jit(jax.value_and_grad(loss))
    found = scipy.optimize.minimize(
      lambda k: tuple(np.asarray(x, float) for x in slope(k)),
      np.zeros(BEGINNINGS * len(language.PROMPTS)),
      jac=True,
      method="L-BFGS-B",
      options={"maxiter": 5000, "ftol": 0.0, "gtol": 1e-9, "maxcor": 50},
    )
    scores = jax.jit(functools.partial(reward.rewards, apply))
    rewards = np.asarray(scores(head(found.x), batch))
  # In f32 as they lie in the batch.
  total = np.sum(batch["weights"], dtype=float)
  return rewards[:, :ANSWERS], found.fun / total


def in_f64(world):
  """The same by Newton's method on a table of rewards alone."""
  return world_lib.learn(
    "bradley_terry", world, label_smoothing=0.0, centring=0.0
  )


def centred(rewards):
  return rewards - rewards.mean(-1, keepdims=True)


def test_the_most_likely_reward_is_that_of_the_oracle():
  world = drawn()
  rewards, loss = trained(world)
  oracle, value = in_f64(world)
  assert np.abs(centred(rewards) - centred(oracle)).max() < 1e-5
  np.testing.assert_allclose(loss, value.mean(), rtol=1e-7)
  # And it is near the true one: χ² of the Fisher information is tested in
  # test_finite_data; here that it tells the answers apart.
  for ours, true in zip(rewards, world.reward, strict=True):
    assert scipy.stats.spearmanr(ours, true).statistic > 0.9


def test_a_reward_model_and_dpo_have_one_loss_and_one_policy():
  """Theorem 1: π_ref e^(r̂/β) / Z is where DPO's loss is least."""
  world = drawn()
  rewards, loss = trained(world)
  policy, value = world_lib.learn("dpo", world, beta=BETA, label_smoothing=0.0)
  np.testing.assert_allclose(loss, value.mean(), rtol=1e-7)
  two_stages = world_lib.normalised(world.ref + rewards / BETA)
  assert np.abs(two_stages - policy).max() < 1e-4


def test_a_reward_model_that_reads_one_token_early_has_another_loss(
  monkeypatch,
):
  """Answers that share their beginning would share their reward."""
  right = reward.last_tokens

  def early(batch):
    last = right(batch)
    return jnp.where(last < batch["tokens"].shape[1], last - 1, last)

  world = drawn()
  monkeypatch.setattr(reward, "last_tokens", early)
  _, loss = trained(world)
  assert loss > in_f64(world)[1].mean() + 1e-3
