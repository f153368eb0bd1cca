"""Metrics beside the losses: drift, displacement, intervals, calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.algos import diagnostics, preference
from dpo_jax.ops import reduce
from tests import worlds
from tests.parallel import test_topology as topology

RNG = np.random.default_rng(0)


def of_pairs(margin, ratios):
  margin = jnp.asarray(margin)
  nothing = {
    name: jnp.ones((*margin.shape, 2)) for name in ("lengths", "ended")
  }
  out = {"rewards/margins": margin}
  return diagnostics.of_pairs(out, nothing, jnp.asarray(ratios))


def test_a_pair_is_displaced_where_both_log_probs_fall():
  ratios = [[-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0], [0.0, -1.0]]
  got = of_pairs([0.0] * 4, ratios)
  assert got["drift/displaced"].tolist() == [1, 0, 0, 0]
  assert got["drift/chosen"].tolist() == [-1, 1, -1, 0]
  assert got["drift/rejected"].tolist() == [-2, -2, 2, -1]


def test_the_gradient_weight_is_that_of_the_dpo_gradient():
  margin = np.array([-3.0, 0.0, 2.0])
  got = of_pairs(margin, np.zeros((3, 2)))["gradient_weight"]
  np.testing.assert_allclose(got, 1 / (1 + np.exp(margin)), rtol=1e-6)


@pytest.mark.parametrize(
  ("share", "count", "low", "high"),
  [  # Wilson's interval, z = 1.959964, by hand
    (0.5, 100, 0.403832, 0.596168),
    (1.0, 10, 0.722467, 1.0),
    (0.0, 10, 0.0, 0.277533),
  ],
)
def test_wilson_intervals(share, count, low, high):
  got = diagnostics.wilson(jnp.float32(share), jnp.float32(count))
  np.testing.assert_allclose(got, (low, high), atol=2e-6)


def test_a_tie_counts_one_half_in_share_and_interval():
  weights = jnp.ones(4)
  terms = {"rewards/accuracies": (jnp.array([0.5, 0.5, 1.0, 0.0]), weights)}
  got = diagnostics.derived(reduce.means(terms), reduce.denominators(terms))
  assert got["rewards/accuracies"] == 0.5
  ends = got["rewards/accuracies_low"], got["rewards/accuracies_high"]
  np.testing.assert_allclose(sum(ends), 1, rtol=1e-6)


def calibration_of(margins, probability):
  """The error where the first completion wins with the given probability."""
  won = RNG.random(margins.size) < probability
  seen = np.where(won, margins, -margins)  # chosen less rejected
  values = of_pairs(seen, np.zeros((seen.size, 2)))
  terms = {k: (v, jnp.ones(seen.size)) for k, v in values.items()}
  means = reduce.means(terms)
  return diagnostics.derived(means, reduce.denominators(terms)), means


def test_a_bradley_terry_reward_is_calibrated_and_a_doubled_one_is_not():
  margins = RNG.normal(size=40_000) * 1.5
  true = 1 / (1 + np.exp(-margins))
  good, means = calibration_of(margins, true)
  # Ten bins of thousands of draws: each mean within .01 or so.
  assert good["calibration_error"] < 0.02
  assert abs(good["overconfidence"]) < 0.01
  sure, _ = calibration_of(2 * margins, true)
  assert sure["calibration_error"] > 0.06
  assert sure["overconfidence"] > 0.06
  assert not any("calibration/" in name for name in good)
  assert sum("calibration/" in name for name in means) == 10


def two_sources(batch):
  """A batch whose examples come from two sources by turns."""
  return {**batch, "source": batch["example_id"] % 2}


def terms_of(batch, count):
  config = topology.config_of()
  config.data.train = " + ".join(["toy"] * count)
  model, params = worlds.model("llama")
  algorithm = preference.make(config, model.apply)
  ref = {"ref": worlds.noisy(params, 7, 0.05)}
  hparams = {"beta": 0.3, "label_smoothing": 0.0}

  @jax.jit
  def terms(params, ref, batch):
    prepared = algorithm.prepare(batch, ref, {})
    return algorithm.objective(params, {}, prepared, hparams)

  return terms(params, ref, batch)


def test_metrics_by_source_are_those_of_its_examples_alone():
  items = worlds.examples(6, seed=3)
  means = jax.jit(reduce.means)
  both = means(terms_of(two_sources(worlds.batch(items)), 2).metrics)
  for source in (0, 1):
    alone = means(terms_of(worlds.batch(items[source::2]), 1).metrics)
    assert "drift/displaced" in alone
    for name, value in alone.items():
      np.testing.assert_allclose(
        both[f"source{source}/{name}"], value, rtol=1e-4, atol=1e-6
      )


def test_a_source_that_a_batch_lacks_has_no_numbers_rather_than_zeros():
  terms = terms_of(worlds.batch(worlds.examples(4)), 2)
  got = diagnostics.derived(
    reduce.means(terms.metrics), reduce.denominators(terms.metrics)
  )
  assert np.isfinite(got["source0/rewards/margins"])
  assert np.isnan(got["source1/rewards/margins"])


def test_one_source_has_no_metrics_of_its_own():
  metrics = terms_of(worlds.batch(worlds.examples(4)), 1).metrics
  assert not any(name.startswith("source") for name in metrics)


def test_lengths_and_ends_are_those_of_the_completions():
  items = worlds.examples(5, seed=6)
  items = [e._replace(ended=(True, n % 2 == 0)) for n, e in enumerate(items)]
  metrics = reduce.means(terms_of(worlds.batch(items), 1).metrics)
  for side, name in enumerate(("chosen", "rejected")):
    want = np.mean([len(e.completions[side]) for e in items])
    np.testing.assert_allclose(metrics[f"lengths/{name}"], want, rtol=1e-6)
  assert metrics["ended/chosen"] == 1
  np.testing.assert_allclose(metrics["ended/rejected"], 3 / 5, rtol=1e-6)


def test_the_largest_reward_is_found_wherever_it_is():
  terms = terms_of(worlds.batch(worlds.examples(6, seed=3)), 1)
  peak = reduce.peaks(terms.peaks)["rewards/largest"]
  rewards = [
    np.abs(v[0])[np.asarray(v[1]) > 0]
    for k, v in terms.metrics.items()
    if k in ("rewards/chosen", "rewards/rejected")
  ]
  assert peak == np.max(rewards)
