"""Whole runs on a GPU."""

import gzip
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax import loop
from dpo_jax.config import load as load_lib
from dpo_jax.ops.attention import choice
from dpo_jax.run import build, trained
from tests import conftest

FULL = ("model.dtype=float32", "log.every=1", "train.steps=6")


def load(*overrides, spec="configs/dpo.py:smoke"):
  return load_lib.load_config(str(conftest.ROOT / spec), overrides)


def losses(config, workdir):
  loop.fit(config, workdir)
  return logged(workdir)


def logged(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [row["loss"] for row in rows if row["kind"] == "train"]


def test_this_is_a_gpu():
  assert choice.platform(jax.devices()[0]) == "cuda"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
  """Losses of the same run in a process that has only a CPU."""
  folder = tmp_path_factory.mktemp("cpu") / "run"
  fields = [f"--config.{field}" for field in FULL]
  command = [sys.executable, "-m", "dpo_jax.cli", "train", *fields]
  command += ["--config", "configs/dpo.py:smoke", "--workdir", str(folder)]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  subprocess.run(command, check=True, env=env, cwd=conftest.ROOT)
  return logged(folder)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "names", "offload"])
def test_training_in_f32_is_what_the_cpu_computes(remat, tmp_path, on_cpu):
  """What is computed again, or was moved to the host, changes nothing."""
  got = losses(load(*FULL, f"model.remat={remat}"), tmp_path)
  np.testing.assert_allclose(got, on_cpu, rtol=1e-4)
  assert on_cpu[-1] < 0.6


@pytest.mark.parametrize(
  ("spec", "overrides"),
  [
    ("configs/dpo.py:smoke", ["optim.moments=bfloat16"]),
    ("configs/dpo.py:smoke,lora", ["lora.base=nf4"]),
    ("configs/dpo.py:smoke,lora", ["lora.base=int8"]),
    ("configs/dpo.py:smoke", ["train.accumulation=2", "model.head_chunk=64"]),
    ("configs/dpo.py:smoke", ["mesh.mode=pmap"]),
  ],
)
def test_bf16_learns(spec, overrides, tmp_path):
  steps = "train.steps=12", "model.dtype=bfloat16", "log.every=1"
  found = losses(load(*steps, *overrides, spec=spec), tmp_path)
  assert abs(found[0] - np.log(2)) < 0.05
  assert np.mean(found[-3:]) < 0.9 * np.log(2)


def test_the_state_is_donated():
  run = build.prepare(load("model.dtype=bfloat16"))
  state = build.initial_state(run, trained.initial(run.setup))
  batch, _ = run.feed.batch(0, None)
  before = jax.tree.leaves(state.params)
  run.step(state, batch, run.hparams)
  assert all(leaf.is_deleted() for leaf in before)


def test_a_stopped_run_goes_on(tmp_path):
  config = "model.dtype=bfloat16", "log.every=1"
  whole = losses(load(*config, "train.steps=6"), tmp_path / "whole")
  losses(load(*config, "train.steps=3"), tmp_path / "parts")
  parts = losses(load(*config, "train.steps=6"), tmp_path / "parts")
  # Sums of many threads come in any order; bf16 keeps 8 bits.
  np.testing.assert_allclose(parts, whole, rtol=0.02)


def test_a_trace_holds_kernels_of_the_gpu(tmp_path):
  config = load("train.steps=6", "log.profile=True", "model.dtype=bfloat16")
  loop.fit(config, tmp_path)
  (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  with gzip.open(trace) as file:
    events = json.load(file)["traceEvents"]
  names = {e["args"].get("name", "") for e in events if e.get("ph") == "M"}
  assert any("GPU" in name for name in names)
