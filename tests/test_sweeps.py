"""A sweep: what its points share, what is skipped, what can be added later."""

import contextlib
import json
import pathlib
import shutil
import signal

import numpy as np
import pytest

from dpo_jax import loop, report, store, sweeps
from dpo_jax.algos import terms
from dpo_jax.config import load as load_lib
from dpo_jax.eval import evaluation
from dpo_jax.report import content
from dpo_jax.report import folder as report_folder
from dpo_jax.run import build, recorder
from dpo_jax.train import checkpoint, log
from tests import conftest, folders

POINTS = ({"loss.beta": 0.1}, {"loss.beta": 5.0})
SAMPLED = (
  "ref=cached",
  "sample.prompts=toy",
  "sample.count=8",
  "sample.max_new_tokens=4",
  "sample.batch_size=8",
  "sample.scorers=vader",
)


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  return load_lib.load_config(config, ("train.steps=3", *overrides))


def files(workdir):
  """{path: bytes} of a folder."""
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in pathlib.Path(workdir).rglob("*")
    if path.is_file()
  }


def metrics(workdir, name):
  lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@contextlib.contextmanager
def traces():
  """A list that gets an entry whenever the DPO loss is traced."""
  out, seen = terms.Part.out, []

  def counted(part, values, hparams):
    if values["policy_logps"].shape != (1, 2):  # of the first step's loss
      seen.append(True)
    return out(part, values, hparams)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(terms.Part, "out", counted)
    yield seen


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A finished sweep of two β.

  Returns: (workdir, how often the loss was traced before each point, and in
    all).
  """
  workdir, before = tmp_path_factory.mktemp("sweep"), []
  with traces() as seen, pytest.MonkeyPatch.context() as patch:
    fit = sweeps.fit_together

    def counted(*args):
      before.append(len(seen))
      return fit(*args)

    patch.setattr(sweeps, "fit_together", counted)
    assert sweeps.sweep(load(*SAMPLED), POINTS, workdir) == 0
  return workdir, [*before, len(seen)]


@pytest.fixture
def copied(swept, tmp_path):
  """A copy of the folder of the finished sweep, to write in."""
  return shutil.copytree(swept[0], tmp_path / "sweep")


def test_all_points_share_one_compilation(swept):
  _, (first, second, end) = swept
  assert first < second == end


def test_a_point_of_a_sweep_is_the_run_of_its_config_alone(swept, tmp_path):
  workdir, _ = swept
  config = load("ref=cached", "loss.beta=5.0")
  loop.fit(config, tmp_path / "alone")
  ours, alone = metrics(workdir, "beta=5.0"), metrics(tmp_path, "alone")
  timing = log.TIMED
  for a, b in zip(ours, alone, strict=True):
    assert {k: v for k, v in a.items() if k not in timing} == {
      k: v for k, v in b.items() if k not in timing
    }


def test_the_reference_pass_is_made_once(swept):
  workdir, _ = swept
  # An entry for the training data and one for the held-out data.
  assert len(list((workdir / "ref_logps").glob("*/entry.json"))) == 2
  assert not list(workdir.glob("beta=*/ref_logps"))


def test_the_reference_itself_is_at_kl_zero_and_even_odds(swept):
  workdir, _ = swept
  there = json.loads((workdir / "reference/evaluation.json").read_text())
  assert abs(there["means"]["kl"]["mean"]) < 1e-5
  assert there["comparisons"]["rewards/accuracies"] == 0.5
  np.testing.assert_allclose(there["comparisons"]["loss"], np.log(2), rtol=1e-5)


def test_a_finished_sweep_is_left_alone(swept, monkeypatch):
  workdir, _ = swept
  before = files(workdir)
  monkeypatch.setattr(
    sweeps, "fit_together", lambda *_: pytest.fail("trained again")
  )
  monkeypatch.setattr(
    evaluation, "evaluate", lambda *_: pytest.fail("evaluated again")
  )
  assert sweeps.sweep(load(*SAMPLED), POINTS, workdir) == 0
  assert files(workdir) == before


def test_more_points_and_other_samples_train_only_what_is_new(copied):
  before = files(copied)
  more = load(*SAMPLED, "sample.count=16")
  assert sweeps.sweep(more, [*POINTS[:1], {"loss.beta": 1.0}], copied) == 0
  after = files(copied)
  trained = [p for p in before if "checkpoints/" in p or "metrics" in p]
  assert {p: after[p] for p in trained} == {p: before[p] for p in trained}
  for name in ("reference", "beta=0.1", "beta=1.0"):
    there = json.loads((copied / name / "evaluation.json").read_text())
    assert there["samples"] == 16


@pytest.mark.slow
def test_checkpoints_on_the_way_are_measured_as_runs_that_end_there(tmp_path):
  """That of step 1 of 3 is the policy of a run of one step."""
  longer = load(
    *(*SAMPLED[1:], "sample.checkpoints=True", "optim.schedule=constant"),
    *("checkpoint.every=1", "checkpoint.keep=3"),
  )
  sweeps.sweep(longer, POINTS[:1], tmp_path / "longer")
  shorter = load(*SAMPLED[1:], "train.steps=1", "optim.schedule=constant")
  sweeps.sweep(shorter, POINTS[:1], tmp_path / "shorter")
  got, want = (
    store.read_json(tmp_path / name / "beta=0.1" / "evaluation.json")
    for name in ("longer", "shorter")
  )
  assert [point["step"] for point in got["checkpoints"]] == [1, 2]
  assert got["checkpoints"][0]["means"] == want["means"]
  assert got["checkpoints"][1]["means"] != want["means"]
  ((_, mark),) = content_marks(tmp_path / "longer")
  assert len(mark.trail) == 2


def content_marks(folder):
  """[(group, Mark)] of a sweep's report."""
  sweep = report_folder.read(folder)
  return [
    (group, content._mark(group, "reward/vader", "#000000"))
    for group in sweep.groups
  ]


