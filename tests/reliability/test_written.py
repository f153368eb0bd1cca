"""Full disks and damaged files: the run goes on, and says what it lost."""

import ast
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpo_jax import store
from dpo_jax.run import recorder
from dpo_jax.train import log
from tests import conftest
from tests.train import test_checkpoint as small

DRIVER = pathlib.Path(__file__).with_name("full_disk.py")
FIELDS = (
  *("train.steps=8", "checkpoint.every=2", "log.every=1"),
  "data.eval=None",
)


def train(workdir, begin, end, code=0):
  """What a run says whose disk is full after `begin`, until after `end`."""
  process = subprocess.run(
    [sys.executable, str(DRIVER), str(workdir), str(begin), str(end), *FIELDS],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(conftest.ROOT),
    },
    cwd=conftest.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
    check=False,
  )
  assert process.returncode == code, process.stdout
  return process.stdout


def saved_in(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def steps_of(workdir):
  return [row["step"] for row in recorder.history(workdir)]


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_ends_no_run(tmp_path):
  """R10: it says so, tries again when it is due, and leaves nothing half."""
  said = train(tmp_path, 3, 5)
  assert said.count("metrics.jsonl cannot be written (File too large)") == 1
  assert "a checkpoint was not written: step 4" in said
  assert "NOT WRITTEN: 2 lines of metrics.jsonl" in said
  assert "done: 8 steps" in said
  assert saved_in(tmp_path) == ["6", "8"]
  assert steps_of(tmp_path) == [1, 2, 3, 6, 7, 8]
  assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 8}


@pytest.mark.slow
def test_a_last_step_that_cannot_be_saved_is_exit_code_1_and_resumes(tmp_path):
  """R10: an older step is kept, and the same command goes on from it."""
  said = train(tmp_path, 5, 99, code=1)
  assert "step 8 could not be saved" in said
  assert "step 2 is kept" in said or "step 4 is kept" in said
  assert not list(tmp_path.glob("**/*tmp*"))
  assert not list(tmp_path.glob("**/*.part"))
  (kept,) = {*saved_in(tmp_path)} - {"2"} or {"2"}
  said = train(tmp_path, 99, 99)
  assert f"steps {kept} to 8" in said
  assert steps_of(tmp_path) == list(range(1, 9))


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_tried_again(tmp_path):
  """R10: config.json and metrics.jsonl among it."""
  said = train(tmp_path, 0, 1)
  assert "config.json cannot be written" in said
  assert "NOT WRITTEN: 1 line of metrics.jsonl" in said
  assert "NOT WRITTEN: config.json" not in said
  assert json.loads((tmp_path / "config.json").read_text())
  assert steps_of(tmp_path) == list(range(2, 9))


def logger(workdir, start):
  return log.Logger(workdir, every=1, total=9, start=start)


def rows(*steps):
  return b"".join(
    json.dumps({"step": step, "kind": "train", "loss": 0.5}).encode() + b"\n"
    for step in steps
  )


