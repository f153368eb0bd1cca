"""A loss of the user's own: what it logs, and that a run knows its code."""

import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dpo_jax import loop, sweeps
from dpo_jax.algos import terms
from dpo_jax.config import load as load_lib
from dpo_jax.ops import losses
from dpo_jax.ops.losses import base
from tests import conftest, folders


def squared(policy_logps, ref_logps, *, beta):
  h = base.margins(base.log_ratios(policy_logps, ref_logps))
  return {"loss": (1 - beta * h) ** 2}


def cubed(policy_logps, ref_logps, *, beta):
  h = base.margins(base.log_ratios(policy_logps, ref_logps))
  return {"loss": jnp.abs(1 - beta * h) ** 3}


def without_beta(policy_logps, ref_logps):
  h = base.margins(base.log_ratios(policy_logps, ref_logps))
  return {"loss": (1 - h) ** 2}


def anchored(policy_logps, ref_logps, *, beta):
  """Reads more than Δ: the policy's own log-prob."""
  out = squared(policy_logps, ref_logps, beta=beta)
  return {"loss": out["loss"] - policy_logps[..., 0]}


def load(*overrides, beta=0.5):
  path = str(conftest.ROOT / "configs/dpo.py:smoke")
  config = load_lib.load_config(path, ("log.every=1", *overrides))
  fields = {"name": "mine"} | ({} if beta is None else {"beta": beta})
  config.loss = ml_collections.ConfigDict(fields)
  return config


@pytest.fixture
def mine(monkeypatch):
  """Function that makes another function the loss "mine"."""

  def become(function, **facts):
    monkeypatch.setitem(losses.LOSSES, "mine", losses.Loss(function, **facts))

  return become


POLICY = jnp.asarray([[-3.0, -7.0], [-4.0, -2.0]])
REF = jnp.asarray([[-4.0, -6.0], [-3.0, -5.0]])


@pytest.mark.parametrize(
  ("function", "beta", "facts", "ratios", "factor"),
  [
    (squared, 0.5, {}, POLICY - REF, 0.5),
    (without_beta, None, {}, POLICY - REF, 1.0),
    (squared, 0.5, {"reference": False}, POLICY, 0.5),
  ],
)
def test_a_loss_alone_gets_the_rewards_of_its_beta(
  mine, function, beta, facts, ratios, factor
):
  mine(function, **facts)
  (part,) = terms.of(load(beta=beta).loss)
  values = {"policy_logps": POLICY, "ref_logps": REF}
  out = part.out(values, {"beta": 0.5})
  rewards = factor * np.asarray(ratios)
  np.testing.assert_allclose(out["rewards/chosen"], rewards[:, 0])
  np.testing.assert_allclose(
    out["rewards/margins"], rewards[:, 0] - rewards[:, 1]
  )
  np.testing.assert_allclose(
    out["rewards/accuracies"], rewards[:, 0] > rewards[:, 1]
  )
  np.testing.assert_allclose(out["logps/rejected"], POLICY[:, 1])


def test_a_loss_that_brings_metrics_keeps_them_and_no_others(mine):
  def own(policy_logps, ref_logps, *, beta):
    return {**squared(policy_logps, ref_logps, beta=beta), "mine": ref_logps}

  mine(own)
  (part,) = terms.of(load().loss)
  out = part.out({"policy_logps": POLICY, "ref_logps": REF}, {"beta": 0.5})
  assert set(out) == {"loss", "mine"}


def test_losses_of_the_package_return_metrics_of_their_own():
  """So the rule changes none of them."""
  config = load_lib.load_config(str(conftest.ROOT / "configs/dpo.py:smoke"))
  (part,) = terms.of(config.loss)
  assert not part.code
  values = {"policy_logps": POLICY, "ref_logps": REF}
  hparams = {"beta": 0.1, "label_smoothing": 0.0}
  own = losses.LOSSES["dpo"].fn(POLICY, REF, **hparams)
  assert part.out(values, hparams).keys() == own.keys()


@pytest.mark.slow
def test_a_loss_whose_code_changed_is_not_done_before(mine, tmp_path, capsys):
  mine(squared)
  first = loop.fit(load(), tmp_path)
  assert {"rewards/margins", "rewards/accuracies"} <= first.history[0].keys()
  mine(squared)  # the cell, run again
  loop.fit(load(), tmp_path)
  mine(cubed)
  changed = r"the code of LOSSES\['mine'\] \(saved .*, now .*new --workdir"
  with pytest.raises(ValueError, match=changed):
    loop.fit(load("train.steps=4"), tmp_path)
  with pytest.raises(ValueError, match=changed):
    loop.fit(load(), tmp_path)
  mine(squared)
  assert loop.fit(load("train.steps=3"), tmp_path).history[-1]["step"] == 3


def test_a_loss_of_the_package_that_became_another_is_seen(
  tmp_path, monkeypatch
):
  config = load_lib.load_config(str(conftest.ROOT / "configs/dpo.py:smoke"))
  folders.untrained(config, tmp_path, step=config.train.steps)

  def dpo(policy_logps, ref_logps, *, beta, label_smoothing):
    return squared(policy_logps, ref_logps, beta=beta + label_smoothing)

  row = losses.LOSSES["dpo"]._replace(function=dpo)
  monkeypatch.setitem(losses.LOSSES, "dpo", row)
  with pytest.raises(ValueError, match="the code of LOSSES"):
    loop.fit(config, tmp_path)


def test_a_point_of_a_sweep_whose_loss_changed_is_not_skipped(
  mine, tmp_path, capsys
):
  points = [{"loss.beta": 0.5}]
  mine(squared)
  assert sweeps.sweep(load(), points, tmp_path) == 0
  assert sweeps.sweep(load(), points, tmp_path) == 0
  assert "done before, skipped" in capsys.readouterr().out
  mine(cubed)
  with pytest.raises(ValueError, match="the code of LOSSES"):
    sweeps.sweep(load(), points, tmp_path)
  assert "done before" not in capsys.readouterr().out
  path = tmp_path / "beta=0.5/evaluation.json"
  assert "the code of LOSSES['mine']" in json.loads(path.read_text())


def test_a_loss_may_read_more_than_the_rewards(mine, tmp_path):
  mine(anchored)
  rows = loop.fit(load(), tmp_path).history
  assert rows[0]["loss"] > 2
  assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
