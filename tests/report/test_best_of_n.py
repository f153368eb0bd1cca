"""Best-of-N in a report: every N of every run, and marks at the bound."""

import json
import math
import re

import pytest

from dpo_jax import report
from dpo_jax.eval import best_of as estimator
from dpo_jax.report import best_of, content, folder
from tests import test_report as made_up

COUNTS = (1, 4, 16, 64, 128)


def result_of(kl, counts):
  """What an evaluation of draws at some KL from the reference has."""
  items = []
  for n in counts:
    bound = estimator.bound(n)
    reward = -0.2 + 0.5 * math.log1p(kl + bound)
    means = {
      made_up.TRUTH: (reward, 0.031),
      "reward/vader": (0.3 + 0.3 * reward, 0.024),
      "length": (48.25 - bound, 0.62),
      "kl": (0.9 * bound, 0.002),
      "kl_from_reference": (bound + kl, 0.01),
    }
    means = {k: {"mean": mean, "se": se} for k, (mean, se) in means.items()}
    items.append({"n": n, "bound": bound, "means": means})
  about = {"ranking": "reward/vader", "prompts": 512, "draws": 128}
  return {**about, "best_of": items}


def write(workdir, counts=COUNTS, names=("reference", "b0.1"), **changes):
  """A made-up sweep some runs of which have the best of N."""
  made_up.build(workdir)
  for name in names:
    path = workdir / name / "evaluation.json"
    values = json.loads(path.read_text())
    kl = values["means"]["kl"]["mean"]
    values["best_of"] = {**result_of(kl, counts), **changes}
    path.write_text(json.dumps(values))
  return workdir


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
  workdir = write(tmp_path_factory.mktemp("best_of"))
  report.write(workdir)
  return workdir


def test_the_table_has_a_line_for_every_n_of_every_run(sampled):
  heads, body = best_of.grid(folder.read(sampled))
  assert heads == [
    *("run", "N", "r* (tfidf)", "vader", "KL at most, nats"),
    *("KL by ties, nats", "KL from π_ref at most, nats", "length, tokens"),
  ]
  named = [(entry.name, cells[0]) for entry, cells in body]
  assert named == [
    (name, (str(n),)) for name in ("reference", "beta=0.1") for n in COUNTS
  ]
  for (_, cells), item in zip(
    body[len(COUNTS) :], result_of(9 / 1.6, COUNTS)["best_of"], strict=True
  ):
    mean = item["means"][made_up.TRUTH]
    assert cells[1] == (f"{mean['mean']:.2f}", f"{mean['se']:.2f}")
    assert cells[3] == (f"{item['bound']:.2f}",)


def test_the_page_and_the_text_show_the_table(sampled):
  shown = made_up.Page(sampled / "report.html").text
  words = (sampled / "report.md").read_text()
  (section,) = re.findall(r"## Best of N\n+(.*?)\n## ", words, re.DOTALL)
  _, body = best_of.grid(folder.read(sampled))
  for entry, cells in body:
    line = " ".join(map(content.cell, cells))
    assert line.replace("-", "−") in shown
    assert f"| {entry.name} | {' | '.join(map(content.cell, cells))} |" in (
      section
    )
  assert "ranked by vader" in shown
  assert "ranked by vader" in section


def test_marks_of_the_reference_stand_at_the_bound(sampled):
  sweep = folder.read(sampled)
  marks = best_of.marks(sweep)
  assert [mark.name for mark in marks] == [f"best of {n}" for n in COUNTS[1:]]
  items = sweep.reference.evaluation["best_of"]["best_of"][1:]
  for mark, item in zip(marks, items, strict=True):
    assert mark.kl == item["bound"] == estimator.bound(item["n"])
    assert math.isnan(mark.kl_se)
    value = item["means"][made_up.TRUTH]
    assert (mark.reward, mark.reward_se) == (value["mean"], value["se"])
  said = content.captions(sweep)["frontier"]
  assert "the most that their KL can be" in said


def test_without_a_measured_kl_there_are_no_marks(sampled, tmp_path):
  write(tmp_path)
  path = tmp_path / "reference" / "evaluation.json"
  values = json.loads(path.read_text())
  for item in values["best_of"]["best_of"]:
    del item["means"]["kl_from_reference"]
  path.write_text(json.dumps(values))
  sweep = folder.read(tmp_path)
  assert not best_of.marks(sweep)
  assert "Squares" not in content.captions(sweep)["frontier"]
  assert len(best_of.grid(sweep)[1]) == 2 * len(COUNTS)


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_that_did_not_ask_for_it_says_nothing_of_it(tmp_path):
  made_up.build(tmp_path)
  page = made_up.Page(report.write(tmp_path))
  assert "Best of N" not in page.text
  assert "Best of N" not in (tmp_path / "report.md").read_text()


undrawn = made_up.undrawn


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
  "damage",
  [
    None,
    [],
    {"best_of": None},
    {"best_of": [{"n": 4}, 3, {"n": None, "bound": 0.6, "means": {}}]},
    {"best_of": [{"n": 4, "bound": 0.6, "means": {made_up.TRUTH: None}}]},
  ],
)
def test_a_damaged_result_leaves_the_rest_of_the_page(damage, tmp_path):
  write(tmp_path, names=("b0.1",))
  path = tmp_path / "reference" / "evaluation.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps({**values, "best_of": damage}))
  page = made_up.Page(report.write(tmp_path))
  assert "Best of N" in page.text
  assert not best_of.marks(folder.read(tmp_path))