def test_another_policy_in_the_folder_is_refused_and_loses_nothing(swept):
  workdir, _ = swept
  before = files(workdir)
  config = load(*SAMPLED, "optim.learning_rate=1e-4")
  with pytest.raises(ValueError, match=r"optim.learning_rate \(saved 0.001"):
    sweeps.sweep(config, POINTS, workdir)
  del before["sweep.json"]
  assert before.items() <= files(workdir).items()


@pytest.mark.slow
def test_a_stopped_point_ends_the_sweep_with_its_exit_code(
  tmp_path, monkeypatch
):
  fit = sweeps.fit_together

  def stopped(*args):
    return [result._replace(exit_code=130) for result in fit(*args)]

  monkeypatch.setattr(sweeps, "fit_together", stopped)
  assert sweeps.sweep(load(), POINTS, tmp_path) == 130
  assert not (tmp_path / "beta=0.1/evaluation.json").exists()
  assert not (tmp_path / "beta=5.0").exists()
  monkeypatch.setattr(sweeps, "fit_together", fit)
  assert sweeps.sweep(load(), POINTS, tmp_path) == 0
  assert (tmp_path / "beta=5.0/evaluation.json").exists()


def test_a_point_where_nothing_is_finite_does_not_stop_the_others(
  copied, monkeypatch, capsys
):
  """The others are trained already, but not evaluated."""
  fit = sweeps.fit_together
  error = FloatingPointError("10 updates in a row were not finite")
  for name in ("beta=0.1", "beta=5.0"):
    (copied / name / "evaluation.json").unlink()

  def diverging(runs, folders):
    (result,) = fit(runs, folders)
    if runs[0].setup.asked["loss"]["beta"] == 0.1:
      result = result._replace(failure=error)
    return [result]

  monkeypatch.setattr(sweeps, "fit_together", diverging)
  assert sweeps.sweep(load("ref=cached"), POINTS, copied) == 1
  assert (copied / "beta=5.0/evaluation.json").exists()
  assert not (copied / "beta=0.1/evaluation.json").exists()
  out = capsys.readouterr().out
  assert "beta=0.1: 10 updates in a row were not finite" in out
  assert "failed: beta=0.1" in out


