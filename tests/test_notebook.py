"""A loop written in a notebook is the run of `fit`."""

import json

import jax
import numpy as np
import pytest

import dpo_jax as dj
from tests import conftest


def load(*overrides, arg="smoke"):
  return dj.load_config(str(conftest.ROOT / f"configs/dpo.py:{arg}"), overrides)


@pytest.fixture(scope="module")
def built():
  """(apply, params) of `load`."""
  return dj.build(load())


@pytest.mark.parametrize(
  ("arg", "mode"),
  [
    ("smoke", "pmap"),
    ("lora,smoke", "jit"),
    pytest.param("smoke", "jit", marks=pytest.mark.slow),
    pytest.param("lora,smoke", "pmap", marks=pytest.mark.slow),
  ],
)
def test_steps_in_a_notebook_log_what_fit_logs(arg, mode, tmp_path):
  overrides = (f"mesh.mode={mode}", "train.steps=3", "log.every=1")
  config = load(*overrides, "data.eval=None", arg=arg)
  dj.fit(config, tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  wanted = [json.loads(line) for line in lines]
  apply, params = dj.build(config)
  step, state = dj.train_step(config, apply, params)
  step, state, place = dj.parallelize(config, step, state)
  hparams = {"beta": 0.1, "label_smoothing": 0.0, "learning_rate": 1e-3}
  seen = []
  for batch in dj.batches(config):
    state, metrics = step(state, place(batch), hparams)
    seen.append({k: float(v) for k, v in metrics.items()})
  assert len(seen) == len(wanted) == 3
  for ours, theirs in zip(seen, wanted, strict=True):
    for name, value in ours.items():
      # One program, one batch, one start: f32 rounding at the most.
      np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-7)


def test_an_adapter_of_a_notebook_begins_at_its_base(built):
  """A whole objective, or a graft left out, would not know its parameters."""
  config = load("train.steps=1", arg="lora,smoke")
  apply, base = built
  _, state = dj.train_step(config, apply, base)
  terms = jax.jit(dj.objective(config, apply))
  batch = next(dj.batches(config))
  hparams = {"beta": 0.1, "label_smoothing": 0.0}
  values, weights = terms(state.params, state.frozen, batch, hparams).losses[
    "dpo"
  ]
  np.testing.assert_allclose(values[weights > 0], np.log(2), rtol=1e-5)
  moved = jax.tree.map(lambda x: x + 0.1, state.params)
  values, _ = terms(moved, state.frozen, batch, hparams).losses["dpo"]
  assert np.abs(values[weights > 0] - np.log(2)).max() > 1e-2


def test_a_sweep_in_a_notebook_leaves_a_folder_a_point(tmp_path):
  points = [{"loss.beta": 0.1}, {"loss.beta": 1.0}]
  assert dj.sweep(load("train.steps=1"), points, tmp_path) == 0
  found = [
    json.loads((tmp_path / f"beta={b}/evaluation.json").read_text())
    for b in (0.1, 1.0)
  ]
  assert [f["config"]["loss"]["beta"] for f in found] == [0.1, 1.0]


def test_a_cached_reference_works_in_a_notebook_without_a_store(built):
  config = load("ref=cached")
  apply, params = built
  batch = next(dj.batches(config))
  hparams = {"beta": 0.1, "label_smoothing": 0.0}
  terms = jax.jit(dj.objective(config, apply))
  values, weights = terms(params, {"ref": params}, batch, hparams).losses["dpo"]
  np.testing.assert_allclose(values[weights > 0], np.log(2), rtol=1e-5)
  with pytest.raises(ValueError, match="no frozen reference"):
    terms(params, {}, batch, hparams)


def test_a_train_step_needs_its_number_of_steps(built):
  config = load("train.steps=None")
  apply, params = built
  with pytest.raises(ValueError, match=r"set train\.steps"):
    dj.train_step(config, apply, params)
