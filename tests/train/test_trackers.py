"""What TensorBoard and Weights & Biases get is what metrics.jsonl holds."""

import json
import sys
import time
import types

import numpy as np
import pytest

from dpo_jax import loop
from dpo_jax.config import load as load_lib
from dpo_jax.run import build
from dpo_jax.train import trackers
from tests import conftest, folders


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  overrides = ("log.every=1", "eval.every=1", *overrides)
  return load_lib.load_config(config, overrides)


@pytest.fixture(scope="module")
def run():
  """A Run whose programs and data all of these share."""
  return build.prepare(load())


def fit(config, workdir, run):
  loop.fit(config, workdir, folders.sharing(config, run))


def logged(workdir):
  """{(kind/name, step): value} of metrics.jsonl."""
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {
    (f"{row['kind']}/{name}", row["step"]): value
    for row in rows
    for name, value in row.items()
    if name not in ("kind", "step")
  }


class FakeWandb(types.ModuleType):
  """Keeps what the client is given."""

  def __init__(self):
    super().__init__("wandb")
    self.runs, self.values, self.finished = [], {}, 0

  def init(self, **options):
    self.runs.append(options)
    return self

  def log(self, values, step):
    self.values |= {(name, step): value for name, value in values.items()}

  def finish(self):
    self.finished += 1


def test_wandb_gets_every_value_and_a_resumed_run_keeps_its_name(
  tmp_path, monkeypatch, run
):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for steps in (2, 3):
    fit(load("log.wandb=mine", f"train.steps={steps}"), tmp_path, run)
  assert fake.values == logged(tmp_path)
  assert fake.finished == 2
  first, second = fake.runs
  assert first["id"] == second["id"]
  assert (first["project"], first["name"]) == ("mine", tmp_path.name)
  assert second["config"]["train"]["steps"] == 3


@pytest.mark.parametrize(
  ("package", "override"),
  [("wandb", "log.wandb=mine"), ("tensorboardX", "log.tensorboard=true")],
)
def test_a_missing_package_is_named_before_training(
  tmp_path, monkeypatch, package, override, run
):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=r"pip install 'dpo_jax\[log\]'"):
    fit(load(override), tmp_path, run)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_nothing_is_opened_unless_the_config_asks(tmp_path):
  assert trackers.make(load().log, {}, tmp_path, 0) == []


@pytest.mark.slow
def test_tensorboard_shows_the_logged_values_once_after_a_resume(tmp_path, run):
  from tensorboard.backend.event_processing import event_accumulator

  for steps in (2, 3):
    fit(load("log.tensorboard=true", f"train.steps={steps}"), tmp_path, run)
  events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  shown = {
    (tag, event.step): event.value
    for tag in events.Tags()["scalars"]
    for event in events.Scalars(tag)
  }
  wanted = logged(tmp_path)
  assert shown.keys() == wanted.keys()
  # Event files hold f32.
  np.testing.assert_allclose(
    [shown[k] for k in wanted], list(wanted.values()), rtol=1e-6
  )


@pytest.mark.slow
def test_wandb_itself_takes_a_run(tmp_path, monkeypatch, run):
  monkeypatch.setenv("WANDB_MODE", "offline")
  fit(load("log.wandb=mine"), tmp_path, run)
  (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
  deadline = time.monotonic() + 30  # a process of its own writes the file
  while b"rewards/margins" not in file.read_bytes():
    assert time.monotonic() < deadline
    time.sleep(0.1)
