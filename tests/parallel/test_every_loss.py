"""Every loss through the real step: it trains, wherever the batch is cut.

What a loss does with the log-probs of a batch does not depend on what computes
them, so every loss meets every cut with a model of two tables, which compiles
in a moment; and with a decoder each that depends on the cut meets one, in turn.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import losses as fields
from dpo_jax.algos import base, preference
from dpo_jax.algos import terms as terms_lib
from dpo_jax.ops import losses, reduce
from dpo_jax.train import step as step_lib
from tests import worlds
from tests.parallel import test_topology as topology

TRAINED = [n for n, loss in losses.LOSSES.items() if not loss.of_rewards]
COUPLED = [n for n in TRAINED if losses.LOSSES[n].batch_level]
NEEDY = [
  *("sampo", "ld_dpo", "wpo", "tdpo1", "tdpo2", "odpo", "plackett_luce"),
  *("simpo", "nll", "rpo", "mpo"),
]
ITEMS = worlds.examples(16, seed=1, completions=4)


@functools.cache
def config_of(loss):
  return topology.config_of(loss=loss)


def items_of(loss):
  """Examples with scores and rankings, as a loss compares them."""
  items = []
  for e in ITEMS:
    ranks = tuple(range(len(e.completions)))
    scores = tuple(float(len(ranks) - k) for k in ranks)
    items.append(e._replace(ranking=ranks, scores=scores))
  kind = terms_lib.kind_of(config_of(loss).loss)
  return worlds.arranged(items, kind, loss == "odpo")


def compute(loss, name, *, chunk=None, **how):
  """(gradient, metrics, parameters after a step) of a loss and a model."""
  config = config_of(loss)
  hparams = base.numeric_fields(config.loss)
  if "beta" in hparams:
    hparams["beta"] = max(hparams["beta"], 0.05)  # or rounding is all there is
  hparams["learning_rate"] = 0.1
  how |= {"config": config, "items": items_of(loss)}
  how["hparams"] = {k: jnp.float32(v) for k, v in hparams.items()}
  if name == "tables":
    return topology.compute_of(
      functools.partial(worlds.tables_apply, chunk=chunk),
      worlds.tables(),
      **how,
    )
  return topology.compute(name, chunk=chunk, **how)


@functools.cache
def truth(loss, name):
  return compute(loss, name, packed=False, shared=False)


# The fast tier takes the gradient of the others in tests/ops, and names them in
# tests/test_switching.py.
@pytest.mark.parametrize(
  "loss",
  [
    loss
    if loss in (*NEEDY, *COUPLED, "dpo", "simpo")
    else pytest.param(loss, marks=pytest.mark.slow)
    for loss in TRAINED
  ],
)
def test_every_loss_trains_a_step(loss):
  gradient, metrics, _ = truth(loss, "tables")
  assert np.isfinite(metrics["loss"])
  assert metrics["grad_norm"] > 1e-3
  for leaf in jax.tree.leaves(gradient):
    assert np.all(np.isfinite(leaf))


CUT = {
  "packed, chunked": {"chunk": 7, "extra": 3},
  "accumulation": {"row_multiple": 4, "accumulation": 4},
  "mesh, chunked": {"mesh": topology.MESH, "row_multiple": 4, "chunk": 7},
  "mesh, accumulation": topology.DEVICES["mesh 2x2x2, accumulation"],
  "pmap": topology.DEVICES["pmap over 8"],
  "pmap, accumulation": topology.DEVICES["pmap over 8, accumulation"],
}


def slow_but(*fast):
  return [
    pytest.param(cut, marks=() if cut in fast else pytest.mark.slow)
    for cut in CUT
  ]


@pytest.mark.parametrize("cut", slow_but("pmap, accumulation"))
@pytest.mark.parametrize("loss", COUPLED)
def test_a_coupled_loss_is_that_of_the_global_batch(loss, cut):
  """Sorted ranks, reference points and δ see all of it: two stages where the
  batch is cut."""
  assert_cut_changes_nothing(loss, cut, "tables")


@pytest.mark.parametrize("cut", slow_but("mesh, accumulation"))
# tdpo1 needs what tdpo2 needs, and mpo what nll and rpo need.
@pytest.mark.parametrize(
  "loss",
  [
    pytest.param(loss, marks=pytest.mark.slow)
    if loss in ("tdpo2", "nll", "rpo")
    else loss
    for loss in NEEDY
  ],
)
def test_what_a_loss_needs_does_not_depend_on_the_cut(loss, cut):
  assert_cut_changes_nothing(loss, cut, "tables")


# Each with another cut than the one before it.
DECODED = list(zip((*NEEDY, *COUPLED), itertools.cycle(CUT), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "cut"), DECODED)
def test_of_a_decoder_too(loss, cut):
  assert_cut_changes_nothing(loss, cut, "llama")


def assert_cut_changes_nothing(loss, cut, name):
  got, want = compute(loss, name, **CUT[cut]), truth(loss, name)
  topology.assert_equal_up_to_rounding(got, want)


def test_a_per_device_statistic_would_be_seen(monkeypatch):
  """KTO's reference point from the rows of a device alone is another."""
  monkeypatch.setattr(reduce, "gather_rows", lambda tree, axis_name: tree)
  with pytest.raises(AssertionError):
    topology.assert_equal_up_to_rounding(
      compute("kto_pair", "tables", **CUT["pmap"]), truth("kto_pair", "tables")
    )


def test_a_mixture_is_the_weighted_sum_of_its_terms():
  """0.8 DPO + 0.2 BCO + NLL: means over pairs and a mean over tokens."""
  _, whole, _ = truth("mpo", "tables")
  terms = fields.parse("mpo")
  assert terms == [(0.8, "dpo"), (0.2, "bco"), (1.0, "nll")]
  config = config_of("mpo").loss
  assert config.dpo.beta == config.bco.beta == 0.1
  parts_of = {name: whole[f"losses/{name}"] for _, name in terms}
  np.testing.assert_allclose(
    whole["loss"], sum(w * parts_of[n] for w, n in terms), rtol=1e-6
  )
  nll, dpo = (truth(name, "tables")[1] for name in ("nll", "dpo"))
  np.testing.assert_allclose(parts_of["nll"], nll["loss"], rtol=1e-5)
  np.testing.assert_allclose(parts_of["dpo"], dpo["loss"], rtol=1e-5)
  # The metrics are those of the heaviest term.
  assert whole["rewards/margins"] == dpo["rewards/margins"]


def test_bco_keeps_the_mean_of_its_rewards_between_steps():
  """δ is the mean over steps of the batches' mean rewards."""
  algorithm = preference.make(config_of("bco"), worlds.tables_apply)
  step = jax.jit(
    step_lib.make(
      algorithm, topology.recording_sgd(), accumulation=1, axis_name=None
    )
  )
  params = worlds.tables()
  state = topology.make_state(params, algorithm.extra(params))
  hparams = {"beta": jnp.float32(0.1), "learning_rate": jnp.float32(0.05)}
  batch, rewards = worlds.batch(items_of("bco")), []
  for count in range(1, 4):
    state, metrics = step(state, batch, hparams)
    rewards.append(
      (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
    )
    assert state.extra["running"]["count"] == count
    np.testing.assert_allclose(
      state.extra["running"]["mean"], np.mean(rewards), rtol=1e-5
    )
