"""Rotary positions: what a scaling does, and that it is transformers' own."""

import math

import numpy as np
import pytest

from dpo_jax.models import config as model_config
from dpo_jax.models import families, rope
from tests.models import parity

LLAMA = "meta-llama/Llama-2-7b-hf"
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
# Rotations over 256 positions: 41, 8.8 (kept), 1.9 (between), 0.4 … (divided).
THREE_REGIMES = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 256,
}
LONG = {
  "short_factor": [1.5, 2.5, 4.0, 1.0],
  "long_factor": [9.0, 9.0, 9.0, 9.0],
}
LONGROPE = {**LONG, "original_max_position_embeddings": 32}
# Of a Llama: (rope_scaling, other changes).
SCALINGS = {
  "linear": ({"rope_type": "linear", "factor": 4.0}, {}),
  "linear, by its older name": ({"type": "linear", "factor": 4.0}, {}),
  "llama3, all three regimes": (
    {"rope_type": "llama3", **THREE_REGIMES},
    {"head_dim": 12},
  ),
  "yarn": ({"rope_type": "yarn", **YARN}, {}),
  "yarn, its own magnitude": (
    {"rope_type": "yarn", **YARN, "attention_factor": 0.8},
    {},
  ),
  "yarn, factor from the positions": (
    {"rope_type": "yarn", **YARN, "factor": None},
    {"max_position_embeddings": 48},
  ),
  "yarn, fractions of dimensions": (
    {
      "rope_type": "yarn",
      **YARN,
      "truncate": False,
      "beta_fast": 2.0,
      "beta_slow": 0.3,
    },
    {},
  ),
  "longrope": (
    {"rope_type": "longrope", **LONGROPE},
    {"max_position_embeddings": 96},
  ),
  "longrope, its own magnitude": (
    {
      "rope_type": "longrope",
      **LONGROPE,
      "factor": 4.0,
      "attention_factor": 1.25,
    },
    {},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_rotation_is_that_of_transformers(name, tmp_path, capsys):
  scaling, changes = SCALINGS[name]
  raw = parity.small(LLAMA, rope_scaling=scaling, **changes)
  unscaled = {"rope_scaling": None}
  numbers = parity.measure(raw, tmp_path, fault=unscaled)
  parity.show(capsys, f"rope: {name}", numbers)
  parity.assert_equal_up_to_rounding(numbers)


def of(**scaling):
  """(frequencies, magnitude) that the config.json of a small Llama asks for."""
  raw = parity.small(LLAMA, head_dim=12, rope_scaling=scaling)
  config, _ = families.read(raw)
  return rope.frequencies(12, config.rope_theta, config.rope_scaling)


PLAIN = 10_000.0 ** (-np.arange(6) / 6)


def test_a_frequency_is_a_power_of_the_base():
  got, magnitude = rope.frequencies(12, 10_000.0, None)
  np.testing.assert_allclose(got, PLAIN, rtol=1e-6)  # f32
  assert magnitude == 1


def test_linear_scaling_turns_position_4p_as_far_as_p():
  got, magnitude = of(rope_type="linear", factor=4.0)
  np.testing.assert_allclose(4 * got, PLAIN, rtol=1e-6)
  assert magnitude == 1


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
  got, magnitude = of(rope_type="llama3", **THREE_REGIMES)
  rotations = 256 * PLAIN / (2 * math.pi)
  between = (rotations[2] - 1) / (4 - 1)
  want = PLAIN / [1, 1, 1 / (between + (1 - between) / 8), 8, 8, 8]
  assert 0.1 < between < 0.9
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert magnitude == 1


def test_yarn_goes_over_by_dimension_and_grows_the_queries():
  # 256 / 2π = 40.7 positions a radian: 32 rotations end in dimension 0, one in
  # 6 · log 40.7 / log 10⁴ = 2.4, rounded out to 3.
  got, magnitude = of(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=256
  )
  divided = np.float64([0, 1 / 3, 2 / 3, 1, 1, 1])
  want = PLAIN * (divided / 4 + 1 - divided)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_longrope_takes_the_short_divisors_and_their_positions():
  """The long ones are for sequences that max_positions then refuses."""
  raw = parity.small("microsoft/Phi-3-mini-128k-instruct")
  config, _ = families.read(raw)
  assert config.max_positions == 4096
  scaling = config.rope_scaling
  assert scaling.divisors == tuple(raw["rope_scaling"]["short_factor"])
  assert scaling.magnitude == pytest.approx(
    math.sqrt(1 + math.log(32) / math.log(4096))
  )
  got, _ = rope.frequencies(8, 1e4, scaling)
  plain, _ = rope.frequencies(8, 1e4, None)
  np.testing.assert_allclose(got * scaling.divisors, plain, rtol=1e-6)


def test_a_rotation_keeps_lengths_and_depends_on_distances_alone():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 8)).astype(np.float32)
  scaling = model_config.RopeScaling("linear", factor=2.0)

  def product(at_q, at_k):
    turned = [
      rope.rotate(x[None], rope.tables(np.int32([[at]]), 6, 100.0, scaling))
      for x, at in ((q, at_q), (k, at_k))
    ]
    np.testing.assert_allclose(
      np.linalg.norm(turned[0]), np.linalg.norm(q), rtol=1e-6
    )
    return float(np.sum(turned[0] * turned[1]))

  # f32 rounding of cos and sin of angles up to 10.
  assert product(9, 2) == pytest.approx(product(17, 10), abs=1e-5)
  assert abs(product(9, 2) - product(9, 3)) > 1e-3


def test_a_partial_rotation_is_refused_where_transformers_has_none():
  raw = parity.small(LLAMA, partial_rotary_factor=0.5)
  with pytest.raises(ValueError, match="partial_rotary_factor"):
    families.read(raw)
