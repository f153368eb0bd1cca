"""What the losses have in common: limits and symmetries."""

import itertools

import numpy as np
import pytest

from dpo_jax.ops import losses
from dpo_jax.ops.losses import ranking
from tests.ops import loss_cases

LOGPS = ("policy_logps", "prefix_logps", "common_logps")
ONES = np.ones((2, 3, 2))


def result(case, values):
  """(loss, its gradient by all log-probs, or by rewards), in float64."""
  values = {name: values[name] for name in loss_cases.arguments(case)}
  scale = np.ones(next(iter(values.values())).shape[:-1])
  (loss, _), gradients = loss_cases.value_and_gradients(
    case, values, scale, "float64"
  )
  names = (*LOGPS, "rewards")
  return loss, sum(gradients[name] for name in names if name in gradients)


def given(case, seed, changes):
  """Random arguments, and those of `changes(values)` in their place."""
  values = loss_cases.values_of(case, seed)
  return {**values, **changes(values)}


def as_is(values):
  del values
  return {}


def assert_same(case, other, changes=as_is, scale=1.0, rtol=1e-12):
  """case = scale × other in loss and gradient, but for roundings of f64."""
  for seed in range(2):
    got, want = (result(c, given(c, seed, changes)) for c in (case, other))
    for one, another in zip(got, want, strict=True):
      np.testing.assert_allclose(one, scale * another, rtol=rtol, atol=1e-13)


def without_reference(values):
  return {"ref_logps": np.zeros_like(values["policy_logps"])}


def one_token(values):
  del values
  return {"lengths": ONES}


def same_kl(values):
  del values
  return {"sequence_kl": ONES}


def weight_one(values):
  return {"sum_sq_probs": values["policy_logps"]}


def all_of_it(values):
  """Parts of a completion that are the whole."""
  policy, ref = values["policy_logps"], values["ref_logps"]
  return {
    **{"common_logps": policy, "prefix_logps": policy},
    **{"ref_common_logps": ref, "ref_prefix_logps": ref},
  }


def one_comparison(values):
  """A batch with nothing to sort."""
  return {
    **{name: value[:1, :1] for name, value in values.items()},
    "weights": np.ones((1, 1)),
  }


def two_of_a_kind(values):
  """A ranking of two, the same whatever the width of `values`."""
  del values
  pairs = loss_cases.values_of(loss_cases.of("dpo"), seed=0)
  return {**pairs, "present": np.ones((2, 3, 2), bool)}


def one_token_alone(values):
  """Completions of one token under no reference."""
  return {**one_token(values), **without_reference(values)}


@pytest.mark.parametrize(
  ("name", "fields", "changes"),
  [
    ("robust", {"label_smoothing": 0.0}, as_is),
    ("ld_dpo", {"alpha": 1.0}, as_is),
    ("ld_dpo", {"alpha": 0.3}, all_of_it),
    ("sampo", {}, all_of_it),
    ("tdpo1", {}, same_kl),
    ("tdpo2", {}, same_kl),
    ("tdpo2", {"alpha": 0.0}, as_is),
    ("wpo", {"dialect": "paper"}, weight_one),
    ("wpo", {"dialect": "trl_1"}, weight_one),
    ("r_dpo", {"alpha": 0.0}, as_is),
    ("odpo", {"alpha": 0.0}, as_is),
    ("dpop", {"penalty": 0.0}, as_is),
    ("ln_dpo", {}, one_token),
    ("aot", {}, one_comparison),
    ("aot_unpaired", {}, one_comparison),
    ("plackett_luce", {}, two_of_a_kind),
    ("cpo", {"alpha": 0.0}, without_reference),
    ("simpo", {"gamma": 0.0}, one_token_alone),
  ],
)
def test_without_its_own_term_a_loss_is_dpo(name, fields, changes):
  dpo = loss_cases.of("dpo", beta=0.3, label_smoothing=0.0)
  assert_same(loss_cases.of(name, beta=0.3, **fields), dpo, changes)


def test_a_reward_model_of_the_log_ratios_has_the_loss_of_dpo():
  dpo = loss_cases.of("dpo", beta=0.3, label_smoothing=0.0)
  values = loss_cases.cast(loss_cases.values_of(dpo, seed=0), "float32")
  want, _ = loss_cases.loss_of(dpo, values)
  rewards = 0.3 * (values["policy_logps"] - values["ref_logps"])
  plain = ranking.bradley_terry(rewards, label_smoothing=0.0, centring=0.0)
  np.testing.assert_array_equal(plain["loss"], want)


