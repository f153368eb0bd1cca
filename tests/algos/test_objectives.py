"""Terms of a batch: weights, references, fields, needed FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dpo_jax import tree
from dpo_jax.algos import preference, sft
from dpo_jax.data.tokens import comparisons
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder
from dpo_jax.ops import attention, losses, reduce
from dpo_jax.run import build, recorder
from dpo_jax.train import optim, optimizers
from tests import conftest, worlds
from tests.parallel import test_topology as topology

HPARAMS = {"beta": 0.3, "label_smoothing": 0.1}
ITEMS = worlds.examples(5, seed=6)


def terms_of(algo, config, batch, ref_scale=0.05):
  model, params = worlds.model("llama")
  algorithm = algo.make(config, model.apply)
  frozen = {"ref": worlds.noisy(params, 7, ref_scale)}

  @jax.jit
  def terms(params, frozen, batch):
    prepared = algorithm.prepare(batch, frozen, {})
    return algorithm.objective(params, {}, prepared, HPARAMS)

  return terms(params, frozen, batch)


def test_a_comparison_counts_by_its_weight():
  soft = [0.5, 2.0, 0.0, 1.0, 0.25]
  items = [
    e._replace(pairs=((0, 1, w),)) for e, w in zip(ITEMS, soft, strict=True)
  ]
  config = topology.config_of()
  plain = terms_of(preference, config, worlds.batch(ITEMS)).losses["dpo"]
  values, ones = (np.asarray(x) for x in plain)
  want = np.average(values[ones > 0], weights=soft)
  got = terms_of(preference, config, worlds.batch(items))
  np.testing.assert_allclose(reduce.means(got.losses)["dpo"], want, rtol=1e-6)
  # The metrics are weighted alike.
  values, weights = got.metrics["rewards/margins"]
  np.testing.assert_array_equal(np.asarray(weights)[0, :5], soft)


def test_a_soft_label_is_a_mean_of_the_losses_of_both_ways_round():
  """P · loss(i ≻ j) + (1 − P) · loss(j ≻ i)."""

  def loss(pairs):
    items = [e._replace(pairs=pairs) for e in ITEMS]
    terms = terms_of(preference, topology.config_of(), worlds.batch(items))
    return reduce.means(terms.losses)["dpo"]

  soft = comparisons.weighted([(0, 1)], [0.7])
  one, other = loss(((0, 1, 1.0),)), loss(((1, 0, 1.0),))
  want = 0.7 * one + 0.3 * other
  np.testing.assert_allclose(loss(soft), want, rtol=1e-6)
  assert abs(one - other) > 1e-3


def test_sft_leaves_out_completions_of_weight_zero():
  config = topology.config_of("sft", "sft")
  batch = worlds.batch(ITEMS)
  whole = terms_of(sft, config, batch).losses["sft"]
  # Not in place: the first program may still read the array.
  weights = batch["completion_weights"].copy()
  weights[0, 2, 1] = 0
  batch["completion_weights"] = weights
  some = terms_of(sft, config, batch).losses["sft"]
  dropped = 2 * 2 + 1
  np.testing.assert_array_equal(some[0], whole[0])
  assert some[1][0, dropped] == 0
  assert whole[1][0, dropped] == len(ITEMS[2].completions[1])
  others = np.delete(np.asarray(some[1][0]), dropped)
  np.testing.assert_array_equal(others, np.delete(whole[1][0], dropped))


def test_without_a_reference_the_rewards_are_the_policys_own():
  config = topology.config_of()
  config.ref = "none"
  metrics = terms_of(preference, config, worlds.batch(ITEMS)).metrics
  for side in ("chosen", "rejected"):
    np.testing.assert_allclose(
      metrics[f"rewards/{side}"][0],
      0.3 * metrics[f"logps/{side}"][0],
      rtol=1e-6,
    )


def test_cached_reference_log_probs_replace_the_reference():
  config = topology.config_of()
  batch = worlds.batch(ITEMS)
  model, params = worlds.model("llama")
  algorithm = preference.make(config, model.apply)
  prepared = jax.jit(algorithm.prepare)(batch, {"ref": params}, {})
  cached = {**batch, "ref_token_logps": prepared["ref_token_logps"]}
  assert algorithm.prepare(cached, {}, {}) is cached
  objective = jax.jit(algorithm.objective)
  got = objective(params, {}, cached, HPARAMS).losses["dpo"]
  want = objective(params, {}, prepared, HPARAMS).losses["dpo"]
  np.testing.assert_array_equal(got[0], want[0])


def test_a_loss_needs_its_own_fields():
  config = topology.config_of()
  config.loss.name = "ipo"
  with pytest.raises(ValueError, match=r"--config FILE.py:loss=ipo"):
    preference.make(config, None)
  config = topology.config_of("sft", "sft")
  config.ref = "frozen"
  with pytest.raises(ValueError, match="ref = 'frozen' has no effect"):
    sft.make(config, None)


class Reads:
  """Options that write down which fields are read."""

  def __init__(self, options):
    self.options, self.names = options, set()

  def __getattr__(self, name):
    self.names.add(name)
    return self.options[name]


def test_optimizers_take_their_config_fields_and_no_others():
  for name, kind in optimizers.OPTIMIZERS.items():
    options = common.optim(name)
    optim.make(options, 10)
    reads = Reads(options)
    kind.make(reads)
    own = set(kind.defaults) - {"learning_rate"}  # the step multiplies by it
    assert reads.names == own
    assert set(options) == {"name", *kind.defaults, *optimizers.COMMON}


def test_registries_take_a_notebooks_own_entries(monkeypatch):
  monkeypatch.setitem(attention.ATTENTION, "mine", attention.ATTENTION["xla"])
  config = dataclasses.replace(worlds.MODELS["llama"], attention="mine")
  assert decoder.build(config, 11)
  with pytest.raises(ValueError, match=r"model.attention.*did you mean 'mine'"):
    decoder.build(dataclasses.replace(config, attention="mien"), 11)
  monkeypatch.setitem(losses.LOSSES, "mine", losses.LOSSES["hinge"])
  loss = topology.config_of().loss
  del loss.label_smoothing
  config = topology.config_of()
  config.loss = loss
  config.loss.name = "mine"
  values, _ = terms_of(preference, config, worlds.batch(ITEMS)).losses["mine"]
  assert bool(jnp.all(jnp.isfinite(values)))


@pytest.mark.parametrize("name", list(worlds.MODELS))
def test_needed_flops_count_every_kernel_and_every_visible_pair(name):
  c = worlds.MODELS[name]
  init = decoder.build(c, worlds.VOCAB).init
  kernels = sum(
    leaf.size
    for path, leaf in tree.named(jax.eval_shape(init, jax.random.key(0)))
    if path.startswith(("layers", "rest")) and "kernel" in path
  )
  tokens, scored, visible = 100, 40, 700
  # q·k and probs·v: H multiply-adds for each head of each pair.
  scores = 2 * c.heads * c.head_dim * visible
  head = c.embed * worlds.VOCAB * scored
  want = 2 * (kernels * tokens + head), 2 * scores
  got = model_config.matmul_flops(c, worlds.VOCAB, tokens, scored, visible)
  assert got == want


def sum_of_flops(*args):
  return sum(model_config.matmul_flops(*args))


def test_a_run_counts_the_reference_pass_and_sets_its_precision(monkeypatch):
  from dpo_jax.config import load

  monkeypatch.chdir(conftest.ROOT)
  before = jax.config.jax_default_matmul_precision
  try:
    config = load.load_config("configs/dpo.py:smoke", ["precision=default"])
    run = build.prepare(config)
    assert jax.config.jax_default_matmul_precision == "default"
    _, stats = run.feed.loader.batch(0)
    one = sum_of_flops(
      run.setup.model.config, 257, stats.tokens, stats.scored, stats.visible
    )
    assert recorder.step_flops(run, stats) == 4 * one
    alone = build.prepare(load.load_config("configs/sft.py:smoke"))
    _, stats = alone.feed.loader.batch(0)
    one = sum_of_flops(
      run.setup.model.config, 257, stats.tokens, stats.scored, stats.visible
    )
    assert recorder.step_flops(alone, stats) == 3 * one
  finally:
    jax.config.update("jax_default_matmul_precision", before)
