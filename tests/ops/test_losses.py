"""Losses against oracles written from the formulas, in float64 numpy."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import losses as losses_config
from dpo_jax.ops import losses
from tests.ops import loss_cases, oracles

each_case = pytest.mark.parametrize("case", loss_cases.CASES, ids=str)
# What compiles a program for each: the fast tier has every divergence of DPO,
# and of the other losses of h the one that has two more for its ends.
each_program = pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      case,
      id=str(case),
      marks=[pytest.mark.slow]
      if case.name != "dpo" and case.divergence in ("forward_kl", "js")
      else [],
    )
    for case in loss_cases.CASES
  ],
)
each_loss = pytest.mark.parametrize("case", loss_cases.FEW, ids=str)
each_name = pytest.mark.parametrize("name", losses.LOSSES)

# Relative and absolute, of values; and for gradients a share of the largest.
# f32: some roundings of numbers up to 100, which partly cancel. f64: such too,
# and of the oracle's slopes the differences keep nine digits.
TOLERANCES = {"float32": (2e-5, 2e-6, 2e-6), "float64": (1e-12, 1e-13, 1e-9)}
# (loss, argument) whose statistics have no gradient.
STATISTICS = {
  ("tdpo2", "sequence_kl"),
  ("wpo", "policy_logps"),
  ("bco", "policy_logps"),
  ("bco_unpaired", "policy_logps"),
  ("kto_pair", "policy_logps"),
  ("kto", "policy_logps"),
}
# No parameter is behind these, so nobody reads a gradient by them.
DATA = ("lengths", "scores", "weights", "running")


def assert_derivatives(case, values, scale, dtype):
  """Value and gradients of a loss in `dtype` are those of its oracle."""
  want, want_factor = loss_cases.oracle_of(case, values)
  (got, factor), gradients = loss_cases.value_and_gradients(
    case, values, scale, dtype
  )
  assert got.dtype == dtype
  real, (rtol, atol, few) = scale != 0, TOLERANCES[dtype]
  np.testing.assert_allclose(got[real], want[real], rtol=rtol, atol=atol)
  np.testing.assert_array_equal(factor, want_factor)
  for name in loss_cases.moving(case):
    want = loss_cases.slope_of(case, values, name, scale)
    largest = max(1.0, np.max(np.abs(want)))
    np.testing.assert_allclose(
      gradients[name], want, rtol=rtol, atol=few * largest, err_msg=name
    )
  for name in set(gradients) - set(loss_cases.moving(case)) - set(DATA):
    np.testing.assert_array_equal(gradients[name], 0.0, err_msg=name)


@each_program
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_value_and_gradient_equal_the_oracle(case, dtype):
  for seed, spread in ((0, 1.0), (1, 10.0)):
    values = loss_cases.values_of(case, seed, spread)
    scale = loss_cases.pull(case, values)
    assert_derivatives(case, values, scale, dtype)


@each_case
def test_statistics_of_the_batch_have_no_gradient(case):
  """The test above would see a missing stop_gradient of each."""
  values = loss_cases.values_of(case, seed=0)
  scale = loss_cases.pull(case, values)
  for name in loss_cases.moving(case):
    held, free = (
      loss_cases.slope_of(case, values, name, scale, frozen)
      for frozen in (True, False)
    )
    seen = np.max(np.abs(held - free)) > 1e-3 * np.max(np.abs(held))
    known = (case.name, name) in STATISTICS
    known &= case.fields.get("alpha") != 0  # of TDPO2: it reads no K
    if case.name == "bco":
      known &= case.fields["dialect"] == "paper"
    assert seen == known, name


@each_program
def test_extreme_log_ratios_give_finite_values_and_slopes(case):
  """|h| up to 2e4, probabilities of 1, 1 and 10,000 tokens, and padding."""
  for part, values in enumerate(loss_cases.extremes_of(case)):
    assert_sound(case, values, f"batch {part}")


def assert_sound(case, values, where):
  """Finite everywhere, and near the oracle where there is a comparison."""
  scale, real = np.ones((2, 3)), np.arange(6).reshape(2, 3) > 0
  (got, _), gradients = loss_cases.value_and_gradients(
    case, values, scale, "float32"
  )
  for leaf in jax.tree.leaves((got, gradients)):
    assert np.all(np.isfinite(leaf)), where
  want, _ = loss_cases.oracle_of(case, values)
  slopes = {
    name: loss_cases.slope_of(case, values, name, scale)
    for name in loss_cases.moving(case)
  }
  # f32 numbers of 1e4 are 1e-3 apart, which f-divergences make 1e13 times more
  # before they subtract two such scores; and the first is padding.
  slack = (
    1
    + np.abs(want)
    + sum(np.abs(slope).reshape(2, 3, -1).sum(-1) for slope in slopes.values())
  )
  assert np.max((np.abs(got - want) - 1e-3 * slack)[real]) <= 0, where
  for name, slope in slopes.items():
    got_slope, slope = np.float64(gradients[name])[real], slope[real]
    noise = 1e-5 + 1e-11 * np.abs(want[real][:, None])  # of the differences
    if case.name in ("dpop", "orpo"):  # a kink at Δ_w = 0, a pole at π = 1
      slope = np.where(np.abs(slope) > noise, slope, 0.0)
      assert np.all(got_slope * slope >= 0), (name, where)
    else:
      excess = np.abs(got_slope - slope) - noise - 1e-3 * np.abs(slope)
      assert np.max(excess) <= 0, (name, where)


@each_loss
def test_ties_and_probabilities_of_one_give_finite_slopes(case):
  values = loss_cases.values_of(case, seed=0)
  for name in values:
    if name.endswith(("logps", "rewards", "kl", "probs")):
      values[name] = np.zeros_like(values[name])
  scale = np.ones((2, 3))
  for leaf in jax.tree.leaves(
    loss_cases.value_and_gradients(case, values, scale, "float32")
  ):
    assert np.all(np.isfinite(leaf))


@each_loss
def test_jit_changes_nothing(case):
  values = loss_cases.values_of(case, seed=2)
  got, _ = loss_cases.value_and_gradients(
    case, values, np.ones((2, 3)), "float32"
  )
  want = loss_cases.loss_of(case, loss_cases.cast(values, "float32"))
  # Fused: sums of numbers up to 100 round in another order.
  for compiled, plain in zip(got, want, strict=True):
    np.testing.assert_allclose(compiled, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
  "case", [c for c in loss_cases.FEW if loss_cases.numeric(c)], ids=str
)
def test_every_numeric_field_is_an_axis_of_vmap(case):
  values = loss_cases.values_of(case, seed=3)
  arrays, factors = loss_cases.cast(values, "float32"), (0.5, 1.0, 1.5)

  def scaled(factor):
    numbers = loss_cases.numeric(case).items()
    return {name: factor * value for name, value in numbers}

  def loss(factor):
    return loss_cases.loss_of(case, arrays, scaled(factor))[0]

  got = jax.jit(jax.vmap(loss))(jnp.float32(factors))
  for factor, together in zip(factors, got, strict=True):
    alone = case._replace(fields={**case.fields, **scaled(factor)})
    (want, _), _ = loss_cases.value_and_gradients(
      alone, values, np.ones((2, 3)), "float32"
    )
    # One sum more or less in another order.
    np.testing.assert_allclose(
      together, want, rtol=2e-5, atol=2e-6, err_msg=f"{factor} of the fields"
    )


@each_loss
def test_bf16_log_probs_cost_what_f32_ones_do(case):
  values = loss_cases.values_of(case, seed=0)
  want, _ = loss_cases.oracle_of(case, values)
  values = loss_cases.cast(values, "bfloat16")
  got = np.float64(loss_cases.loss_of(case, values)[0])
  real = loss_cases.pull(case, values) != 0
  # 8 bits of mantissa, lost about four times on the way.
  atol = 4 * 2**-8 * np.max(np.abs(want))
  np.testing.assert_allclose(got[real], want[real], rtol=0, atol=atol)


def test_every_loss_has_an_oracle():
  assert set(loss_cases.FIELDS) == set(losses.LOSSES)
  for name in losses.LOSSES:
    assert inspect.isfunction(getattr(oracles, name)), name
  functions = {loss.fn for loss in losses.LOSSES.values()}
  assert len(functions) == len(losses.LOSSES) >= 30


def test_every_divergence_of_every_loss_of_h_has_a_case():
  names = set(losses.DIVERGENCES)
  assert {"reverse_kl", *names} == set(oracles.DIVERGENCES)
  found = {(c.name, c.divergence) for c in loss_cases.CASES}
  for name, loss in losses.LOSSES.items():
    for divergence in names:
      assert ((name, divergence) in found) == loss.of_h


@pytest.mark.parametrize(
  "name", [n for n, loss in losses.LOSSES.items() if loss.dialects]
)
def test_every_dialect_has_a_case_and_an_unknown_one_is_refused(name):
  case = loss_cases.of(name)
  values = loss_cases.values_of(case, seed=0)
  message = r"loss.dialect = 'papr' is not known; did you mean 'paper'"
  with pytest.raises(ValueError, match=message) as error:
    loss_cases.out_of(case, values, {"dialect": "papr"})
  allowed = re.search(r"allowed: (.*)\)", str(error.value)).group(1)
  found = {c.fields["dialect"] for c in loss_cases.CASES if c.name == name}
  assert found == set(allowed.split(", ")) == set(losses.LOSSES[name].dialects)


@each_name
def test_a_loss_takes_its_config_fields_and_no_others(name):
  loss = losses.LOSSES[name]
  keywords = set(inspect.signature(loss.fn).parameters)
  keywords -= {"policy_logps", "ref_logps", "rewards", *loss.needs}
  assert keywords == set(loss.defaults)
  assert ("dialect" in keywords) == bool(loss.dialects)


@each_name
def test_the_argument_of_a_config_selects_a_loss_with_its_facts(name):
  loss = losses.LOSSES[name]
  fields = losses_config.loss(name).to_dict()
  assert fields == {"name": name, **loss.defaults}
  assert losses_config.needs_reference(name) == loss.reference


@pytest.mark.parametrize(
  "name", [n for n, loss in losses.LOSSES.items() if not loss.reference]
)
def test_what_is_said_to_read_no_reference_reads_none(name):
  case = loss_cases.of(name)
  values = loss_cases.values_of(case, seed=0)
  want = loss_cases.out_of(case, values)["loss"]
  if "ref_logps" in values:
    values["ref_logps"] = np.full_like(values["ref_logps"], np.nan)
  got = loss_cases.out_of(case, values)["loss"]
  jax.tree.map(np.testing.assert_array_equal, got, want)


@each_name
def test_the_bounds_of_a_loss_are_of_its_fields_and_hold_of_its_defaults(name):
  loss = losses.LOSSES[name]
  assert set(loss.ranges) <= set(loss.defaults)
  for field, value in loss.defaults.items():
    for bound in loss.ranges.get(field, losses.RANGES.get(field, ())):
      assert bound.holds(value), field
      assert not bound.holds(float("nan")), field


@each_name
def test_a_docstring_has_formula_arguments_optimum_and_source(name):
  doc = inspect.getdoc(losses.LOSSES[name].fn)
  assert re.search(r"^ {4}(\w+: +)?loss(_i)? = ", doc, re.M)
  for heading in ("Args:", "Returns:", "Optimum:", "Source:"):
    assert re.search(rf"^{heading}", doc, re.M), heading
  _, arguments = doc.split("\nArgs:")
  for argument in inspect.signature(losses.LOSSES[name].fn).parameters:
    assert re.search(rf"^  [\w, ]*\b{argument}\b.*:", arguments, re.M), argument