def test_a_reward_of_a_ranking_of_two_is_one_of_a_pair():
  pair = loss_cases.of("bradley_terry", centring=0.02)
  values = loss_cases.values_of(pair, seed=0)
  order = loss_cases.of("plackett_luce_reward", centring=0.02)
  two = {**values, "present": np.ones((2, 3, 2), bool)}
  for got, want in zip(result(order, two), result(pair, values), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_margin_of_nothing_is_a_reward_of_pairs():
  plain = loss_cases.of("bradley_terry", centring=0.02)
  margin = loss_cases.of("bradley_terry_margin", alpha=0.0, centring=0.02)
  values = loss_cases.values_of(margin, seed=0)
  got, want = result(margin, values), result(plain, values)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1e-9, -1e-9])
def test_alphapo_without_bend_is_simpo(alpha):
  bent = loss_cases.of("alphapo", beta=2.0, gamma=0.5, alpha=alpha)
  assert_same(bent, loss_cases.of("simpo", beta=2.0, gamma=0.5))


def test_alphapo_tends_to_simpo():
  bent = loss_cases.of("alphapo", beta=2.0, gamma=0.5, alpha=1e-4)
  # α l is 2e-4 at most.
  assert_same(bent, loss_cases.of("simpo", beta=2.0, gamma=0.5), rtol=1e-3)


def test_ipo_of_single_tokens_is_that_of_sums():
  assert_same(
    loss_cases.of("ipo", dialect="paper"),
    loss_cases.of("ipo", dialect="original"),
    one_token,
  )


def test_terms_without_weight_leave_a_likelihood():
  assert_same(loss_cases.of("unlikelihood", alpha=0.0), loss_cases.of("sft"))
  assert_same(loss_cases.of("orpo", odds_weight=0.0), loss_cases.of("nll"))


def test_slic_without_its_likelihood_is_a_hinge_without_reference():
  slic = loss_cases.of("slic", delta=4.0, nll_weight=0.0)
  assert_same(
    slic, loss_cases.of("hinge", beta=0.25), without_reference, scale=4.0
  )


def test_cal_dpo_is_dpo_of_beta_one_and_half_of_sppo():
  values = loss_cases.values_of(loss_cases.of("dpo"), seed=0)
  terms = (
    loss_cases.of("dpo", beta=1.0),
    loss_cases.of("sppo", beta=0.2),
  )
  dpo, sppo = (result(case, values) for case in terms)
  both = result(loss_cases.of("cal_dpo", beta=0.2), values)
  for got, one, other in zip(both, dpo, sppo, strict=True):
    np.testing.assert_allclose(got, one + other / 2, rtol=1e-12, atol=1e-12)


def test_robust_dpo_averages_to_clean_dpo_over_flipped_labels():
  epsilon = 0.3
  robust = loss_cases.of("robust", beta=0.5, label_smoothing=epsilon)
  values = loss_cases.values_of(robust, seed=0)
  flipped = {name: value[..., ::-1] for name, value in values.items()}
  clean = result(loss_cases.of("dpo", beta=0.5), values)
  loss, gradient = result(robust, values)
  other, other_gradient = result(robust, flipped)
  average = (1 - epsilon) * loss + epsilon * other
  np.testing.assert_allclose(average, clean[0], rtol=1e-12)
  average = (1 - epsilon) * gradient + epsilon * other_gradient[..., ::-1]
  np.testing.assert_allclose(average, clean[1], rtol=1e-12)


@pytest.mark.parametrize(
  "name", [n for n, l in losses.LOSSES.items() if l.of_h]
)
def test_the_alpha_divergence_of_one_is_the_reverse_kl(name):
  alike = loss_cases.of(name, "alpha", divergence_alpha=1.0)
  assert_same(alike, loss_cases.of(name))


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name == "dpo" else [pytest.mark.slow])
    for name, loss in losses.LOSSES.items()
    if loss.of_h
  ],
)
def test_the_alpha_divergence_of_zero_is_the_forward_kl(name):
  alike = loss_cases.of(name, "alpha", divergence_alpha=0.0)
  assert_same(alike, loss_cases.of(name, "forward_kl"))


def test_the_old_spelling_of_the_alpha_divergence_has_the_same_margin():
  """(1 − u^(−α_old)) / α_old of TRL up to 0.28, for α = 1 − α_old."""
  values = loss_cases.values_of(loss_cases.of("dpo"), seed=0)
  for old in (0.3, 1.0, -0.5):
    ratio = np.exp(values["policy_logps"] - values["ref_logps"])
    score = (1 - ratio**-old) / old
    want, _ = result(
      loss_cases.of("dpo"), {"policy_logps": score, "ref_logps": 0 * score}
    )
    new = loss_cases.of("dpo", "alpha", divergence_alpha=1 - old)
    np.testing.assert_allclose(result(new, values)[0], want, rtol=1e-12)


