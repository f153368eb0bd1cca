"""evaluation.json: what it says, when it counts, that it is written last."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.config import load as load_lib
from dpo_jax.eval import evaluation, frontier, rewards
from dpo_jax.run import build, trained
from tests import conftest, folders, worlds


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  sampled = (
    *("sample.prompts=toy", "sample.count=4", "sample.draws=2"),
    *("sample.max_new_tokens=4", "sample.batch_size=8"),
    *("sample.scorers=vader", "data.eval=None"),
  )
  return load_lib.load_config(config, (*sampled, *overrides))


MADE = {"step": 7, "data": "of mine", "reference": {"embed/tokens": 1}}


@pytest.fixture(scope="module")
def measured():
  return build.prepare_measured(load())


@pytest.fixture(scope="module")
def trees(measured):
  """The parameters of a policy and of its reference."""
  ref = jax.device_get(trained.initial(measured.setup))
  return jax.device_get(worlds.noisy(ref, 1)), ref


@pytest.fixture(scope="module")
def evaluated(measured, trees, tmp_path_factory):
  """(workdir, result) of an evaluation by samples alone."""
  workdir = tmp_path_factory.mktemp("evaluated") / "new"
  return workdir, evaluation.evaluate(measured, *trees, workdir, MADE)


def asking(measured, config):
  """A base.Measured with other samples."""
  return measured._replace(setup=folders.asking(measured.setup, config))


def done(config, workdir, made):
  return evaluation.done(config.to_dict(), workdir, made)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
  """Three comparisons: one batch, not full."""
  path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
  row = {"prompt": "The plot is", "chosen": " warm.", "rejected": " dull."}
  lines = [json.dumps({**row, "prompt": p}) for p in ("The plot", "It", "A")]
  path.write_text("\n".join(lines) + "\n")
  return path


def test_the_files_hold_the_result_and_every_sample(evaluated, measured, trees):
  workdir, result = evaluated
  saved = json.loads((workdir / "evaluation.json").read_text())
  assert saved == json.loads(json.dumps(result))
  assert saved["step"] == 7
  assert saved["config"] == json.loads(json.dumps(load().to_dict()))
  assert "comparisons" not in saved
  summary, rows = frontier.measure(measured.setup, *trees)
  lines = (workdir / "samples.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows
  assert len(rows) == 8
  assert summary.items() <= result.items()
  assert {path.name for path in workdir.iterdir()} == {
    "evaluation.json",
    "samples.jsonl",
  }


def test_the_best_of_n_of_one_prompt_has_no_error_in_the_file(
  measured, trees, tmp_path
):
  config = load("sample.best_of=(1, 2)", "sample.count=1")
  result = evaluation.evaluate(asking(measured, config), *trees, tmp_path, MADE)
  text = (tmp_path / "evaluation.json").read_text()
  items = json.loads(text)["best_of"]["best_of"]
  for item, own in zip(items, result["best_of"]["best_of"], strict=True):
    value = item["means"]["reward/vader"]
    assert value["se"] is None
    assert value["mean"] == own["means"]["reward/vader"]["mean"]
    assert item["bound"] == own["bound"]


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_comparisons_do_not_depend_on_how_the_reference_is_kept(
  mode, trees, held_out, tmp_path
):
  results = []
  for ref in ("frozen", "cached"):
    here = (f"mesh.mode={mode}", f"ref={ref}", "sample.prompts=None")
    measured = build.prepare_measured(load(*here, f"data.eval={held_out}"))
    result = evaluation.evaluate(measured, *trees, tmp_path / ref, MADE)
    assert "samples" not in result
    assert not (tmp_path / ref / "samples.jsonl").exists()
    results.append(result["comparisons"])
  frozen, cached = results
  assert frozen.keys() == cached.keys()
  assert abs(frozen["rewards/margins"]) > 0.01
  for name, value in frozen.items():
    # Differences of sums of some ten f32 log-probs of order 5.
    np.testing.assert_allclose(cached[name], value, rtol=1e-5, atol=1e-5)


def test_an_evaluation_with_nothing_to_evaluate_on_is_refused(
  measured, trees, tmp_path
):
  here = asking(measured, load("sample.prompts=None"))
  with pytest.raises(ValueError, match=r"set data.eval .* or sample.prompts"):
    evaluation.evaluate(here, *trees, tmp_path / "new", MADE)
  assert not (tmp_path / "new").exists()


def test_a_failed_evaluation_is_not_done(
  measured, trees, tmp_path, monkeypatch
):
  def broken(prompts, completions):
    raise ZeroDivisionError("the scorer broke")

  monkeypatch.setitem(rewards.SCORERS, "broken", lambda _: broken)
  config = load("sample.scorers=broken:mine")
  with pytest.raises(ZeroDivisionError, match="the scorer broke"):
    evaluation.evaluate(asking(measured, config), *trees, tmp_path, MADE)
  assert not done(config, tmp_path, MADE)
  assert not (tmp_path / "evaluation.json").exists()


def test_a_failed_evaluation_leaves_the_one_before_it(
  evaluated, measured, trees, monkeypatch
):
  workdir, _ = evaluated
  before = {path: path.read_bytes() for path in workdir.iterdir()}

  def broken(*_):
    raise ZeroDivisionError("no samples")

  monkeypatch.setattr(frontier, "measure", broken)
  with pytest.raises(ZeroDivisionError, match="no samples"):
    evaluation.evaluate(measured, *trees, workdir, MADE)
  assert {path: path.read_bytes() for path in workdir.iterdir()} == before
  assert done(load(), workdir, MADE)


def test_nothing_is_done_in_a_folder_without_an_evaluation(tmp_path):
  assert not done(load(), tmp_path, MADE)
  assert not done(load(), tmp_path / "new", MADE)


@pytest.mark.parametrize("text", ["", '{"step": 2', "[]", "\x00", "made"])
def test_a_damaged_evaluation_is_named(text, tmp_path):
  text = json.dumps(MADE) if text == "made" else text  # and no config
  (tmp_path / "evaluation.json").write_text(text)
  with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
    done(load(), tmp_path, MADE)


@pytest.mark.parametrize(
  "override",
  [
    "sample.count=4",
    "log.every=3",
    "log.wandb=mine",
    "mesh.mode=pmap",
    "mesh.fsdp=2",
    "checkpoint.every=7",
    "eval.every=9",
    "workdir=elsewhere",
    "ref_store=elsewhere",
  ],
)
def test_what_changes_neither_policy_nor_measure_is_still_done(
  override, evaluated
):
  assert done(load(override), evaluated[0], MADE)


@pytest.mark.parametrize(
  "override",
  [
    *("sample.count=5", "sample.seed=1", "sample.temperature=0.5"),
    *("sample.scorers=vader,implicit:mine", "sample.prompts=other.jsonl"),
    *("data.eval=toy", "train.steps=3", "train.epochs=2.0"),
  ],
)
def test_another_measure_or_more_steps_are_not_done(override, evaluated):
  assert not done(load(override), evaluated[0], MADE)


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("loss.beta=0.2", r"loss.beta \(saved 0.1, now 0.2\)"),
    ("init_seed=1", "init_seed"),
    ("optim.learning_rate=0.5", "optim.learning_rate"),
    ("data.train=other.jsonl", "data.train"),
    ("model.mlp=32", "model.mlp"),
  ],
)
def test_an_evaluation_of_another_policy_is_refused(
  override, message, evaluated
):
  with pytest.raises(ValueError, match=message) as caught:
    done(load(override), evaluated[0], MADE)
  assert str(evaluated[0]) in str(caught.value)


@pytest.mark.parametrize(
  ("name", "value"), [("step", 6), ("data", "other"), ("reference", {"a": 1})]
)
def test_a_policy_that_was_made_otherwise_is_not_done(name, value, evaluated):
  assert not done(load(), evaluated[0], {**MADE, name: value})