@pytest.mark.slow
def test_a_finished_point_is_not_kept_once_its_data_have_changed(tmp_path):
  data = tmp_path / "my.jsonl"
  rows = [
    {"prompt": f"The plot {i}", "chosen": " is fine.", "rejected": " is bad."}
    for i in range(8)
  ]
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = load(f"data.train={data}")
  assert sweeps.sweep(config, POINTS, tmp_path / "sweep") == 0
  data.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
  with pytest.raises(ValueError, match=r"data_fingerprint \(saved"):
    sweeps.sweep(config, POINTS, tmp_path / "sweep")


@pytest.mark.slow
def test_points_that_differ_in_a_compiled_field_each_build_their_own(tmp_path):
  config = load("train.steps=1")
  points = [{"data.seed": 0}, {"data.seed": 1}]
  assert sweeps.sweep(config, points, tmp_path) == 0
  losses_of = [
    metrics(tmp_path, f"seed={s}")[0]["logps/chosen"] for s in (0, 1)
  ]
  assert losses_of[0] != losses_of[1]


@pytest.mark.parametrize(
  ("points", "message"),
  [
    ([], "no points"),
    ([{"loss.beta": 0.1}, {"loss.beta": 0.1}], "names a point twice"),
    ([{"loss.betta": 0.1}], "loss.betta.*did you mean 'loss.beta'"),
    ([{"loss.beta": "big"}], "loss.beta = 'big', which must be of type float"),
    ([{"loss.beta": -1.0}], "loss.beta = -1.0 must be above 0"),
  ],
)
def test_points_that_cannot_be_are_refused_before_anything_is_trained(
  tmp_path, points, message
):
  with pytest.raises(ValueError, match=message):
    sweeps.sweep(load(), points, tmp_path)
  assert not list(tmp_path.rglob("checkpoints"))


def test_names_of_points_are_short_where_that_is_clear():
  name = load_lib.point_name
  assert name({"loss.beta": 0.1, "data.seed": 1}) == "beta=0.1,seed=1"
  assert name({"data.seed": 0, "sample.seed": 1}) == "data.seed=0,sample.seed=1"


def test_assembly_tells_traced_fields_from_compiled_ones():
  config = load()
  run = build.prepare(config)
  alike = sweeps.prepare_point(load("loss.beta=2.0"), config, run)
  assert alike.feed is run.feed
  assert alike.step is run.step
  assert float(alike.hparams["beta"]) == 2.0
  other = sweeps.prepare_point(load("data.batch_size=4"), config, run)
  assert other.feed.loader is not run.feed.loader
  assert other.step is not run.step


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """The folder of the same sweep as `swept`, its points in one program."""
  workdir = tmp_path_factory.mktemp("together")
  config = load(*SAMPLED, "sweep.together=2")
  assert sweeps.sweep(config, POINTS, workdir) == 0
  return workdir


def kinds(workdir):
  """Paths of a run folder, without the names that Orbax makes up."""
  found = {str(p.relative_to(workdir)) for p in workdir.rglob("*")}
  return {path for path in found if "ocdbt" not in path and "/d/" not in path}


@pytest.mark.slow
def test_points_in_one_program_leave_the_folders_of_runs_alone(swept, together):
  alone, _ = swept
  assert kinds(together) == kinds(alone)
  for name in ("beta=0.1", "beta=5.0"):
    theirs, ours = metrics(alone, name), metrics(together, name)
    assert [(r["kind"], r["step"]) for r in ours] == [
      (r["kind"], r["step"]) for r in theirs
    ]
    assert [r.keys() for r in ours] == [r.keys() for r in theirs]
    # Three updates of RMSprop, which enlarges the rounding of small gradients.
    for a, b in zip(ours, theirs, strict=True):
      assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-4)
    a, b = (
      json.loads((folder / name / "evaluation.json").read_text())
      for folder in (together, alone)
    )
    assert a.keys() == b.keys()
    assert a["config"]["loss"] == b["config"]["loss"]
    assert a["comparisons"]["loss"] == pytest.approx(
      b["comparisons"]["loss"], rel=1e-2
    )


def test_a_point_trained_with_others_goes_on_alone(together, tmp_path):
  folder = tmp_path / "beta=5.0"
  shutil.copytree(together / "beta=5.0", folder)
  config = load("ref=cached", "loss.beta=5.0", "train.steps=4")
  assert int(loop.fit(config, folder).state.step) == 4
  assert [r["step"] for r in metrics(tmp_path, "beta=5.0")][-1] == 4


