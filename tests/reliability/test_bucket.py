"""Runs in an object store: gs://, on a bucket of this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import pytest
from etils import epath

from dpo_jax import cli, lines, store
from dpo_jax.train import lease
from tests import bucket as bucket_lib
from tests import conftest


@pytest.fixture(scope="module")
def served():
  """The bucket, which this process sees, too.

  gcsfs reads the environment as it is imported, by the first that needs it.
  """
  with bucket_lib.served() as bucket, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket.environment().items():
      patch.setenv(name, value)
    conf = json.loads(bucket.environment()["FSSPEC_GS"])
    patch.setitem(fsspec.config.conf, "gs", conf)
    yield bucket


@pytest.fixture
def bucket(served):
  served.objects.clear()
  served.delay, served.failing = 0.0, 0
  return served


@pytest.fixture
def path():
  return epath.Path("gs://bucket/run/metrics.jsonl")


# ── Lines ────────────────────────────────────────────────────────────────────


def test_lines_are_read_as_they_were_appended(bucket, path, monkeypatch):
  monkeypatch.setattr(lines, "_FULL", 8)
  assert not lines.exists(path)
  assert lines.read(path) == b""
  text = "".join(f"{n}\n" for n in range(20))
  writer = lines.Writer(path)
  for line in text.splitlines(keepends=True):
    writer.append(line)
    assert lines.read(path).endswith(line.encode())
  assert lines.read(path) == text.encode()
  assert len(bucket.names()) > 3  # no part is written again and again
  lines.Writer(path).append("more\n")  # by the next process
  assert lines.opened(path).read() == (text + "more\n").encode()
  with pytest.raises(FileNotFoundError):
    lines.opened(path.parent / "none.jsonl")


@pytest.mark.parametrize("joined", [False, True])
def test_whenever_a_store_stops_lines_are_as_before_or_after(
  bucket, path, joined
):
  writer = lines.Writer(path)
  for line in ("a\n", "b\n", "c\n"):
    writer.append(line)
  if joined:
    lines.join(path)
    assert bucket.names() == ["run/metrics.jsonl"]
  states, answer = [], bucket.answer

  def watched(*request):
    reply = answer(*request)
    states.append(dict(bucket.objects))
    return reply

  bucket.answer = watched
  try:
    lines.replace(path, b"a\n")
    lines.Writer(path).append("d\n")
    lines.join(path)
    lines.Writer(path).append("e\n")
  finally:
    del bucket.answer
  seen = []
  for objects in states:
    bucket.objects = objects
    seen.append(lines.read(path))
  wanted = [b"a\nb\nc\n", b"a\n", b"a\nd\n", b"a\nd\ne\n"]
  changes = [
    x for x, before in zip(seen, [None, *seen], strict=False) if x != before
  ]
  assert changes == wanted


def test_a_write_that_failed_loses_no_line(bucket, path):
  writer = lines.Writer(path)
  writer.append("a\n")
  answer = bucket.answer
  bucket.answer = lambda *_: bucket_lib.Reply(
    400, {"error": {"message": "refused"}}
  )
  try:
    with pytest.raises(OSError, match="refused"):
      writer.append("b\n")
  finally:
    bucket.answer = answer
  writer.append("b\n")
  assert lines.read(path) == b"a\nb\n"


def test_a_folder_gets_another_name_object_by_object(bucket, path):
  for name in ("1/a", "1/state/b"):
    store.write(path.parent / name, name.encode())
  store.move_folder(path.parent / "1", path.parent / "damaged" / "1")
  assert bucket.names() == ["run/damaged/1/a", "run/damaged/1/state/b"]
  assert (path.parent / "damaged/1/state/b").read_text() == "1/state/b"


# ── The lease ────────────────────────────────────────────────────────────────


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lease, "BEAT", 0.1)
  monkeypatch.setattr(lease, "PATIENCE", 0.6)


def test_a_folder_has_one_holder(bucket, path, quick):
  lock = path.parent / ".lock"
  with lease.held(lock):
    with pytest.raises(ValueError, match="in use by process"), lease.held(lock):
      pass
    assert bucket.names() == ["run/.lock"]
  assert bucket.names() == []
  with lease.held(lock):
    pass


def test_a_lease_that_nobody_renews_is_taken_over(bucket, path, quick, capsys):
  lock = path.parent / ".lock"
  left = {"token": "x", "host": "gone", "process": 1, "beats": 7}
  store.write(lock, json.dumps(left).encode())
  before = time.monotonic()
  with lease.held(lock):
    assert time.monotonic() - before > 0.6
    assert json.loads(lock.read_text())["token"] != "x"
  assert "left by process 1 on gone; is it alive?" in capsys.readouterr().out


def test_who_lost_its_lease_is_told_to_stop(bucket, path, quick, monkeypatch):
  sent = []
  monkeypatch.setattr(lease.os, "kill", lambda *args: sent.append(args))
  lock = path.parent / ".lock"
  with lease.held(lock):
    deadline = time.monotonic() + 10
    while not sent and time.monotonic() < deadline:
      # Again: what lies between its look and its own write is lost.
      store.write(lock, b'{"token": "another"}')
      time.sleep(0.02)
  assert sent == [(os.getpid(), signal.SIGTERM)]
  assert json.loads(lock.read_text()) == {"token": "another"}


# ── Runs ─────────────────────────────────────────────────────────────────────

FIELDS = (
  *("data.eval=None", "train.steps=12", "checkpoint.every=2", "log.every=1"),
  *("checkpoint.keep=2", "train.accumulation=2"),
)
RUN = """
import sys
from dpo_jax.train import lease
lease.BEAT, lease.PATIENCE = 0.3, 2.0
from dpo_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def start(bucket, workdir, *fields):
  """A process that trains in a folder of the bucket."""
  command = ["train", "--config", f"{conftest.ROOT}/configs/dpo.py:smoke"]
  command += [f"--config.{field}" for field in (*FIELDS, *fields)]
  return subprocess.Popen(
    [sys.executable, "-c", RUN, *command, f"--workdir={workdir}"],
    cwd=conftest.ROOT,
    env={**os.environ, **bucket.environment(), "XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def checksums(folder, step=12):
  path = folder / "checkpoints" / str(step) / "meta" / "metadata"
  return json.loads(path.read_text())["checksums"]


@pytest.mark.slow
def test_a_killed_run_goes_on_in_a_bucket_to_the_same_bits(bucket, tmp_path):
  """Every request takes its time, and some fail."""
  whole = start(bucket, tmp_path)
  assert whole.wait(timeout=300) == 0
  bucket.delay, bucket.failing = 0.01, 23
  folder = epath.Path("gs://bucket/run")
  killed = start(bucket, folder)
  deadline = time.monotonic() + 300
  while not any("checkpoints/4/commit_success" in n for n in bucket.names()):
    assert killed.poll() is None, killed.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.02)
  killed.kill()
  killed.wait()
  newest = max(
    int(n.split("/")[2])
    for n in bucket.names()
    if n.count("/") == 3
    and n.startswith("run/checkpoints/")
    and n.endswith("/commit_success.txt")
  )
  (meta,) = [n for n in bucket.names() if n.endswith(f"{newest}/meta/metadata")]
  generation, content = bucket.objects[meta]
  bucket.objects[meta] = generation, content[:100]  # cut
  resumed = start(bucket, folder)
  out, _ = resumed.communicate(timeout=300)
  assert resumed.returncode == 0, out
  assert "was left by process" in out
  assert "trying an older one" in out
  assert checksums(folder) == checksums(tmp_path)
  assert any(n.startswith(f"run/damaged/{newest}/") for n in bucket.names())
  rows = [
    json.loads(line)
    for line in lines.read(folder / "metrics.jsonl").splitlines()
  ]
  assert [row["step"] for row in rows] == list(range(1, 13))


@pytest.mark.slow
def test_a_sweep_of_a_bucket_has_its_report_and_is_not_done_twice(
  bucket, capsys
):
  sampled = ("prompts=toy", "count=8", "batch_size=8", "max_new_tokens=4")
  words = [
    *("sweep", f"--config={conftest.ROOT}/configs/dpo.py:smoke"),
    *(f"--config.sample.{x}" for x in (*sampled, "scorers=vader")),
    *("--sweep=loss.beta=0.1,1.0", "--workdir=gs://bucket/sweep"),
  ]
  assert cli.main(words) == 0
  first = capsys.readouterr().out
  assert cli.main(words) == 0
  again = capsys.readouterr().out
  assert again.count("done before, skipped") == 3
  assert [x for x in again.splitlines() if x.startswith("beta=")] == [
    x for x in first.splitlines() if x.startswith("beta=")
  ]
  assert "sweep/report.html" in bucket.names()
  assert not [n for n in bucket.names() if n.endswith((".part", ".lock"))]
