"""What the losses report beside the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import losses
from tests.ops import loss_cases, oracles

each_loss = pytest.mark.parametrize("case", loss_cases.FEW, ids=str)


def log_probs(v):
  return v.policy_logps


def scaled_log_ratios(v):
  return v.beta * oracles.ratios(v)


def means(v):
  return oracles.per_token(v.policy_logps, v.lengths)


def link_of_chi_po(v):
  delta = v.policy_logps - v.ref_logps
  return v.beta * (delta + oracles.exp(delta, top=20.0) - 1)


# The reward of which the policy would be the optimum; others: β Δ.
REWARDS = {
  "chi_po": link_of_chi_po,
  "ln_dpo": lambda v: oracles.per_token(scaled_log_ratios(v), v.lengths),
  "unlikelihood": log_probs,
  "slic": log_probs,
  "simpo": lambda v: v.beta * means(v),
  "alphapo": lambda v: v.beta * -oracles.expm1(v.alpha, -means(v)),
  "orpo": lambda v: v.odds_weight * means(v),
  "cpo": lambda v: v.beta * v.policy_logps,
  "bradley_terry": lambda v: v.rewards,
  "bradley_terry_margin": lambda v: v.rewards,
}


def assert_close(got, want):
  # f32, of numbers up to 100.
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
  "case",
  [
    case
    for case in loss_cases.FEW
    if losses.LOSSES[case.name].data in ("pairs", "rewards")
    and not losses.LOSSES[case.name].best_alone
  ],
  ids=str,
)
def test_the_rewards_of_a_pair_are_chosen_less_rejected(case):
  values = loss_cases.values_of(case, seed=0)
  space = loss_cases.space_of(case, values)
  want = REWARDS.get(case.name, scaled_log_ratios)(space)
  out = loss_cases.out_of(case, loss_cases.cast(values, "float32"))
  assert_close(out["rewards/chosen"], want[..., 0])
  assert_close(out["rewards/rejected"], want[..., 1])
  assert_close(out["rewards/margins"], want[..., 0] - want[..., 1])
  right = want[..., 0] > want[..., 1]
  np.testing.assert_array_equal(out["rewards/accuracies"], right)
  if "policy_logps" in values:
    for side, name in enumerate(("chosen", "rejected")):
      want = values["policy_logps"][..., side]
      np.testing.assert_array_equal(out[f"logps/{name}"], want)


@pytest.mark.parametrize("name", ["sft", "nll"])
def test_a_likelihood_reports_that_of_the_chosen(name):
  case = loss_cases.of(name)
  values = loss_cases.values_of(case, seed=0)
  out = loss_cases.out_of(case, loss_cases.cast(values, "float32"))
  want = values["policy_logps"][..., 0]
  np.testing.assert_array_equal(out["logps/chosen"], want)
  assert set(out) == {"loss", "logps/chosen"}


def test_a_ranking_reports_its_first_and_its_last_that_is_there():
  case = loss_cases.of("plackett_luce")
  values = loss_cases.values_of(case, seed=0)
  want = scaled_log_ratios(loss_cases.space_of(case, values))
  out = loss_cases.out_of(case, loss_cases.cast(values, "float32"))
  last = np.sum(values["present"], axis=-1, keepdims=True) - 1
  worst = np.take_along_axis(want, last, axis=-1)[..., 0]
  assert_close(out["rewards/chosen"], want[..., 0])
  assert_close(out["rewards/rejected"], worst)
  assert_close(out["rewards/margins"], want[..., 0] - worst)


@pytest.mark.parametrize("name", ["kto", "bco_unpaired"])
def test_labels_part_the_rewards_by_factors(name):
  case = loss_cases.of(name)
  values = loss_cases.values_of(case, seed=0)
  want = scaled_log_ratios(loss_cases.space_of(case, values))[..., 0]
  out = loss_cases.out_of(case, loss_cases.cast(values, "float32"))
  for side, share in (
    ("chosen", values["labels"]),
    ("rejected", 1 - values["labels"]),
  ):
    rewards, factor = out[f"rewards/{side}"]
    assert_close(rewards, want)
    np.testing.assert_array_equal(factor, share)
    logps, factor = out[f"logps/{side}"]
    np.testing.assert_array_equal(logps, values["policy_logps"][..., 0])
    np.testing.assert_array_equal(factor, share)


def test_kto_reports_its_reference_point():
  case = loss_cases.of("kto")
  values = loss_cases.values_of(case, seed=0)
  delta = oracles.ratios(loss_cases.space_of(case, values))
  z = oracles.average(delta[..., 1], values["weights"])
  out = loss_cases.out_of(case, loss_cases.cast(values, "float32"))
  assert z > 0
  assert_close(out["kl"], np.full((2, 3), z))


@each_loss
def test_a_loss_does_not_train_through_its_metrics(case):
  values = loss_cases.values_of(case, seed=0)
  values = loss_cases.cast(values, "float32")
  moving = {name: values[name] for name in loss_cases.moving(case)}

  def total(moving):
    out = loss_cases.out_of(case, {**values, **moving})
    out.pop("loss")
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

  for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(moving)):
    np.testing.assert_array_equal(gradient, 0.0)