def test_a_sweep_is_finished_whether_its_points_trained_together_or_not(
  together, monkeypatch
):
  monkeypatch.setattr(
    sweeps, "fit_together", lambda *_: pytest.fail("trained again")
  )
  config = load(*SAMPLED)
  assert sweeps.sweep(config, POINTS, together) == 0
  assert report.write(together).exists()


def test_an_interrupted_program_saves_all_points_and_goes_on(
  tmp_path, monkeypatch
):
  config = load("data.eval=None", "sweep.together=2", "log.every=1")
  run, step = build.prepare(config), log.Logger.step
  # Thrice the same config: its programs are compiled once.
  monkeypatch.setattr(build, "prepare", lambda config: run)

  def interrupting(self, number, *args):
    if number == 2:
      signal.raise_signal(signal.SIGINT)
    return step(self, number, *args)

  with monkeypatch.context() as patch:
    patch.setattr(log.Logger, "step", interrupting)
    # Two points: the second signal would take its usual effect.
    patch.setattr(signal, "raise_signal", once(signal.raise_signal))
    assert sweeps.sweep(config, POINTS, tmp_path / "cut") == 130
  for name in ("beta=0.1", "beta=5.0"):
    assert checkpoint.latest_step(tmp_path / "cut" / name) == 2
  for name in ("cut", "whole"):
    assert sweeps.sweep(config, POINTS, tmp_path / name) == 0
  clock = log.TIMED
  for name in ("beta=0.1", "beta=5.0"):
    cut, whole = (
      [
        {k: v for k, v in row.items() if k not in clock}
        for row in metrics(tmp_path / folder, name)
      ]
      for folder in ("cut", "whole")
    )
    assert cut == whole


def once(fn):
  """A function that does something the first time alone."""
  calls = []

  def wrapper(*args):
    if not calls:
      calls.append(args)
      fn(*args)

  return wrapper


def test_points_that_got_apart_go_on_apart(tmp_path, monkeypatch):
  config = load_lib.at(load("data.eval=None"), POINTS[0])
  folders.untrained(config, tmp_path / "beta=0.1", step=3)
  at_once = []

  def fit(runs, folders):
    at_once.append([folder.name for folder in folders])
    return [recorder.Result(None, None, 0, None, folder) for folder in folders]

  monkeypatch.setattr(sweeps, "fit_together", fit)
  more = load("data.eval=None", "train.steps=4", "sweep.together=2")
  points = [*POINTS, {"loss.beta": 1.0}, {"loss.beta": 2.0}]
  assert sweeps.sweep(more, points, tmp_path) == 0
  assert at_once == [["beta=0.1"], ["beta=5.0", "beta=1.0"], ["beta=2.0"]]


def test_runs_at_different_steps_do_not_train_together(tmp_path):
  config = load("data.eval=None", "train.steps=1")
  configs = [load_lib.at(config, point) for point in POINTS]
  run, _ = folders.untrained(configs[0], tmp_path / "a", step=1)
  runs = sweeps.beside(configs, run)
  with pytest.raises(ValueError, match=r"a is at 1, .*b is at 0; train them"):
    sweeps.fit_together(runs, [tmp_path / "a", tmp_path / "b"])


@pytest.mark.slow
def test_a_point_that_is_not_finite_fails_alone_in_its_program(
  tmp_path, capsys
):
  config = load("sweep.together=3", "train.max_skipped=2", "log.every=1")
  points = [{"optim.learning_rate": rate} for rate in (1e-3, 1e38, 2e-3)]
  assert sweeps.sweep(config, points, tmp_path) == 1
  out = capsys.readouterr().out
  assert "learning_rate=1e+38: 2 updates in a row were not finite" in out
  assert "failed: learning_rate=1e+38; the other points are done" in out
  for rate, done in ((1e-3, True), (1e38, False), (2e-3, True)):
    folder = tmp_path / f"learning_rate={rate}"
    assert (folder / "evaluation.json").exists() == done
    assert (checkpoint.latest_step(folder) == 3) == done
