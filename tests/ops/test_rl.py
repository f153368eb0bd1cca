"""Advantages, rewards of tokens and clipped losses, against loops in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import rl
from dpo_jax.ops.rl import advantages, losses

PROMPTS, DRAWS, LENGTH = 3, 4, 7


def drawn(seed=0, shape=(PROMPTS, DRAWS, LENGTH)):
  """(mask, scores, log-probs, those of the reference, values), as numpy.

  Completions of 1 to N tokens; what is behind the end is NaN in none of them,
  but far from 0, as rubbish would be.
  """
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, shape[2] + 1, shape[:2])
  lengths.flat[0], lengths.flat[1] = 1, shape[2]
  mask = np.arange(shape[2]) < lengths[..., None]
  scores = rng.normal(size=shape[:2]).astype(np.float32)
  logps, ref, values = rng.normal(size=(3, *shape)).astype(np.float32)
  rubbish = np.where(mask, 0, 1e3).astype(np.float32)
  return mask, scores, logps + rubbish, ref - rubbish, values + rubbish


def gae_loop(rewards, mask, values, gamma, lam):
  """Σ_j (γλ)^j δ_{t+j} as it is written, in float64."""
  out = np.zeros(mask.shape)
  for b, k in np.ndindex(mask.shape[:2]):
    n = int(mask[b, k].sum())
    r, v = rewards[b, k].astype(float), values[b, k].astype(float)
    for t in range(n):
      for j in range(t, n):
        following = v[j + 1] if j + 1 < n else 0.0
        error = r[j] + gamma * following - v[j]
        out[b, k, t] += (gamma * lam) ** (j - t) * error
  return out


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(
  ("gamma", "lam", "value_lam"),
  [(1.0, 0.95, 0.95), (1.0, 1.0, 0.0), (0.9, 0.0, 1.0), (0.5, 0.7, 0.3)],
)
def test_gae_is_the_sum_of_discounted_errors(length, gamma, lam, value_lam):
  mask, scores, logps, ref, values = drawn(1, (2, 3, length))
  rewards = advantages.token_rewards(scores, logps, ref, mask, beta=0.1)
  made, returns = advantages.gae(
    *(rewards, mask, values), gamma=gamma, lam=lam, value_lam=value_lam
  )
  want = gae_loop(np.asarray(rewards), mask, values, gamma, lam)
  # f32 sums of at most 7 numbers of order 1.
  np.testing.assert_allclose(made, want, atol=1e-5)
  want = gae_loop(np.asarray(rewards), mask, values, gamma, value_lam)
  want += np.where(mask, values, 0)
  np.testing.assert_allclose(returns, want, atol=1e-5)


def test_gae_without_a_discount_is_the_reward_to_go_less_the_value():
  """γ = λ = 1: the errors telescope, whatever the critic says."""
  mask, scores, logps, ref, values = drawn(2)
  rewards = advantages.token_rewards(scores, logps, ref, mask, beta=0.3)
  made, returns = advantages.gae(
    rewards, mask, values, gamma=1.0, lam=1.0, value_lam=1.0
  )
  to_go, _ = advantages.reinforce(rewards, mask, gamma=1.0)
  np.testing.assert_allclose(returns, to_go, atol=1e-5)
  np.testing.assert_allclose(made, to_go - np.where(mask, values, 0), atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.05, 2.0])
def test_rewards_sum_to_the_score_less_the_penalty(beta):
  mask, scores, logps, ref, _ = drawn(3)
  rewards = np.asarray(
    advantages.token_rewards(scores, logps, ref, mask, beta=beta)
  )
  k1 = np.sum(logps - ref, axis=-1, where=mask, dtype=float)
  np.testing.assert_allclose(rewards.sum(-1), scores - beta * k1, atol=1e-5)
  # The score is at the last token and nowhere else, least of all at padding.
  others = np.asarray(
    advantages.token_rewards(scores + 5, logps, ref, mask, beta=beta)
  )
  last = mask & ~np.pad(mask[..., 1:], ((0, 0), (0, 0), (0, 1)))
  np.testing.assert_allclose(others - rewards, 5.0 * last, atol=1e-5)


def test_a_score_stays_a_number_with_a_fraction():
  """.7 stays .7: nothing here has the dtype of the ids."""
  ids = np.zeros((1, 1, 3), np.int32)
  scores = np.full((1, 1), 0.7)
  rewards = advantages.token_rewards(
    scores, ids.astype(np.float32), ids.astype(np.float32), ids == 0, beta=0.1
  )
  assert rewards.dtype == jnp.float32
  np.testing.assert_allclose(rewards, [[[0, 0, 0.7]]], rtol=1e-7)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_whitened_values_have_variance_one(keeps_mean):
  mask, *_, values = drawn(4)
  values = np.where(mask, 3 * values + 2, values)
  out = np.asarray(advantages.whitened(values, mask, keeps_mean=keeps_mean))
  assert not out[~mask].any()
  real = out[mask].astype(float)
  # f32 means of 50 numbers of order 3.
  assert abs(real.var() - 1) < 1e-5
  want = values[mask].mean(dtype=float) if keeps_mean else 0
  assert abs(real.mean() - want) < 1e-5
  order = np.argsort(values[mask])
  assert np.all(np.diff(real[order]) >= 0)  # a shift and a scale, no more


def test_equal_values_whiten_to_nothing():
  mask, *_ = drawn(5)
  out = advantages.whitened(jnp.full(mask.shape, 0.5), mask)
  assert np.all(np.asarray(out) == 0)


def totals_of(rewards, mask):
  return np.sum(rewards, axis=-1, where=mask, dtype=float)


def test_reinforce_is_the_discounted_reward_to_go():
  mask, scores, logps, ref, _ = drawn(6)
  rewards = np.asarray(
    advantages.token_rewards(scores, logps, ref, mask, beta=0.1)
  )
  made, returns = advantages.reinforce(rewards, mask, gamma=0.9)
  want = gae_loop(rewards, mask, np.zeros(mask.shape), 0.9, 1.0)
  np.testing.assert_allclose(made, want, atol=1e-5)
  np.testing.assert_array_equal(made, returns)


def test_rloo_compares_with_the_mean_of_the_others():
  mask, scores, logps, ref, _ = drawn(7)
  rewards = np.asarray(
    advantages.token_rewards(scores, logps, ref, mask, beta=0.1)
  )
  made, returns = advantages.rloo(rewards, mask)
  totals = totals_of(rewards, mask)
  for b, k in np.ndindex(totals.shape):
    others = np.delete(totals[b], k).mean()
    want = np.where(mask[b, k], totals[b, k] - others, 0)
    np.testing.assert_allclose(made[b, k], want, atol=1e-5)
    want = np.where(mask[b, k], totals[b, k], 0)
    np.testing.assert_allclose(returns[b, k], want, atol=1e-5)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_grpo_compares_with_the_mean_of_all(scale):
  mask, scores, logps, ref, _ = drawn(8)
  rewards = np.asarray(
    advantages.token_rewards(scores, logps, ref, mask, beta=0.1)
  )
  made, _ = advantages.grpo(rewards, mask, scale=scale)
  totals = totals_of(rewards, mask)
  want = totals - totals.mean(1, keepdims=True)
  if scale == "std":
    want /= totals.std(1, keepdims=True, ddof=1) + 1e-4
  want = np.where(mask, want[..., None], 0)
  np.testing.assert_allclose(made, want, atol=1e-5)


def test_grpo_without_a_scale_is_rloo_less_one_kth():
  mask, scores, logps, ref, _ = drawn(9)
  rewards = advantages.token_rewards(scores, logps, ref, mask, beta=0.1)
  made, _ = advantages.grpo(rewards, mask, scale="none")
  loo, _ = advantages.rloo(rewards, mask)
  np.testing.assert_allclose(made, (1 - 1 / DRAWS) * loo, atol=1e-5)


def test_a_group_without_a_winner_teaches_grpo_nothing():
  mask, _, logps, _, _ = drawn(10)
  scores = np.full(mask.shape[:2], 0.7, np.float32)
  rewards = advantages.token_rewards(scores, logps, logps, mask, beta=0.1)
  # Rounding of the mean, 1e-7, over the 1e-4 beside a spread of nothing.
  for scale, most in (("std", 1e-2), ("none", 1e-6)):
    made, _ = advantages.grpo(rewards, mask, scale=scale)
    assert np.abs(made).max() < most


@pytest.mark.parametrize("name", rl.ESTIMATORS)
def test_estimators_do_not_look_behind_the_end(name):
  """Also ppo: what is behind the end, and how much of it, changes nothing."""
  row = rl.ESTIMATORS[name]
  mask, scores, logps, ref, values = drawn(11)
  fields = {"gamma": 0.9, "lam": 0.7, "value_lam": 0.8, "scale": "std"}
  own = {k: v for k, v in fields.items() if k in row.defaults}

  def made(extra, filling):
    def pad(x):
      behind = np.full((PROMPTS, DRAWS, extra), filling).astype(x.dtype)
      return np.concatenate([x, behind], axis=-1)

    there = np.concatenate(
      [mask, np.zeros((PROMPTS, DRAWS, extra), bool)], axis=-1
    )
    before = [np.where(there, pad(x), filling) for x in (logps, ref, values)]
    rewards = advantages.token_rewards(scores, *before[:2], there, beta=0.1)
    assert not np.asarray(rewards)[~there].any()
    args = {"values": before[2]} if row.critic else {}
    out = row.fn(advantages.whitened(rewards, there), there, **args, **own)
    for x in out:
      assert not np.asarray(x)[~there].any()
    return [np.asarray(x)[..., :LENGTH] for x in out]

  for one, other in zip(made(0, 0.0), made(5, 9.0), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


# ── Clipped losses ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("clip", [0.1, 0.2])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 1.0, 1.05, 1.7])
def test_the_clipped_surrogate_and_its_gradient_are_those_of_ppo(
  ratio, advantage, clip
):
  def loss(logp):
    return losses.policy(
      logp, jnp.float32(-2.0), jnp.float32(advantage), clip=clip
    )

  logp = jnp.float32(-2 + np.log(ratio))
  (value, decides), slope = (
    loss(logp),
    jax.grad(lambda x: loss(x)[0])(logp),
  )
  held = np.clip(ratio, 1 - clip, 1 + clip)
  want = -min(ratio * advantage, held * advantage)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  # Beyond the range it has no slope on the side that would go on.
  beyond = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
  assert bool(decides) == beyond
  np.testing.assert_allclose(
    slope, 0.0 if beyond else -ratio * advantage, rtol=1e-5
  )


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
  rng = np.random.default_rng(0)
  logps, made = rng.normal(size=(2, 5)).astype(np.float32)

  def total(logps, old):
    return jnp.sum(losses.policy(logps, old, made, clip=0.2)[0])

  np.testing.assert_array_equal(jax.grad(total)(logps, logps), -made)
  np.testing.assert_array_equal(
    losses.policy(logps, logps, made, clip=0.2)[1], np.zeros(5)
  )


@pytest.mark.parametrize("value", [-1.0, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("target", [-0.5, 0.25, 2.0])
def test_the_critic_s_loss_is_the_larger_of_two_errors(value, target):
  old, clip = 0.2, 0.2

  def loss(value):
    return losses.value(value, jnp.float32(old), target, clip=clip)

  near = np.clip(value, old - clip, old + clip)
  free, held = (value - target) ** 2, (near - target) ** 2
  got, decides = loss(jnp.float32(value))
  np.testing.assert_allclose(got, 0.5 * max(free, held), rtol=1e-5)
  # Ties are decided by rounding, where both are the same.
  if abs(free - held) > 1e-6:
    assert bool(decides) == (held > free)
    slope = jax.grad(lambda x: loss(x)[0])(jnp.float32(value))
    inside = 0 if held > free else value - target
    np.testing.assert_allclose(slope, inside, rtol=1e-5, atol=1e-7)


def test_the_three_averages_differ_in_what_counts_the_same():
  mask, _, _, _, values = drawn(12)
  sums = np.sum(values, axis=-1, where=mask).reshape(PROMPTS, DRAWS)
  lengths = mask.sum(-1).astype(np.float32)
  weights = np.ones_like(lengths)
  weights[-1, -1] = 0  # a row without this completion

  def mean(average):
    v, w = losses.averaged(sums, lengths, weights, average)
    return float(jnp.sum(v * w) / jnp.sum(w))

  there = weights > 0
  tokens = sums[there].sum() / lengths[there].sum()
  np.testing.assert_allclose(mean("tokens"), tokens, rtol=1e-5)
  np.testing.assert_allclose(mean("sums"), sums[there].mean(), rtol=1e-5)
  means = (sums / lengths)[there].mean()
  np.testing.assert_allclose(mean("means"), means, rtol=1e-5)


# ── The table ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", rl.ESTIMATORS)
def test_the_defaults_of_an_estimator_are_allowed(name):
  row = rl.ESTIMATORS[name]
  assert rl.check({"name": name, **row.defaults}) is row
  assert row.critic == ("value_lam" in row.defaults) == (name == "ppo")
  assert row.group == (name in ("rloo", "grpo"))


@pytest.mark.parametrize(
  ("name", "fields", "said"),
  [
    ("ppoo", {}, r"'ppoo'.*'ppo'"),
    ("dpo", {}, r"'dpo' compares completions that are there"),
    ("ppo", {"clip": 0.0}, r"loss\.clip = 0\.0"),
    ("ppo", {"clip": float("nan")}, r"loss\.clip = nan"),
    ("ppo", {"beta": -0.1}, r"loss\.beta = -0\.1"),
    ("ppo", {"lam": 1.5}, r"loss\.lam = 1\.5"),
    ("ppo", {"value_lam": -1.0}, r"loss\.value_lam = -1\.0"),
    ("ppo", {"value_clip": 0.0}, r"loss\.value_clip"),
    ("ppo", {"value_weight": 0.0}, r"loss\.value_weight"),
    ("reinforce", {"gamma": 2.0}, r"loss\.gamma = 2\.0"),
    ("rloo", {"average": "token"}, r"loss\.average.*'tokens'"),
    ("rloo", {"whiten": "reward"}, r"loss\.whiten.*'rewards'"),
    ("rloo", {"gamma": 1.0}, r"'rloo' takes"),
    ("grpo", {"scale": "var"}, r"loss\.scale"),
  ],
)
def test_what_no_estimator_can_have_is_refused(name, fields, said):
  row = rl.ESTIMATORS.get(name)
  defaults = row.defaults if row else {"beta": 0.1}
  with pytest.raises(ValueError, match=f"(?s){said}"):
    rl.check({"name": name, **defaults, **fields})
