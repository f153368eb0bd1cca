"""The main job in its small form: what it claims, and that it goes on."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import conftest

pytestmark = [pytest.mark.slow, pytest.mark.optimised]
# The stages of the script, so that this runs what a user runs.
SCRIPT = (conftest.ROOT / "scripts/quickstart.sh").read_text()
STAGES = re.findall(r"^dpo (\w+) (stage=\w+)$", SCRIPT, re.MULTILINE)


def run(root):
  """Runs all stages, as processes of their own; returns what they print."""
  out = ""
  for verb, stage in STAGES:
    config = f"configs/quickstart.py:{stage},root={root},quick"
    done = subprocess.run(
      [sys.executable, "-m", "dpo_jax.cli", verb, "--config", config],
      cwd=conftest.ROOT,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    out += done.stdout
  return out


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  """(folder of a finished run, what it printed).

  Where scripts/quickstart.sh was just run, QUICKSTART_LOG is what it printed.
  """
  if "QUICKSTART_LOG" in os.environ:
    out = pathlib.Path(os.environ["QUICKSTART_LOG"]).read_text()
    return pathlib.Path("runs/quickstart-quick"), out[: out.rindex("all: ")]
  root = tmp_path_factory.mktemp("quickstart")
  return root, run(root)


def means(root, name):
  """{metric: (mean, standard error)} of a policy's samples."""
  values = json.loads((root / name / "evaluation.json").read_text())["means"]
  return {k: (v["mean"], v["se"]) for k, v in values.items()}


def apart(high, low):
  """How many standard errors of their difference lie between two means."""
  return (high[0] - low[0]) / math.hypot(high[1], low[1])


def test_the_script_has_the_stages_of_the_experiment():
  names = [stage for _, stage in STAGES]
  assert names[0] == "stage=tokenizer"
  assert names[-1] == "stage=dpo"
  assert len(names) == 5


def test_smaller_beta_goes_further_from_the_reference(quick):
  kl = {b: means(quick[0], f"beta={b}")["kl"] for b in ("0.1", "1.0", "5.0")}
  assert apart(kl["0.1"], kl["1.0"]) > 2
  assert apart(kl["1.0"], kl["5.0"]) > 2


@pytest.mark.parametrize("name", ["beta=0.05", "beta=0.1"])
def test_dpo_earns_more_of_the_true_reward_than_sft(quick, name):
  truth = "reward/sentiment"
  gained = means(quick[0], name)[truth]
  assert apart(gained, means(quick[0], "reference")[truth]) > 5


@pytest.mark.parametrize("name", ["beta=0.05", "beta=0.1", "beta=1.0"])
def test_the_two_estimates_of_the_kl_agree(quick, name):
  # They share samples, so the error of their difference is smaller than this.
  there = means(quick[0], name)
  assert abs(apart(there["kl"], there["log_ratio"])) < 3


def test_the_reference_log_probs_are_computed_once_for_all_beta(quick):
  # Once for training pairs and once for held-out ones.
  assert quick[1].count("reference log-probs:") == 2
  assert quick[1].count("steps 0 to") == 5  # SFT and four β


def test_the_last_lines_are_the_table_and_the_report(quick):
  lines = [line for line in quick[1].splitlines() if line]
  assert lines[-8].startswith("run ")
  assert lines[-2] == f"report: {quick[0]}/report.html"
  page = (quick[0] / "report.html").read_text()
  assert page.count("<article") == 15  # three prompts, five policies


def test_the_same_commands_again_change_no_result(quick):
  root, _ = quick

  def results():
    return {
      path: path.read_bytes()
      for path in root.rglob("*")
      if path.suffix in (".jsonl", ".npy") or path.name == "evaluation.json"
    }

  before = results()
  out = run(root)
  assert results() == before
  assert out.count("done before, skipped") == 5
