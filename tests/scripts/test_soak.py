"""The soak in small: a run that is killed and damaged ends in the same bits."""

import json
import random
import subprocess
import sys

import pytest

from scripts import soak
from tests import conftest


@pytest.fixture
def saved(tmp_path):
  """A folder with two checkpoints of two files each."""
  for step in (3, 6):
    for name in ("meta/metadata", "state/d/x"):
      path = tmp_path / "checkpoints" / str(step) / name
      path.parent.mkdir(parents=True)
      path.write_bytes(b"content")
  return tmp_path


def contents(folder, step):
  path = folder / "checkpoints" / str(step)
  return [p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()]


def test_harm_is_done_to_the_newest_checkpoint_and_never_to_the_last_whole_one(
  saved,
):
  spoilt, rng = set(), random.Random(0)
  assert soak.harm(saved, spoilt, rng) in ("flipped bit", "cut", "deleted")
  assert spoilt == {6}
  assert contents(saved, 3) == [b"content"] * 2
  assert contents(saved, 6) != [b"content"] * 2
  assert soak.harm(saved, spoilt, rng) is None


def test_a_batch_that_changed_is_told(tmp_path):
  notes = tmp_path / "examples.1.jsonl"
  notes.write_text("[0, [1, 2]]\n[1, [3, 4]]\n[2, [5")
  (tmp_path / "examples.2.jsonl").write_text("[1, [3, 4]]\n")
  assert soak.examples(tmp_path) == ({0: [1, 2], 1: [3, 4]}, 1)
  notes.write_text("[0, [1, 2]]\n[0, [1, 3]]\n")
  with pytest.raises(SystemExit, match="batch 0 was"):
    soak.examples(tmp_path)


@pytest.mark.slow
def test_five_kills_lose_nothing(tmp_path):
  out = tmp_path / "soak.json"
  command = ["--part", "one process", "--kills", "5", "--out", str(out)]
  done = subprocess.run(
    [sys.executable, "scripts/soak.py", *command],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (part,) = json.loads(out.read_text())["parts"].values()
  assert part["SIGKILL"] + part["SIGTERM"] == 5
  assert part["restarts"] >= 5
  assert part["batches lost or changed"] == 0
  assert part["params equal"]
  assert "0 batches lost or changed, params equal" in done.stdout
