"""Adapters and bases in runs: memory, checkpoints, starts and exports."""

import gc
import json
import re

import jax
import numpy as np
import pytest

from dpo_jax import cli, loop, tree
from dpo_jax.config import load
from dpo_jax.eval import rewards
from dpo_jax.run import build, held_out, trained
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib
from tests import conftest, folders

STEPS = ["train.steps=2", "mesh.data=1"]


@pytest.fixture(scope="module", autouse=True)
def _in_the_checkout():
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(conftest.ROOT)
    # One device of the eight: the meshes have tests of their own.
    one = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: one)
    yield


def config(*overrides, spec="configs/dpo.py:lora,smoke"):
  return load.load_config(spec, [*STEPS, *overrides])


@pytest.fixture(scope="module")
def run():
  """The Run of an adapter whose programs several tests share."""
  return build.prepare(config())


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
  """(run folder, TrainState) of an adapter that is not 0."""
  folder = tmp_path_factory.mktemp("saved")
  return folder, folders.untrained(config(), folder, run=run)[1]


def start(run):
  initial = trained.initial(run.setup)
  return initial, build.initial_state(run, initial)


def nbytes(value):
  return sum(x.nbytes for x in jax.tree.leaves(value))


@pytest.mark.parametrize(
  "kind",
  [
    "float32",
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in ("bfloat16", "int8", "nf4")
    ),
  ],
)
def test_the_base_is_there_once_and_only_adapters_have_optimiser_state(
  kind, run
):
  if kind != run.setup.source.held:
    run = build.prepare(config(f"lora.base={kind}"))
  initial, state = start(run)
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
  args = state.replace(frozen={}), state.frozen, batch, run.hparams
  with jax.set_mesh(run.setup.mesh):  # as it was compiled above
    program = step.compiled.lower(*args).compile()
  memory = program.memory_analysis()
  # The step takes base, adapter, moments and batch, and gives back no base.
  assert memory.argument_size_in_bytes <= nbytes(initial) + moving
  assert memory.output_size_in_bytes <= moving


def test_training_an_adapter_leaves_no_second_copy_of_the_base_alive(run):
  gc.collect()
  before = {id(x) for x in jax.live_arrays()}
  initial, state = start(run)
  step = run.step
  batch, _ = run.feed.batch(0, None)
  state, _ = step(state, batch, run.hparams)
  gc.collect()
  alive = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
  needed = nbytes(initial) + nbytes(state.params) + nbytes(state.opt_state)
  assert alive <= needed + nbytes(batch) + 4096


def test_policy_equals_reference_until_the_adapter_has_learned(run):
  """To rounding: the two passes are not fused alike on every processor."""
  assert run.setup.asked["ref"] == "base"
  initial, state = start(run)
  step = run.step
  batch, _ = run.feed.batch(0, None)
  before = state_lib.fingerprint(initial)
  state, first = step(state, batch, run.hparams)
  state, second = step(state, batch, run.hparams)
  assert abs(float(first["rewards/margins"])) < 1e-6
  assert float(second["rewards/margins"]) > 1e-4
  assert state_lib.fingerprint(state.frozen["base"]) == before


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides",
  [
    [
      *("ref=cached", "train.accumulation=2"),
      *("lora.base=nf4", "lora.rank_stabilised=True"),
    ],
    # tests/parallel/test_adapters has the adapter of pmap itself.
    ["mesh.mode=pmap"],
  ],
)
def test_a_run_with_an_adapter_learns_whatever_its_reference(
  overrides, tmp_path
):
  got = loop.fit(config(*overrides, "train.steps=8"), tmp_path)
  assert got.evaluation["loss"] < 0.6  # ln 2 = 0.693 at the start
  # The reward model that the policy is has learned it too.
  kind, unkind = rewards.load(f"implicit:{tmp_path}").score(
    ["The plot is"] * 2, [" warm and clever.", " dull and grim."]
  )
  assert kind > unkind


def test_the_checkpoint_holds_the_adapter_alone_and_resumes_bit_for_bit(
  run, tmp_path
):
  def fit(steps, folder):
    here = config(f"train.steps={steps}")
    return loop.fit(here, tmp_path / folder, folders.sharing(here, run)).state

  whole = fit(4, "whole")
  fit(2, "parts")
  parts = fit(4, "parts")
  sums = [state_lib.fingerprint(state_lib.saved(x)) for x in (whole, parts)]
  assert sums[0] == sums[1]
  names = [path for path in sums[0] if "kernel" in path or "embed" in path]
  assert not names


def test_a_changed_base_is_refused_when_resuming(saved):
  with pytest.raises(ValueError, match="init_seed"):
    loop.fit(config("train.steps=4", "init_seed=1"), saved[0])


def test_a_run_starts_from_the_merged_policy_of_a_run_with_an_adapter(
  run, saved
):
  folder, state = saved
  got = trained.initial(build.prepare_model(config(f"init_from={folder}")))
  base = trained.initial(run.setup)
  want = trained.merged(run.setup, base, state.params)
  assert state_lib.fingerprint(got) == state_lib.fingerprint(want)
  assert state_lib.fingerprint(got) != state_lib.fingerprint(base)


def test_evaluation_and_samples_are_those_of_the_adapted_policy(
  run, saved, capsys
):
  folder, state = saved
  argv = ["--workdir", str(folder)]
  assert cli.main(["eval", *argv]) == 0
  text = (folder / "evaluation.json").read_text()
  got = json.loads(text)["comparisons"]["loss"]
  want = held_out.evaluate(run.setup, run.held_out, state)["loss"]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert abs(got - np.log(2)) > 1e-4  # the base's is log 2 to an ulp, 6e-8
  prompts = ["--config.sample.prompts=toy:4", "--config.sample.count=2"]
  assert cli.main(["sample", *argv, *prompts]) == 0
  assert "step 2" in capsys.readouterr().out


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


def test_a_run_resumes_with_its_own_rank_only(saved):
  with pytest.raises(ValueError, match=r"lora\.rank \(saved 16, now 8\)"):
    loop.fit(config("train.steps=4", "lora.rank=8"), saved[0])
  assert checkpoint.latest_step(saved[0]) == 2
