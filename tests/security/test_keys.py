"""No secret of the environment is in what a run leaves behind."""

import json

import pytest

from dpo_jax import cli
from tests import conftest

# What the libraries take from there, and what a judge is told to take.
NAMES = (
  *("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_KEY"),
  *("AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
)
SECRET = "sk-9f3b1c77d2ae4b60"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """(folder, what was printed) of a run that is trained and evaluated."""
  for name in NAMES:
    monkeypatch.setenv(name, f"{SECRET}-{name}")
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  folder = tmp_path / "run"
  command = ["train", "--config", config, "--workdir", str(folder)]
  assert cli.main([*command, "--config.log.tensorboard=true"]) == 0
  printed = capsys.readouterr()
  return folder, printed.out + printed.err


@pytest.mark.slow
def test_no_key_is_in_any_file_or_line_of_a_run(run):
  folder, printed = run
  held = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  assert {"config.json", "metrics.jsonl"} <= {path.name for path in held}
  assert json.loads(held[folder / "config.json"])
  assert not [path for path, data in held.items() if SECRET.encode() in data]
  assert SECRET not in printed
