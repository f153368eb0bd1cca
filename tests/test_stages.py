"""A config whose `train` runs the stages of its file."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dpo_jax import cli
from dpo_jax.train import checkpoint
from tests import conftest

FILE = """
  from configs import base, common, dpo


  def get_config(arg=None):
    arg = common.parse_arg(arg, stage="all", root="unset", name="a")
    if arg.stage == "all":
      return common.stages(
        arg.root, ("train", "first"), ("export", "first"), ("audit", "broken"),
        root=arg.root, name=arg.name,
      )
    c = dpo.get_config("smoke")
    c.train.steps = 1
    c.data.eval = None
    c.workdir = f"{arg.root}/{arg.name}"
    if arg.stage == "broken":
      c.data.train = "toy:4"
      c.audit.special_tokens = None
      c.data.max_completion_length = 4
    return c
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
  monkeypatch.chdir(conftest.ROOT)
  path = tmp_path / "three.py"
  path.write_text(textwrap.dedent(FILE))
  return f"{path}:root={tmp_path / 'runs'},name=b"


def test_stages_run_in_turn_with_their_arguments_until_one_fails(
  spec, tmp_path, capsys
):
  # The last stage's completions are all cut: the audit's exit code is 1.
  assert cli.main(["train", "--config", spec]) == 1
  out = capsys.readouterr().out
  begin = [out.index(f"━━ {verb}") for verb in ("train", "export", "audit")]
  assert begin == sorted(begin)
  assert (tmp_path / "runs/b/export/model.safetensors").exists()
  assert cli.main(["train", "--config", spec]) == 1
  assert "done before, skipped" in capsys.readouterr().out


def test_another_folder_is_named_by_the_argument(spec, tmp_path, capsys):
  argv = ["train", "--config", spec, "--workdir", str(tmp_path / "x")]
  assert cli.main(argv) == 2
  assert f"root={tmp_path / 'x'}" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


SIDE_BY_SIDE = """
  import json
  import pathlib

  from configs import base, common, dpo


  def get_config(arg=None):
    arg = common.parse_arg(
      arg, stage="all", root="unset", name="a", fails=False
    )
    if arg.stage == "all":
      return common.stages(
        arg.root, *(("together", f"one,name={n}") for n in "xyz"),
        ("audit", "after"), root=arg.root, fails=arg.fails,
      )
    c = dpo.get_config("smoke")
    c.train.steps = 1
    c.data.eval = None
    c.workdir = f"{arg.root}/{arg.name}"
    if arg.stage == "one":
      return common.stages(
        c.workdir, ("train", f"first,name={arg.name}"), root=arg.root,
        fails=arg.fails,
      )
    c.audit.special_tokens = None
    c.data.train = "toy:4"
    if arg.fails and arg.name == "y":
      c.data.train = "none.jsonl"
    if arg.stage == "after":
      pathlib.Path(arg.root, "after.json").write_text(json.dumps(sorted(
        p.name for p in pathlib.Path(arg.root).iterdir() if p.is_dir()
      )))
    return c
"""


@pytest.mark.slow
def test_stages_side_by_side_are_waited_for_and_a_failure_is_told(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(conftest.ROOT)
  path, runs = tmp_path / "beside.py", tmp_path / "runs"
  path.write_text(textwrap.dedent(SIDE_BY_SIDE))
  runs.mkdir()
  assert cli.main(["train", "--config", f"{path}:root={runs},fails"]) == 2
  out = capfd.readouterr().out
  assert "3 at once: one,name=x, one,name=y, one,name=z" in out
  assert "one,name=y: exit code 2, error: none.jsonl" in out
  assert "━━ audit" not in out  # what comes after a failure
  for name in "xz":
    assert f"one,name={name}: ━━ train first,name={name}" in out
    assert "done: 1 steps" in (runs / name / "log.txt").read_text()
    assert (runs / name / "metrics.jsonl").exists()
  assert cli.main(["train", "--config", f"{path}:root={runs}"]) == 0
  assert "━━ audit" in capfd.readouterr().out
  assert "done before, skipped" not in (runs / "y/log.txt").read_text()


@pytest.mark.slow
def test_a_signal_reaches_stages_side_by_side_and_each_saves(tmp_path):
  path, runs = tmp_path / "beside.py", tmp_path / "runs"
  runs.mkdir()
  text = textwrap.dedent(SIDE_BY_SIDE)
  path.write_text(text.replace("c.train.steps = 1", "c.train.steps = 100_000"))
  command = (sys.executable, "-m", "dpo_jax", "train")
  parent = subprocess.Popen(
    [*command, "--config", f"{path}:root={runs}"],
    cwd=conftest.ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  logs = [runs / name / "metrics.jsonl" for name in "xyz"]
  deadline = time.monotonic() + 180
  while not all(log.exists() and log.stat().st_size for log in logs):
    assert time.monotonic() < deadline
    assert parent.poll() is None
    time.sleep(0.2)
  parent.send_signal(signal.SIGTERM)
  out, _ = parent.communicate(timeout=120)
  assert parent.returncode == 42, out
  for name in "xyz":
    assert f"one,name={name}: exit code 42" in out
    assert checkpoint.latest_step(runs / name) > 0
