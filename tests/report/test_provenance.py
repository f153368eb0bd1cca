"""Where numbers come from: what the runs share, and what they differ in."""

import json
import os
import platform
import re
import types

import jax
import pytest

from dpo_jax import report
from dpo_jax.eval import evaluation, frontier
from dpo_jax.report import folder, provenance
from tests import test_report as made_up

MADE_WITH = {
  "dpo_jax": "0.1.0",
  "commit": "4caae90",
  "python": "3.11.9",
  "jax": "0.10.2",
  "device": "8 × TPU v4",
}


def config_of(beta, **more):
  return {
    "init_seed": 3,
    "loss": {"name": "dpo", "beta": beta},
    "data": {"seed": 4, "train": "<my>.jsonl"},
    "sample": {"seed": 5},
    **more,
  }


def build(workdir, betas=(0.1, 1.0)):
  """A made-up sweep that knows where it comes from."""
  made_up.build(workdir, betas=betas, steps=5)
  for beta in betas:
    record(workdir, beta, config=config_of(beta), made_with=MADE_WITH)
    path = workdir / f"b{beta}/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
      row |= {"tokens_per_second": 1000.0 * (number + 1)}
      # It was stopped after the third step.
      row |= {"elapsed": (10.0, 20.0, 30.0, 5.0, 3605.0)[number]}
    del rows[0]["tokens_per_second"]  # compiles
    made_up.lines(path, rows)
  return workdir


def record(workdir, beta, **values):
  there = made_up.saved(workdir, f"b{beta}", "evaluation.json")
  path = workdir / f"b{beta}/evaluation.json"
  made_up.lines(path, [there | values])


def test_what_all_runs_share_is_said_once_and_the_rest_run_by_run(tmp_path):
  build(tmp_path)
  record(tmp_path, 1.0, made_with=MADE_WITH | {"jax": "0.11.0"})
  alike, heads, body = provenance.facts(folder.read(tmp_path))
  assert dict(alike) == {
    "data.train": "<my>.jsonl",
    "init_seed": "3",
    "data.seed": "4",
    "sample.seed": "5",
    "commit": "4caae90",
    "dpo_jax": "0.1.0",
    "python": "3.11.9",
    "device": "8 × TPU v4",
    "training time, h:m:s": "1:00:35",
    "tokens/s (median)": "3,500",
  }
  assert heads == ["run", "loss.beta", "jax"]
  # What is not set says nothing.
  for beta in (0.1, 1.0):
    record(tmp_path, beta, config=config_of(beta, init_from=None))
  alike, *_ = provenance.facts(folder.read(tmp_path))
  assert "init_from" not in dict(alike)
  assert body == [("beta=0.1", "0.1", "0.10.2"), ("beta=1.0", "1.0", "0.11.0")]


def test_every_field_in_which_the_configs_differ_is_named(tmp_path):
  build(tmp_path)
  other = config_of(1.0, init_seed=7, ref=None, optim={"warmup": 10})
  record(tmp_path, 1.0, config=other)
  record(tmp_path, 0.1, config=config_of(0.1, ref="frozen"))
  _, heads, body = provenance.facts(folder.read(tmp_path))
  first, second = (dict(zip(heads, row, strict=True)) for row in body)
  assert first == {
    "run": "beta=0.1",
    "loss.beta": "0.1",
    "ref": "frozen",
    "optim.warmup": "–",
    "init_seed": "3",
  }
  assert second["ref"] == "null"
  assert second["optim.warmup"] == "10"
  assert second["init_seed"] == "7"


def test_of_folders_that_recorded_nothing_it_is_said(tmp_path):
  made_up.build(tmp_path, betas=(0.1, 1.0), steps=5)
  alike, _, body = provenance.facts(folder.read(tmp_path))
  assert not body
  assert {"config", "init_seed", "commit", "jax", "device"} <= dict(
    alike
  ).keys()
  assert {value for _, value in alike} == {"not recorded"}
  page = made_up.Page(report.write(tmp_path)).text
  assert "commit not recorded" in page
  assert "- commit: not recorded" in (tmp_path / "report.md").read_text()


def test_a_run_that_is_not_evaluated_has_its_config_all_the_same(tmp_path):
  build(tmp_path)
  (tmp_path / "b0.1/evaluation.json").unlink()
  made_up.lines(tmp_path / "b0.1/config.json", [config_of(0.1)])
  _, heads, body = provenance.facts(folder.read(tmp_path))
  assert heads[:2] == ["run", "loss.beta"]
  assert body[0][:2] == ("beta=0.1", "0.1")
  assert body[0][heads.index("commit")] == "not recorded"


