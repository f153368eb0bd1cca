"""Mistakes that are found before anything heavy is imported."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from dpo_jax import cli, host, preflight
from dpo_jax.config import load
from tests import conftest

HEAVY = "{'jax', 'flax', 'optax', 'transformers', 'orbax', 'datasets'}"


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("train --config=dpo --config.loss.beta=-1", "loss.beta = -1.0 must be"),
    ("train --config=dpo:loss=dpo+nll --config.loss.dpo.beta=-1",
     "loss.dpo.beta = -1.0 must be above 0"),
    ("train --config=dpo --config.data.batch_size=0", "must be at least 1"),
    ("train --config=dpo --config.data.train=my.jsonn", "the suffix of"),
    ("train --config=dpo --config.data.train=mu.jsonl",
     "mu.jsonl: cannot be read (No such file or directory); data.train is a "
     "path relative to the current folder; did you mean 'my.jsonl'?"),
    ("train --config=dpo --config.data.train=toy --config.data.eval=no.csv",
     "no.csv: cannot be read"),
    ("train --config=dpo", "data.train is not set"),
    ("train --config=dpo --config.data.train=tuy", "did you mean 'toy'?"),
    ("sweep --config=dpo --config.data.train=toy --sweep loss.beta=1,-1",
     "loss.beta = -1.0 must be above 0"),
    ("sweep --config=dpo --config.data.train=toy --sweep data.train=toy,a.csv",
     "a.csv: cannot be read"),
    ("train --config=dpo --config.data.train=toy --config.init_from=old",
     "init_from = 'old': old/config.json: no such file; is old the folder"),
    ("sweep --config=dpo --config.data.train=toy --sweep init_from=old,older",
     "init_from = 'old': old/config.json: no such file"),
    ("train --config=dpo --config.data.train=toy --workdir=my.jsonl/run",
     "--workdir my.jsonl/run: my.jsonl is a file; name a folder"),
  ],
)  # fmt: skip
def test_a_cheap_mistake_costs_no_heavy_import(tmp_path, words, message):
  (tmp_path / "my.jsonl").write_text(json.dumps({"prompt": "a"}))
  argv = [*words.split(), *([] if "--workdir" in words else ["--workdir=x"])]
  code = (
    f"import sys; from dpo_jax import cli; assert cli.main({argv!r}) == 2; "
    f"assert not {HEAVY} & set(sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(conftest.ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_to_is_told_at_once(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(preflight.os, "access", lambda *_: False)
  with pytest.raises(ValueError, match="cannot be written to; name another"):
    preflight.folder(tmp_path / "a" / "b")
  preflight.folder("gs://bucket/run")


@pytest.mark.parametrize(
  "error",
  [
    OSError(30, "Read-only file system", "/data/run/x"),
    PermissionError(13, "Permission denied", "/data/run/x"),
    OSError(28, "No space left on device"),
  ],
)
def test_what_the_system_refuses_later_is_one_line_too(
  error, monkeypatch, capsys
):
  def run(*_):
    raise error

  monkeypatch.setattr(cli.verbs, "run", run)
  assert cli.main(["train"]) == 1
  said = capsys.readouterr().err
  assert error.strerror in said
  assert "--workdir" in said
  assert len(said.splitlines()) == 1


def test_after_an_interrupt_no_thread_says_what_it_failed_at(
  monkeypatch, capsys
):
  """Orbax logs a traceback of each save that the end of the process cuts."""

  def run(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(cli.verbs, "run", run)
  try:
    assert cli.main(["train"]) == 130
    assert not logging.getLogger("absl").isEnabledFor(logging.CRITICAL)
  finally:
    logging.disable(logging.NOTSET)
  assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_message_of_several_lines_is_one(monkeypatch, capsys):
  def run(*_):
    raise ValueError("cannot be loaded:\nno network.\n\nTry again")

  monkeypatch.setattr(cli.verbs, "run", run)
  assert cli.main(["train"]) == 2
  said = capsys.readouterr().err
  assert said == "error: cannot be loaded: no network. Try again\n"


def test_names_of_the_hub_are_those_that_are_no_folder(tmp_path):
  spec = f"dpo:model=hf:{tmp_path}"
  assert preflight.on_hub(load.load_config(spec)) == []
  more = ["data.train=2*hf:a/b:test + toy", "sample.scorers=vader,model:c/d"]
  config = load.load_config("dpo:model=hf:e/f", more)
  assert sorted(preflight.on_hub(config)) == ["a/b", "c/d", "e/f"]


@pytest.fixture
def unproxied(monkeypatch):
  monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
  monkeypatch.setattr(host.urllib.request, "getproxies", dict)
  monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")  # nobody listens
  yield
  os.environ.pop("HF_HUB_OFFLINE", None)


def test_a_hub_out_of_reach_is_tried_once_and_then_left_alone(unproxied):
  begin = time.perf_counter()
  reason = host.hub_or_cache()
  assert reason == "127.0.0.1 cannot be reached (Connection refused)"
  assert os.environ["HF_HUB_OFFLINE"] == "1"
  assert host.hub_or_cache() is None
  assert time.perf_counter() - begin < 5


def test_what_was_never_fetched_is_refused_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    monkeypatch.delenv(name, raising=False)
  kept = ("hub/models--a--b", "hub/datasets--c--d", "datasets/e___f")
  for folder in kept:
    (tmp_path / folder).mkdir(parents=True)
  preflight.cached(["a/b", "c/d", "e/f"], "it is far")
  with pytest.raises(ValueError, match="g/h is no folder here, it is far, and"):
    preflight.cached(["a/b", "g/h"], "it is far")


def test_a_proxy_is_left_to_the_clients(unproxied, monkeypatch):
  proxies = {"https": "http://proxy:3128"}
  monkeypatch.setattr(host.urllib.request, "getproxies", lambda: proxies)
  assert host.hub_or_cache() is None
  assert "HF_HUB_OFFLINE" not in os.environ
