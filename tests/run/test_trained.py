"""Adapters and bases in runs: memory, checkpoints, starts and exports."""

import gc
import json
import re

import jax
import numpy as np
import pytest

from dpo_jax import cli, loop, tree
from dpo_jax.config import load
from dpo_jax.run import build, trained
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib
from tests import conftest

STEPS = ["train.steps=2", "mesh.data=1"]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)
  # One device of the eight: the meshes have tests of their own.
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: one)


def config(*overrides, spec="configs/dpo.py:lora,smoke"):
  return load.load_config(spec, [*STEPS, *overrides])


def start(config):
  run = build.prepare(config)
  initial = trained.initial(run.setup)
  return run, initial, build.initial_state(run, initial)


def nbytes(value):
  return sum(x.nbytes for x in jax.tree.leaves(value))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "nf4"])
def test_the_base_is_there_once_and_only_adapters_have_optimiser_state(kind):
  run, initial, state = start(config(f"lora.base={kind}"))
  step = run.step
  batch, _ = run.feed.batch(0, None)
  for _ in range(2):
    state, _ = step(state, batch, run.hparams)
  held, given = jax.tree.leaves(state.frozen), jax.tree.leaves(initial)
  assert all(a is b for a, b in zip(held, given, strict=True))
  assert {path.split("/")[-1] for path, _ in tree.named(state.params)} == {
    "lora_a",
    "lora_b",
  }
  # RMSprop has one moment a parameter; the counters are a few bytes.
  assert nbytes(state.opt_state) <= nbytes(state.params) + 64
  gc.collect()
  moving = 2 * nbytes(state.params) + nbytes(batch) + 4096
  program = step.compiled.lower(
    state.replace(frozen={}), state.frozen, batch, run.hparams
  ).compile()
  memory = program.memory_analysis()
  # The step takes base, adapter, moments and batch, and gives back no base.
  assert memory.argument_size_in_bytes <= nbytes(initial) + moving
  assert memory.output_size_in_bytes <= moving


def test_training_an_adapter_leaves_no_second_copy_of_the_base_alive():
  gc.collect()
  before = {id(x) for x in jax.live_arrays()}
  run, initial, state = start(config())
  step = run.step
  batch, _ = run.feed.batch(0, None)
  state, _ = step(state, batch, run.hparams)
  gc.collect()
  alive = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
  needed = nbytes(initial) + nbytes(state.params) + nbytes(state.opt_state)
  assert alive <= needed + nbytes(batch) + 4096


def test_policy_equals_reference_until_the_adapter_has_learned():
  """To rounding: the two passes are not fused alike on every processor."""
  run, initial, state = start(config("ref=base"))
  step = run.step
  batch, _ = run.feed.batch(0, None)
  before = state_lib.fingerprint(initial)
  state, first = step(state, batch, run.hparams)
  state, second = step(state, batch, run.hparams)
  assert abs(float(first["rewards/margins"])) < 1e-6
  assert float(second["rewards/margins"]) > 1e-4
  assert state_lib.fingerprint(state.frozen["base"]) == before


@pytest.mark.parametrize(
  "overrides",
  [
    ["ref=cached"],
    ["mesh.mode=pmap"],
    ["train.accumulation=2", "lora.base=nf4", "lora.rank_stabilised=True"],
  ],
)
def test_a_run_with_an_adapter_learns_whatever_its_reference(
  overrides, tmp_path
):
  got = loop.fit(config(*overrides, "train.steps=8"), tmp_path)
  assert got.evaluation["loss"] < 0.6  # ln 2 = 0.693 at the start


def test_the_checkpoint_holds_the_adapter_alone_and_resumes_bit_for_bit(
  tmp_path,
):
  whole = loop.fit(config("train.steps=4"), tmp_path / "whole").state
  loop.fit(config(), tmp_path / "parts")
  parts = loop.fit(config("train.steps=4"), tmp_path / "parts").state
  saved = [
    state_lib.fingerprint(state_lib.saved(state)) for state in (whole, parts)
  ]
  assert saved[0] == saved[1]
  names = [path for path in saved[0] if "kernel" in path or "embed" in path]
  assert not names


def test_a_changed_base_is_refused_when_resuming(tmp_path):
  loop.fit(config(), tmp_path)
  with pytest.raises(ValueError, match="init_seed"):
    loop.fit(config("train.steps=4", "init_seed=1"), tmp_path)


def test_a_run_starts_from_the_merged_policy_of_a_run_with_an_adapter(tmp_path):
  first = config("train.steps=3")
  result = loop.fit(first, tmp_path / "first")
  run = build.prepare(config(f"init_from={tmp_path / 'first'}"))
  got = trained.initial(run.setup)
  setup = build.prepare_model(first)
  base = trained.initial(setup)
  want = trained.merged(setup, base, result.state.params)
  assert state_lib.fingerprint(got) == state_lib.fingerprint(want)
  assert state_lib.fingerprint(got) != state_lib.fingerprint(base)


def test_evaluation_and_samples_are_those_of_the_adapted_policy(
  tmp_path, capsys
):
  result = loop.fit(config("train.steps=8"), tmp_path)
  argv = ["--workdir", str(tmp_path)]
  assert cli.main(["eval", *argv]) == 0
  text = (tmp_path / "evaluation.json").read_text()
  got = json.loads(text)["comparisons"]["loss"]
  np.testing.assert_allclose(got, result.evaluation["loss"], rtol=1e-5)
  assert got < 0.6
  prompts = ["--config.sample.prompts=toy:4", "--config.sample.count=2"]
  assert cli.main(["sample", *argv, *prompts]) == 0
  assert "step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("lora.base=int4", "lora.base"),
    ("lora.targets=('embed',)", "matches no kernel"),
    ("lora.rank=0", "lora.rank = 0 must be at least 1"),
    ("lora.alpha=0.0", "lora.alpha"),
    ("optim.freeze=('lora_a','lora_b')", "leaves nothing to train"),
    ("optim.freeze=('kernel',)", "matches no parameter"),
    ("init_adapter=hf:nowhere", "needs its base"),
  ],
)
def test_mistakes_about_adapters_are_named(override, message, tmp_path):
  with pytest.raises(ValueError, match=re.escape(message)):
    loop.fit(config(override), tmp_path)


def test_a_run_resumes_with_its_own_rank_only(tmp_path):
  loop.fit(config(), tmp_path)
  with pytest.raises(ValueError, match=r"lora\.rank \(saved 16, now 8\)"):
    loop.fit(config("train.steps=4", "lora.rank=8"), tmp_path)
  assert checkpoint.latest_step(tmp_path) == 2
