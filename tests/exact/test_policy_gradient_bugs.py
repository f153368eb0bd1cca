"""Bugs that keep PPO running, each found by a check.

The checks are those that hold of the code as it is: test_policy_gradient.
"""

import jax.numpy as jnp
import pytest

from dpo_jax.algos import base, policy_gradient, preference
from dpo_jax.models import sample
from dpo_jax.ops.rl import advantages
from tests.exact import policy_gradient_checks as checks
from tests.exact import policy_gradients


def value_shifted_by_one(patch):
  """The value behind a token, as if it was that before it."""
  right = advantages.gae

  def wrong(rewards, mask, values, **options):
    return right(rewards, mask, jnp.roll(values, -1, axis=-1), **options)

  patch.setattr(advantages, "gae", wrong)


def _rewards(patch, wrong):
  right = advantages.token_rewards

  def replaced(scores, logps, ref_logps, mask, *, beta):
    return wrong(right, scores, logps, ref_logps, mask, beta)

  patch.setattr(advantages, "token_rewards", replaced)


def kl_sign(patch):
  """What is far from the reference is rewarded."""
  _rewards(patch, lambda right, *args: right(*args[:-1], beta=-args[-1]))


def mask_off_by_one(patch):
  """The last token of a completion does not count."""

  def wrong(right, scores, logps, ref_logps, mask, beta):
    shorter = jnp.pad(mask[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return right(scores, logps, ref_logps, shorter, beta=beta)

  _rewards(patch, wrong)


def reward_at_a_pad(patch):
  """The score is one position behind the last token."""

  def wrong(right, scores, logps, ref_logps, mask, beta):
    penalties = right(0 * scores, logps, ref_logps, mask, beta=beta)
    score = right(scores, logps, logps, mask, beta=beta)
    return penalties + jnp.roll(score, 1, axis=-1)

  _rewards(patch, wrong)


def advantage_not_stopped(patch):
  """It is made in the loss, of the values that are trained."""
  right = policy_gradient.combine

  def wrong(moving, fixed, *args, **options):
    made = fixed["returns"] - moving["values"]
    return right(moving, {**fixed, "advantages": made}, *args, **options)

  patch.setattr(policy_gradient, "combine", wrong)


def critic_sees_the_next_token(patch):
  right = base.head_values

  def wrong(head, hidden, batch):
    batch = {**batch, "source_index": batch["target_index"]}
    return right(head, hidden, batch)

  patch.setattr(base, "head_values", wrong)


def temperature_missing_in_the_reference(patch):
  right = preference.reference_logps

  def wrong(*args, apply, **options):
    apply, _ = policy_gradients.model()[0].apply, apply
    return right(*args, apply=apply, **options)

  patch.setattr(preference, "reference_logps", wrong)


def temperature_missing_in_training(patch):
  """In old and new log-probs alike, so that the ratio is 1 all the same."""
  patch.setattr(
    policy_gradient,
    "_at_temperature",
    lambda apply, temperature, params, batch: apply(params, batch),
  )


def temperature_missing_in_sampling(patch):
  right = sample._draw

  def wrong(logits, rngs, step, temperature, *args):
    return right(logits, rngs, step, jnp.ones_like(temperature), *args)

  patch.setattr(sample, "_draw", wrong)


BUGS = [
  (value_shifted_by_one, checks.ppo),
  (kl_sign, checks.rewards_lie_on_tokens),
  (kl_sign, checks.reinforce),
  (mask_off_by_one, checks.rewards_lie_on_tokens),
  (mask_off_by_one, checks.reinforce),
  (reward_at_a_pad, checks.rewards_lie_on_tokens),
  (advantage_not_stopped, checks.ppo_policy_loss_leaves_the_critic_alone),
  (
    critic_sees_the_next_token,
    checks.ppo_critic_does_not_know_the_token_that_it_judges,
  ),
  (temperature_missing_in_the_reference, checks.hot_reinforce),
  (temperature_missing_in_training, checks.hot_reinforce),
  (temperature_missing_in_training, checks.hot_samples_are_the_policy_s),
  (temperature_missing_in_sampling, checks.hot_samples_are_the_policy_s),
]
# What a cheaper check finds as well.
SLOW = (
  (kl_sign, checks.reinforce),
  (mask_off_by_one, checks.reinforce),
  (temperature_missing_in_training, checks.hot_reinforce),
)


@pytest.mark.parametrize(
  ("plant", "check"),
  [
    pytest.param(*bug, marks=pytest.mark.slow if bug in SLOW else ())
    for bug in BUGS
  ],
  ids=lambda value: value.__name__,
)
def test_a_bug_of_ppo_is_found(plant, check, monkeypatch):
  plant(monkeypatch)
  with pytest.raises(AssertionError):
    check()
