"""Compiled programs are kept, where nobody said otherwise."""

import json
import os
import subprocess
import sys

import pytest

from dpo_jax import host
from tests import conftest


def test_what_the_user_set_stays(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  host.keep()
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


@pytest.mark.parametrize(
  ("there", "before", "after"),
  [
    (False, "", ""),
    (True, "", "--xla_gpu_enable_triton_gemm=false"),
    (True, "--a=1", "--a=1 --xla_gpu_enable_triton_gemm=false"),
    (True, *["--xla_gpu_enable_triton_gemm=true"] * 2),
  ],
)
def test_cublas_multiplies_on_nvidia_gpus(there, before, after, monkeypatch):
  monkeypatch.setattr(host.importlib.util, "find_spec", lambda _: there)
  monkeypatch.setenv("XLA_FLAGS", before)
  host.leave_triton_out()
  assert os.environ["XLA_FLAGS"] == after


@pytest.mark.slow
def test_a_second_run_finds_the_programs_of_the_first(tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  env |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
  env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  flags = os.environ["XLA_FLAGS"].split()  # one device: less to compile
  env["XLA_FLAGS"] = " ".join(f for f in flags if "device_count" not in f)

  def train(name):
    command = [sys.executable, "-m", "dpo_jax.cli", "train"]
    options = ["--config", str(conftest.ROOT / "configs/dpo.py:smoke")]
    options += ["--config.train.steps=1", "--config.data.eval=None"]
    workdir = tmp_path / name
    subprocess.run(
      [*command, *options, "--workdir", str(workdir), "--profile"],
      env=env,
      cwd=conftest.ROOT,
      check=True,
    )
    kept = (tmp_path / "home").rglob("*-cache")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return sorted(p.name for p in kept), json.loads(lines[-1])["loss"]

  first, loss = train("a")
  second, again = train("b")
  assert first
  assert second == first
  assert again == loss