DAMAGE = {
  "not UTF-8": b'{"step": 2, "kind": "\xff\xfe"}\n',
  "no object": b"[1, 2]\n3\nnull\n",
  "a step that is none": b'{"step": "2", "kind": "train"}\n',
  "zeros, as after a power cut": bytes(64) + b"\n",
  "nested without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_metrics_with_any_damage_resume(damage, tmp_path, capsys):
  """What was left out is kept beside them, and said."""
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(rows(1) + damage + rows(3, 4, 5))
  logger(tmp_path, start=4).write("train", 5, {"loss": 0.25})
  said = capsys.readouterr().out
  assert "left out, kept in" in said
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage
  assert steps_of(tmp_path) == [1, 3, 4, 5]
  assert recorder.history(tmp_path)[-1]["loss"] == 0.25


def test_metrics_that_were_cut_anywhere_resume(tmp_path):
  """A line that is cut is one that no step was finished after."""
  path, whole = tmp_path / "metrics.jsonl", rows(1, 2, 3)
  for end in range(len(whole)):
    path.write_bytes(whole[:end])
    logger(tmp_path, start=2).write("train", 3, {"loss": 0.25})
    steps = steps_of(tmp_path)
    assert steps == [
      x for x in (1, 2) if len(rows(*range(1, x + 1))) - 1 <= end
    ] + [3]


def test_a_line_that_the_disk_took_by_half_spoils_no_other(
  tmp_path, monkeypatch, capsys
):
  """R10: the count is said once, and the next line is whole."""
  first = logger(tmp_path, start=0)
  first.write("train", 1, {"loss": 0.5})
  path = tmp_path / "metrics.jsonl"
  right = type(first._path).open

  def full(self, *args):
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ki')
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(type(first._path), "open", full)
  first.write("train", 2, {"loss": 0.5})
  first.write("train", 3, {"loss": 0.5})
  monkeypatch.setattr(type(first._path), "open", right)
  first.write("train", 4, {"loss": 0.5})
  assert first.unwritten == 2
  assert capsys.readouterr().out.count("No space left on device") == 1
  assert steps_of(tmp_path) == [1, 4]


def test_what_cannot_be_saved_is_counted_and_the_older_step_stays(
  tmp_path, monkeypatch
):
  """R10, a store that refuses at once."""
  with small.checkpoint.Checkpointer(tmp_path, keep=2) as manager:
    assert manager.save(small.make_state(step=1), small.CONFIG, wait=True)

    def full(*_, **__):
      raise ValueError("RESOURCE_EXHAUSTED: no space left [and more]")

    monkeypatch.setattr(manager._manager, "save", full)
    with pytest.warns(UserWarning, match=r"step 2: RESOURCE_EXHAUSTED: no spa"):
      assert not manager.save(small.make_state(step=2), small.CONFIG)
    assert manager.steps() == [1]
    assert manager.lost == 1
    assert manager.save(small.make_state(step=3), small.CONFIG, wait=True)
    assert manager.steps() == [3, 1]
  assert int(small.restore(tmp_path).step) == 3


# Who may open a file to write it in place, and why that loses nothing.
IN_PLACE = {
  "store.py",  # what writes by rename
  "lines.py",  # what appends; a line that is cut is told from a whole one
  "data/tokens/cache.py",  # in a folder that is named when it is complete
  "train/health.py",  # the lock, which is empty
  "train/log.py",  # os.devnull
}


def writes_in_place(path):
  """Lines of a module that write a file where it will be read."""
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.Call):
      continue
    called = node.func
    name = getattr(called, "attr", getattr(called, "id", ""))
    if name in ("write_text", "write_bytes", "savez", "tofile"):
      yield node.lineno
    if name == "open":
      modes = [
        x.value
        for x in (*node.args, *(k.value for k in node.keywords))
        if isinstance(x, ast.Constant) and isinstance(x.value, str)
      ]
      if any(
        set(mode) <= set("rwxbt+") and set(mode) & set("wx+") for mode in modes
      ):
        yield node.lineno


def test_nothing_is_written_in_place():
  """What is read later is written by rename (store.write), or line by line."""
  package = conftest.ROOT / "dpo_jax"
  found = {
    str(path.relative_to(package)): list(writes_in_place(path))
    for path in package.rglob("*.py")
  }
  found = {name: lines for name, lines in found.items() if lines}
  assert found.keys() == IN_PLACE, found


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
  tmp_path, monkeypatch
):
  """The content first, then the name: else a name may be left without it."""
  events, sync, replace = [], os.fsync, store.publish

  def synced(number):
    events.append(os.readlink(f"/proc/self/fd/{number}"))
    sync(number)

  def published(partial, path):
    events.append("named")
    replace(partial, path)

  monkeypatch.setattr(os, "fsync", synced)
  monkeypatch.setattr(store, "publish", published)
  store.write(tmp_path / "a.json", b"{}")
  content, named, folder = events
  assert content.startswith(str(tmp_path / "a.json"))
  assert (named, folder) == ("named", str(tmp_path))
  assert (tmp_path / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
  ("number", "written"), [(errno.EINVAL, True), (errno.EIO, False)]
)
def test_a_disk_that_cannot_promise_is_used_and_one_that_fails_is_told(
  number, written, tmp_path, monkeypatch
):
  """A mounted bucket has no fsync of folders; a broken disk has no content."""

  def refused(_):
    raise OSError(number, "fsync")

  monkeypatch.setattr(os, "fsync", refused)
  path = tmp_path / "a.json"
  if written:
    store.write(path, b"{}")
  else:
    with pytest.raises(OSError, match="fsync"):
      store.write(path, b"{}")
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"] * written
