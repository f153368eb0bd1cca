"""A run that is traced."""

import gzip
import json

import jax.numpy as jnp

from dpo_jax import cli
from dpo_jax.train import profile
from tests import conftest


def test_the_trace_opens_and_holds_steps_of_the_run(tmp_path, capsys):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  argv = ["train", "--config", config, "--workdir", str(tmp_path)]
  fields = "--config.train.steps=6", "--config.data.eval=None"
  assert cli.main([*argv, "--profile", *fields]) == 0
  assert "ui.perfetto.dev" in capsys.readouterr().out
  (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  with gzip.open(trace) as file:
    events = json.load(file)["traceEvents"]
  steps = [e for e in events if "moving_step" in e.get("name", "")]
  assert len({e["ts"] for e in steps}) >= 3
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_of_fewer_steps_traces_its_last(tmp_path):
  said = []
  traced = profile.Profile(tmp_path, 0, 2, said.append, wanted=True)
  for number in (1, 2):
    traced.before(number)
    assert not said
    traced.after(number, jnp.zeros(()))
  assert len(said) == 1
  assert list((tmp_path / "profile").rglob("*.trace.json.gz"))
