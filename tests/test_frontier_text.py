"""The paper's methods on real text: its stages, and all of it in small."""

import json

import pytest

from dpo_jax import cli
from dpo_jax.config import load, saved
from tests import conftest

SPEC = "configs/frontier_text.py"
# Where things lie, how often they are kept, and what is told on the way.
APART = {
  *("workdir", "tokenizer", "init_from", "data.train", "data.eval"),
  *("checkpoint.every", "checkpoint.keep", "sample.checkpoints"),
  *("train.steps", "train.epochs"),  # one pass is 75 steps
}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)


def stage(name, spec=SPEC):
  return load.load_config(f"{spec}:stage={name}")


@pytest.mark.parametrize("name", ["sft", "pairs", "held_out", "dpo,beta=5.0"])
def test_the_quickstart_is_seed_0_of_it(name):
  ours, theirs = (
    saved.flatten(stage(name, spec).to_dict())
    for spec in (SPEC, "configs/quickstart.py")
  )
  differ = {key for key in ours if ours[key] != theirs.get(key)}
  assert ours.keys() == theirs.keys()
  assert differ <= APART


def test_each_seed_has_its_own_of_everything():
  steps = load.load_config(SPEC).stages
  assert steps[0] == ("train", "tokenizer")
  for seed, step in zip((0, 1, 2), steps[1:], strict=True):
    assert step == ("together", f"seed,seed={seed}")
    own = [name for _, name, *_ in stage(step[1]).stages]
    assert len(own) == 10
    for name in own:
      c = stage(name)
      assert f"seed={seed}" in c.workdir
      assert c.data.seed == seed
      if not name.startswith("sft"):
        assert c.init_from == f"runs/frontier_text/seed={seed}/sft"
  assert [stage(f"sft,seed={s}").init_seed for s in (0, 1, 2)] == [0, 1, 2]
  drawn = [stage(f"{n},seed={s}").sample.seed for s in (0, 1) for n in STAGES]
  assert len(set(drawn)) == 4
  assert stage("ppo,seed=2").rollout.seed == 2


STAGES = ("pairs", "held_out")


def test_every_policy_is_measured_alike():
  """The same beginnings, draws' seed and scorers: policies alone differ."""
  methods = ("dpo", "ppo", "ppo_gt", "unlikelihood", "preferred_ft")
  samples = [stage(name).sample.to_dict() for name in methods]
  assert all(each == samples[0] for each in samples)
  assert samples[0]["scorers"][0] == "sentiment:reviews:train"  # in (0, 1)
  assert stage("ppo_gt").rollout.scorer == samples[0]["scorers"][0]
  for name in methods:
    c = stage(name)
    saved_at = {*range(0, c.train.steps, c.checkpoint.every)} - {0}
    assert len(saved_at) + 1 == 6, name  # and the last
    assert c.checkpoint.keep > 6  # a run that is stopped has one more


def test_large_beta_has_small_steps():
  rates = [stage(f"dpo,beta={b}").optim.learning_rate for b in (0.05, 1.0, 5.0)]
  assert rates == [5e-4, 1e-4, 2e-5]


@pytest.mark.slow
def test_all_of_it_in_small_ends_in_a_report_and_is_not_done_twice(
  tmp_path, capsys
):
  argv = ["train", "--config", f"{SPEC}:smoke,root={tmp_path}"]
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert "Is DPO ahead?" in out
  assert "not measured yet" not in out
  summary = json.loads((tmp_path / "frontier.json").read_text())
  assert summary["missing"] == []
  assert {run["method"] for run in summary["runs"]} == {
    *("dpo", "ppo", "ppo_gt", "unlikelihood", "preferred_ft")
  }
  for run in summary["runs"]:
    # Inside an iteration of PPO nothing is saved: its draws would be lost.
    steps = [2] if run["method"].startswith("ppo") else [1, 2]
    assert [spot["step"] for spot in run["checkpoints"]] == steps
  assert [best["n"] for best in summary["best_of"]["0"]] == [1, 4]
  page = (tmp_path / "report.html").read_text()
  assert "seconds" in page
  assert cli.main(argv) == 0
  again = capsys.readouterr().out
  assert "steps 0 to" not in again
  assert json.loads((tmp_path / "frontier.json").read_text()) == summary
