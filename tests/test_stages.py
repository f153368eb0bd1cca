"""A config whose `train` runs the stages of its file."""

import textwrap

import pytest

from dpo_jax import cli
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
