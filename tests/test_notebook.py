"""A loop written in a notebook is the run of `fit`; what it reads of a run."""

import builtins
import itertools
import json

import jax
import numpy as np
import pytest

import dpo_jax as dj
from dpo_jax import sweeps
from tests import conftest


def load(*overrides, arg="smoke"):
  return dj.load_config(str(conftest.ROOT / f"configs/dpo.py:{arg}"), overrides)


@pytest.fixture(scope="module")
def built():
  """(apply, params) of `load`."""
  return dj.build(load())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arg", "mode"),
  list(itertools.product(("smoke", "lora,smoke"), ("jit", "pmap"))),
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
  table = dj.sweep(load("train.steps=1"), points, tmp_path)
  assert [row["run"] for row in table] == ["beta=0.1", "beta=1.0"]
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


SAMPLED = (
  "sample.prompts=toy",
  "sample.count=4",
  "sample.max_new_tokens=4",
  "sample.scorers=vader",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """(Result of `fit`, its folder), with an adapter."""
  workdir = tmp_path_factory.mktemp("ran")
  config = load("train.steps=3", "log.every=1", arg="lora,smoke")
  return dj.fit(config, workdir), workdir


def test_every_name_completes_and_is_there():
  assert {"fit", "sweep", "load_run", "sample", "evaluate", "report"} <= {
    *dir(dj)
  }
  assert {*dj.__all__} <= {*dir(dj)}
  for name in dj.__all__:
    assert getattr(dj, name) is not None


def test_a_result_is_one_line_and_has_the_history(ran):
  result, workdir = ran
  assert len(repr(result)) < 120 + len(str(workdir))
  assert "\n" not in repr(result)
  assert f"{result.history[-2]['loss']:.4g}" in repr(result)
  # As after a start that found the run finished, and evaluated nothing.
  assert repr(result._replace(evaluation=None)) == repr(result)
  assert "held out loss" in repr(result)
  kinds = [(row["step"], row["kind"]) for row in result.history]
  assert kinds == [(1, "train"), (2, "train"), (3, "train"), (3, "eval")]
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  assert result.history == [json.loads(line) for line in lines]
  assert result.history[-1]["loss"] == result.evaluation["loss"]


def test_pandas_reads_the_history(ran):
  import pandas

  frame = pandas.DataFrame(ran[0].history).set_index("step")
  assert frame[frame.kind == "train"].loss.notna().all()


def test_a_line_that_a_kill_cut_short_is_no_row_of_the_history(ran, tmp_path):
  whole = (ran[1] / "metrics.jsonl").read_text()
  (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "ki')
  result = ran[0]._replace(workdir=tmp_path)
  assert result.history == ran[0].history


def test_a_run_folder_gives_what_the_run_left(ran):
  result, workdir = ran
  run = dj.load_run(workdir)
  assert run.config.lora.rank == 16
  assert run.metrics == result.history
  assert run.evaluation is None
  assert run.samples == []
  assert run.figures["curves"].startswith(b"\x89PNG")
  assert "step 3" in repr(run)
  assert "\n" not in repr(run)


def test_the_policy_of_a_run_has_its_adapter_grafted(ran):
  result, workdir = ran
  run = dj.load_run(workdir)
  apply, params = run.policy
  batch = next(dj.batches(run.config))
  base_apply, base = dj.build(run.config)
  hparams = {"beta": 0.1, "label_smoothing": 0.0}

  def chosen(config, params, frozen):
    terms = jax.jit(dj.objective(config, apply))
    found = terms(params, frozen, batch, hparams).metrics["logps/chosen"]
    return np.where(found[1] > 0, found[0], 0)

  _, state = dj.train_step(run.config, base_apply, base)
  adapter = jax.device_get(result.state.params)  # from eight devices
  expected = chosen(run.config, adapter, state.frozen)
  whole = load("train.steps=3")  # of all parameters: it takes a policy
  found = chosen(whole, params, {"ref": base})
  # One graft, once inside the program: f32 rounding.
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert np.abs(found - chosen(whole, base, {"ref": base})).max() > 1e-3


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"is .* the folder of a run"):
    dj.load_run(tmp_path)
  points = [{"folder": "beta=0.1"}]
  (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
  with pytest.raises(ValueError, match=r"beta=0\.1.*dj\.report"):
    dj.load_run(tmp_path)


PROMPTS = ["The film was", "A dull", "The film was"]


def test_samples_come_in_the_order_of_their_prompts(ran):
  result, workdir = ran
  options = {"draws": 2, "max_new_tokens": 5}
  rows = dj.sample(workdir, PROMPTS, **options)
  assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in "12"]
  assert [row["id"] for row in rows] == [0, 0, 1, 1, 2, 2]
  assert all(0 < row["length"] <= 5 for row in rows)
  # The folder, what was loaded and what `fit` returned name one policy.
  run = dj.load_run(workdir)
  assert dj.sample(run, PROMPTS, **options) == rows
  assert dj.sample(result, PROMPTS, **options) == rows
  # So do its parameters, grafted, or as they are trained.
  for params in (run.policy[1], result.state.params):
    assert dj.sample(run.config, PROMPTS, params=params, **options) == rows
  assert dj.sample(run, PROMPTS, seed=1, **options) != rows
  assert dj.sample(run, []) == []


def test_a_config_samples_what_its_run_would_start_from(ran, built):
  config = dj.load_run(ran[1]).config
  start = dj.sample(config, PROMPTS, temperature=0.0, max_new_tokens=5)
  same = dj.sample(
    load(), PROMPTS, params=built[1], temperature=0.0, max_new_tokens=5
  )
  assert start == same


def test_a_template_of_the_config_is_around_prompts_of_a_notebook():
  here = ("sample.max_new_tokens=6", "sample.draws=2")
  told = load(*here, "sample.template={prompt} was", "sample.best_of=(2,)")
  twice = ["The plot", "The plot"]
  rows = dj.sample(told, twice, draws=1)
  whole = dj.sample(load(*here), [f"{text} was" for text in twice], draws=1)
  assert [row["prompt"] for row in rows] == twice
  assert [row["tokens"] for row in rows] == [row["tokens"] for row in whole]


def test_prompts_that_cannot_be_continued_are_refused(ran):
  with pytest.raises(ValueError, match=r"\['The film'\]"):
    dj.sample(ran[1], "The film")
  with pytest.raises(ValueError, match="64"):
    dj.sample(ran[1], ["word " * 100])
  chat = [[{"role": "user", "content": "hello"}]]
  with pytest.raises(ValueError, match=r"prompts\[0\].*chat template"):
    dj.sample(ran[1], chat)


def test_a_policy_is_evaluated_in_its_folder(ran):
  result, workdir = ran
  found = dj.evaluate(workdir, {"sample.max_new_tokens": 4})
  for name, value in result.evaluation.items():
    # Another order of the same sums.
    np.testing.assert_allclose(found["comparisons"][name], value, rtol=1e-4)
  run = dj.load_run(workdir)
  assert run.evaluation["step"] == 3
  assert run.evaluation["comparisons"] == found["comparisons"]
  (workdir / "evaluation.json").unlink()


def test_a_config_is_evaluated_at_its_start_and_leaves_nothing(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  found = dj.evaluate(load())
  np.testing.assert_allclose(found["comparisons"]["loss"], np.log(2), rtol=1e-5)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="nothing to evaluate on"):
    dj.evaluate(load(), {"data.eval": None})


@pytest.mark.slow
def test_a_sweep_returns_its_table_and_writes_its_report(tmp_path):
  points = [{"loss.beta": beta} for beta in (0.1, 1.0)]
  table = dj.sweep(load("train.steps=2", *SAMPLED), points, tmp_path)
  assert [row["run"] for row in table] == ["reference", "beta=0.1", "beta=1.0"]
  assert table[1]["kl"]["mean"] >= 0
  assert "beta=0.1" in repr(table)
  assert len(repr(table).splitlines()) == 4
  assert table._repr_markdown_().startswith("| run |")
  assert table.page.read_text().startswith("<!")
  assert {*table.figures} == {"frontier", "curves"}
  assert all(f.startswith(b"\x89PNG") for f in table.figures.values())
  assert len(repr(table.figures)) < 100
  table.page.unlink()
  assert dj.report(tmp_path) == table
  assert table.page.exists()
  run = dj.load_run(tmp_path / "beta=0.1")
  assert run.evaluation["step"] == 2
  assert next(iter(run.evaluation["means"])) == "reward/vader"
  assert len(run.samples) == 4


@pytest.mark.slow
def test_a_point_of_a_spec_may_be_another_loss(tmp_path):
  spec = str(conftest.ROOT / "configs/dpo.py:smoke")
  points = [
    {"arg": f"loss={name}", "train.steps": 1} for name in ("dpo", "ipo")
  ]
  table = dj.sweep(spec, points, tmp_path)
  assert [row["run"].split(",")[0] for row in table] == ["loss=dpo", "loss=ipo"]
  names = [f"loss={name},steps=1" for name in ("dpo", "ipo")]
  found = [dj.load_run(tmp_path / name).config.loss.name for name in names]
  assert found == ["dpo", "ipo"]


def test_points_are_a_list_of_dicts_and_overrides_may_be_one(tmp_path):
  with pytest.raises(ValueError, match="points of a sweep are a list of dicts"):
    dj.sweep("dpo:smoke", {"loss.beta": [0.05, 0.1]}, tmp_path)
  assert dj.load_config("dpo:smoke", {"loss.beta": 0.3}).loss.beta == 0.3
  for named, call in (
    ("load_config", lambda point: dj.load_config("dpo:smoke", point)),
    ("evaluate", lambda point: dj.evaluate(load(), point)),
  ):
    message = f"{named} sets loss.bta, .* did you mean 'loss.beta'"
    with pytest.raises(ValueError, match=message):
      call({"loss.bta": 0.3})


def test_a_sweep_that_is_stopped_stops_the_cells_below(tmp_path, monkeypatch):
  monkeypatch.setattr(sweeps, "sweep", lambda *args, **options: 130)
  with pytest.raises(KeyboardInterrupt):
    dj.sweep(load(), [{"loss.beta": 0.1}], tmp_path)


def test_pandas_need_not_be_there(ran, monkeypatch):
  there = builtins.__import__

  def missing(name, *args):
    if name.partition(".")[0] == "pandas":
      raise ImportError(name)
    return there(name, *args)

  monkeypatch.setattr(builtins, "__import__", missing)
  assert ran[0].history
  assert dj.load_run(ran[1]).metrics
