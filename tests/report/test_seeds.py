"""Runs that differ in their seeds alone are one point, with its own spread."""

import json
import statistics

import pytest

from dpo_jax import report
from dpo_jax.report import content, folder
from tests import test_report as made_up

SEEDS = (0, 1, 2)


def build(workdir, name="init_seed", betas=(1.0, 0.1), seeds=SEEDS, more=None):
  """A made-up sweep over β and a seed; rewards move with the seed."""
  made_up.build(workdir, betas=betas, steps=5)
  points = []
  for seed in seeds:
    for beta in betas:
      point = f"beta={beta},{name.rsplit('.', 1)[-1]}={seed}"
      overrides = {"loss.beta": beta, name: seed, **(more or {})}
      points.append({"name": point, "overrides": overrides, "folder": point})
      values = made_up.saved(workdir, f"b{beta}", "evaluation.json")
      values["means"][made_up.TRUTH]["mean"] += seed**2
      values["comparisons"]["loss"] += seed
      path = workdir / point
      made_up.lines(path / "evaluation.json", [values])
      for file in ("samples.jsonl", "metrics.jsonl"):
        path.joinpath(file).write_bytes(
          workdir.joinpath(f"b{beta}", file).read_bytes()
        )
  about = json.loads((workdir / "sweep.json").read_text())
  text = json.dumps(about | {"points": points})
  (workdir / "sweep.json").write_text(text)
  return workdir


@pytest.mark.parametrize("name", ["init_seed", "data.seed"])
def test_above_the_seeds_of_a_point_stands_their_mean(tmp_path, name):
  build(tmp_path, name)
  rows = report.rows(tmp_path)
  short = name.rsplit(".", 1)[-1]
  assert [(row["run"], row["seeds"]) for row in rows] == [
    ("reference", 1),
    ("beta=0.1 (3 seeds)", 3),
    *((f"beta=0.1,{short}={seed}", 1) for seed in SEEDS),
    ("beta=1.0 (3 seeds)", 3),
    *((f"beta=1.0,{short}={seed}", 1) for seed in SEEDS),
  ]
  mean, *runs = rows[1:5]
  for key in (made_up.TRUTH, "loss", "kl", "rewards/accuracies", "distinct_1"):
    values = [
      row[key]["mean"] if isinstance(row[key], dict) else row[key]
      for row in runs
    ]
    assert mean[key]["mean"] == pytest.approx(statistics.mean(values))
    se = statistics.stdev(values) / 3**0.5
    assert mean[key]["se"] == pytest.approx(se, abs=1e-12)
  assert mean["loss"]["se"] == pytest.approx(1 / 3**0.5)
  assert mean["rewards/accuracies/interval"] is None


def test_points_that_differ_in_more_than_seeds_are_points_of_their_own(
  tmp_path,
):
  build(tmp_path, "sample.seed")
  rows = report.rows(tmp_path)
  assert [row["seeds"] for row in rows] == [1] * 7
  assert "over seeds" not in content.captions(folder.read(tmp_path))["table"]


def test_a_sweep_over_nothing_but_seeds_is_one_point(tmp_path):
  build(tmp_path, betas=(0.1,))
  path = tmp_path / "sweep.json"
  about = json.loads(path.read_text())
  for point in about["points"]:
    del point["overrides"]["loss.beta"]
  path.write_text(json.dumps(about))
  rows = report.rows(tmp_path)
  assert rows[1]["run"] == "all (3 seeds)"
  assert len(rows) == 5


def test_a_seed_that_is_not_evaluated_yet_is_not_in_the_mean(tmp_path):
  build(tmp_path)
  (tmp_path / "beta=0.1,init_seed=2/evaluation.json").unlink()
  rows = {row["run"]: row for row in report.rows(tmp_path)}
  assert rows["beta=0.1 (2 seeds)"]["loss"]["se"] == pytest.approx(0.5)
  assert rows["beta=0.1,init_seed=2"]["loss"] is None
  (tmp_path / "beta=0.1,init_seed=1/evaluation.json").unlink()
  names = [row["run"] for row in report.rows(tmp_path)]
  assert not any(name.startswith("beta=0.1 (") for name in names)


def test_the_figure_has_a_mark_a_point_with_its_seeds_and_joins_the_marks(
  tmp_path,
):
  build(tmp_path)
  caught = made_up.drawn(tmp_path)
  first, second, reference = caught["frontier"]
  assert (first.name, second.name) == (
    "beta=0.1 (3 seeds)",
    "beta=1.0 (3 seeds)",
  )
  rewards = [reward for _, reward in first.seeds]
  assert first.reward == pytest.approx(statistics.mean(rewards))
  assert first.reward_se == pytest.approx(statistics.stdev(rewards) / 3**0.5)
  assert first.kl_se == 0
  assert reference.seeds == ()
  assert caught["joined"]
  # Their curves share a colour, and a name in the legend.
  (legend,) = caught["curves"].legends
  assert [t.get_text() for t in legend.get_texts()] == ["beta=0.1", "beta=1.0"]
  assert len({line.get_color() for line in caught["curves"].axes[0].lines}) == 2


@pytest.mark.parametrize("seeds", [(0,), SEEDS])
def test_every_caption_of_errors_says_what_they_are_over(tmp_path, seeds):
  build(tmp_path, seeds=seeds)
  notes = content.captions(folder.read(tmp_path))
  for name in ("frontier", "table"):
    assert ("1 standard error over seeds" in notes[name]) == (len(seeds) > 1)
    assert "over prompts" in notes[name]
    again = "not of training it again with another seed" in notes[name]
    assert again == (len(seeds) == 1)


def test_runs_that_began_elsewhere_than_the_reference_are_named(tmp_path):
  build(tmp_path, betas=(0.1,))
  assert not any(
    "began from" in line for line in content.remarks(folder.read(tmp_path))
  )
  for name, start in (("reference", 0), *((f"{s}", s) for s in SEEDS)):
    path = name if name == "reference" else f"beta=0.1,init_seed={name}"
    values = made_up.saved(tmp_path, path, "evaluation.json")
    values["reference"] = {"embed": start}
    made_up.lines(tmp_path / path / "evaluation.json", [values])
  line, *_ = content.remarks(folder.read(tmp_path))
  assert line.startswith("beta=0.1,init_seed=1, beta=0.1,init_seed=2: began")


def test_the_page_has_samples_of_one_seed_and_the_seeds_under_their_mean(
  tmp_path,
):
  page = report.write(build(tmp_path)).read_text()
  assert page.count("<article") == 9  # three prompts; the reference, two points
  assert page.count('<tr class="nested">') == 6
  assert "beta=0.1 (3 seeds)" in page
  assert "beta=0.1 (3 seeds)" in (tmp_path / "report.md").read_text()