@pytest.mark.parametrize(
  "name",
  [
    *("dpo", "robust", "hinge", "exo", "discopop", "r_dpo", "odpo", "ln_dpo"),
    *("dpop", "tdpo1", "tdpo2", "sampo", "ld_dpo", "nca", "apo_zero"),
    *("apo_down", "bco", "aot", "aot_unpaired", "kto_pair", "kto"),
    *("bco_unpaired", "plackett_luce"),
  ],
)
def test_these_losses_are_of_beta_times_nats(name):
  """loss(4 β, nats / 4) = loss(β, nats), with a quarter of the gradient."""
  case, half = (
    loss_cases.of(name, beta=0.2),
    loss_cases.of(name, beta=0.8),
  )
  values = loss_cases.values_of(case, seed=0)
  nats = {k: v / 4 for k, v in values.items() if k.endswith(("logps", "kl"))}
  loss, gradient = result(case, values)
  other, other_gradient = result(half, {**values, **nats})
  np.testing.assert_allclose(other, loss, rtol=1e-12)
  np.testing.assert_allclose(other_gradient, 4 * gradient, rtol=1e-12)


@pytest.mark.parametrize(
  "name",
  [
    name
    for name, loss in losses.LOSSES.items()
    if loss.data in ("pairs", "rewards") and not loss.best_alone
  ],
)
def test_swapping_a_pair_negates_the_margin(name):
  case = loss_cases.of(name)
  values = loss_cases.values_of(case, seed=0)
  swapped = {
    k: v[..., ::-1] if np.ndim(v) == 3 else v for k, v in values.items()
  }
  out, other = (
    loss_cases.out_of(case, loss_cases.cast(v, "float32"))
    for v in (values, swapped)
  )
  margins = "rewards/margins"
  assert np.all(out[margins] != 0)
  np.testing.assert_array_equal(out[margins], -other[margins])
  np.testing.assert_array_equal(
    out["rewards/chosen"], other["rewards/rejected"]
  )
  total = out["rewards/accuracies"] + other["rewards/accuracies"]
  np.testing.assert_array_equal(total, 1.0)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
def test_policy_equal_to_reference_costs_log_two_with_gradient_half_beta(beta):
  logps = loss_cases.values_of(loss_cases.of("dpo"), seed=0)["policy_logps"]
  case = loss_cases.of("dpo", beta=beta, label_smoothing=0.0)
  values = {"policy_logps": logps, "ref_logps": logps}
  loss, gradient = result(case, values)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-15)
  np.testing.assert_allclose(gradient[..., 0], -beta / 2, rtol=1e-15)
  np.testing.assert_allclose(gradient[..., 1], beta / 2, rtol=1e-15)
  out = loss_cases.out_of(case, loss_cases.cast(values, "float32"))
  np.testing.assert_array_equal(out["rewards/accuracies"], 0.5)


@pytest.mark.parametrize(
  ("case", "h"),
  [
    (loss_cases.of("dpo", beta=0.5, label_smoothing=0.2), 2 * np.log(4)),
    (loss_cases.of("ipo", beta=0.1, dialect="original"), 5.0),
    (loss_cases.of("exo", beta=0.5, label_smoothing=0.2), 2 * np.log(4)),
  ],
  ids=lambda value: getattr(value, "name", None),
)
def test_certain_labels_pull_the_margin_to_where_it_should_stop(case, h):
  def gradient(h):
    values = {"policy_logps": np.array([[[h, 0.0]]]), "lengths": ONES[:1, :1]}
    return result(case, {**values, "ref_logps": np.zeros((1, 1, 2))})[1][
      0, 0, 0
    ]

  assert abs(gradient(h)) < 1e-12
  assert gradient(h - 0.1) < 0 < gradient(h + 0.1)


def test_a_shorter_ranking_is_the_ranking_of_what_is_there():
  case = loss_cases.of("plackett_luce")
  values = loss_cases.values_of(case, seed=0)
  short = {k: v[..., :3] for k, v in values.items()}
  short["present"] = np.ones((2, 3, 3), bool)
  long = {**values, "present": np.arange(4) < np.full((2, 3, 1), 3)}
  long["policy_logps"] = np.where(long["present"], long["policy_logps"], 1e4)
  loss, gradient = result(case, long)
  want, want_gradient = result(case, short)
  np.testing.assert_allclose(loss, want, rtol=1e-12)
  np.testing.assert_allclose(gradient[..., :3], want_gradient, rtol=1e-12)
  np.testing.assert_array_equal(gradient[..., 3], 0.0)


def test_the_probabilities_of_all_rankings_sum_to_one():
  values = loss_cases.values_of(loss_cases.of("plackett_luce"), seed=0)
  total = 0.0
  for order in itertools.permutations(range(4)):
    moved = {k: v[..., list(order)] for k, v in values.items()}
    moved["present"] = np.ones((2, 3, 4), bool)
    total = total + np.exp(-result(loss_cases.of("plackett_luce"), moved)[0])
  np.testing.assert_allclose(total, 1.0, rtol=1e-12)