def test_a_run_that_has_not_begun_hides_nothing_of_the_others(tmp_path):
  build(tmp_path, betas=(0.1, 1.0, 5.0))
  for path in (tmp_path / "b5.0").iterdir():
    path.unlink()
  _, heads, body = provenance.facts(folder.read(tmp_path))
  assert heads[1:3] == ["loss.beta", "data.train"]
  assert [row[1:3] for row in body] == [
    ("0.1", "<my>.jsonl"),
    ("1.0", "<my>.jsonl"),
    ("not recorded", "not recorded"),
  ]


def test_the_page_and_the_markdown_show_it_as_text(tmp_path):
  build(tmp_path)
  record(tmp_path, 1.0, config=config_of(1.0, init_from="<b>|x"))
  page = made_up.Page(report.write(tmp_path))
  assert "b" not in page.tags
  assert "device 8 × TPU v4" in page.text
  assert "beta=1.0 1.0 <b>|x" in page.text
  words = (tmp_path / "report.md").read_text()
  assert r"| beta=1.0 | 1.0 | &lt;b&gt;\|x |" in words
  assert words.index("## Samples") < words.index("## Provenance")


def test_an_evaluation_records_what_it_was_made_with(tmp_path, monkeypatch):
  def measure(*_):
    return {"samples": 1}, [{"id": 0}]

  loader = types.SimpleNamespace(comparisons=6, size=2)
  setup = types.SimpleNamespace(
    sample=types.SimpleNamespace(prompts="mine", checkpoints=False),
    trained=types.SimpleNamespace(model=lambda base, params: params),
    asked={"loss": {"beta": 0.1}},
  )
  held_out = types.SimpleNamespace(loader=lambda: (loader, "a line"))
  run = types.SimpleNamespace(setup=setup, held_out=held_out)
  monkeypatch.setattr(frontier, "measure", measure)
  monkeypatch.setattr(evaluation, "_held_out", lambda *_: {"loss": 0.5})
  evaluation.evaluate(run, {}, {}, tmp_path, {"step": 3})
  there = made_up.saved(tmp_path, ".", "evaluation.json")
  assert (there["count"], there["examples"]) == (6, 2)
  made_with = there["made_with"]
  assert made_with.keys() == MADE_WITH.keys()
  assert made_with["python"] == platform.python_version()
  assert made_with["jax"] == jax.__version__
  count, kind = jax.device_count(), jax.devices()[0].device_kind
  assert made_with["device"].startswith(f"{count} × {kind}")


def test_the_commit_is_that_of_the_checkout_and_else_unknown(
  tmp_path, monkeypatch
):
  git = "git -c user.name=me -c user.email=me@x.test"
  package = tmp_path / "dpo_jax"
  package.mkdir()
  (package / "evaluation.py").write_text("")
  monkeypatch.setattr(evaluation, "__file__", str(package / "evaluation.py"))
  assert evaluation.made_with()["commit"] is None  # no checkout at all
  assert os.system(f"cd {tmp_path} && git init -q && touch other") == 0
  commit = f"cd {tmp_path} && {git} add %s && {git} commit -qm one"
  assert os.system(commit % "other") == 0
  assert evaluation.made_with()["commit"] is None  # another project's
  assert os.system(commit % ".") == 0
  first = evaluation.made_with()["commit"]
  assert re.fullmatch(r"[0-9a-f]{40}", first)
  (package / "evaluation.py").write_text("changed")
  assert evaluation.made_with()["commit"] == f"{first}-dirty"
  monkeypatch.setenv("PATH", "")
  assert evaluation.made_with()["commit"] is None  # no git


@pytest.mark.parametrize("values", [[], [None, 3.0], ["x"]])
def test_times_that_are_not_numbers_are_not_recorded(tmp_path, values):
  build(tmp_path, betas=(0.1,))
  rows = [{"step": 1, "kind": "train", "elapsed": v} for v in values]
  made_up.lines(tmp_path / "b0.1/metrics.jsonl", rows)
  alike, _, _ = provenance.facts(folder.read(tmp_path))
  expected = "0:03" if 3.0 in values else "not recorded"
  assert dict(alike)["training time, h:m:s"] == expected


def test_a_resumed_runs_time_is_that_of_all_its_processes(tmp_path):
  build(tmp_path, betas=(0.1,))
  # The second was late to its first line: only its start tells it apart.
  times = ((10, 1010), (20, 1020), (30, 5030), (40, 5040))
  rows = [
    {"step": 1, "kind": "train", "elapsed": elapsed, "wall_time": now}
    for elapsed, now in times
  ]
  made_up.lines(tmp_path / "b0.1/metrics.jsonl", rows)
  alike, _, _ = provenance.facts(folder.read(tmp_path))
  assert dict(alike)["training time, h:m:s"] == "1:00"
