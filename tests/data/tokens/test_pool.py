"""Processes that tokenise: in order, and at an end when their parent is."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import loky
import pytest

from dpo_jax.data.read import sources
from dpo_jax.data.tokens import encoding, pool, tokenize
from tests import conftest

BYTES = tokenize.load("bytes")
TASK = encoding.Task(
  "bytes", BYTES.vocab_size, 256, 256, "error", "pairs", False
)


def parts(count):
  """`count` parts of one record each."""
  made = sources.load(f"toy:{count}", "preference", sources.Policy("error"))
  return ((number, number, [one]) for number, one in enumerate(made))


@pytest.fixture
def started(monkeypatch):
  """A list that gets the processes of a pool."""
  seen, right = [], loky.ProcessPoolExecutor.submit

  def submit(self, *args):
    future = right(self, *args)
    seen.extend([] if seen else self._processes.values())
    return future

  monkeypatch.setattr(loky.ProcessPoolExecutor, "submit", submit)
  return seen


def test_processes_end_when_they_are_not_waited_for(started):
  running = pool.run(TASK, parts(40), 2)
  assert next(running)[0] == 0
  running.close()
  assert [process.exitcode for process in started] == [-9, -9]


def test_processes_end_with_the_last_part(started):
  made = [items for items, _ in pool.run(TASK, parts(40), 2)]
  assert made == list(range(40))
  assert [process.exitcode for process in started] == [0, 0]


def test_a_process_that_is_killed_is_an_error(started):
  running = pool.run(TASK, parts(40), 2)
  next(running)
  os.kill(started[0].pid, signal.SIGKILL)
  with pytest.raises(RuntimeError, match="that tokenises is gone"):
    list(running)
  assert None not in [process.exitcode for process in started]


def test_a_process_says_what_it_cannot_do():
  with pytest.raises(ValueError, match=r"long_prompt = 'no' is not known"):
    list(pool.run(TASK._replace(long_prompt="no"), parts(4), 1))
  with pytest.raises(RuntimeError, match="TypeError: "):
    list(pool.run(TASK._replace(max_prompt_length=None), parts(4), 1))


def test_an_error_is_raised_in_its_place():
  """After what was made before it."""
  unknown = sources.Record("p", ("a",), (), "here", tokens=("no ids",))
  bad = ((n, n, [unknown] if n == 7 else some) for n, _, some in parts(20))
  running = pool.run(TASK, bad, 2)
  assert [next(running)[0] for _ in range(7)] == list(range(7))
  with pytest.raises(RuntimeError, match="TypeError: "):
    next(running)


def test_processes_know_of_tokens_that_the_model_has_no_row_for():
  (_, made), *_ = pool.run(TASK._replace(vocab_size=100), parts(1), 1)
  (error,) = made.errors
  assert error.reason == "unknown token"
  assert "the first 100 only" in str(error)


def test_a_process_imports_no_jax(monkeypatch):
  seen, right = [], loky.ProcessPoolExecutor.shutdown

  def shutdown(self, **options):
    modules = self.submit(eval, "list(__import__('sys').modules)")
    seen.extend(modules.result())
    right(self, **options)

  monkeypatch.setattr(loky.ProcessPoolExecutor, "shutdown", shutdown)
  list(pool.run(TASK, parts(1), 1))
  assert "dpo_jax.data.tokens.encoding" in seen
  assert "jax" not in seen


# Tokenises without end, and says which processes do.
SCRIPT = """
import itertools, signal
open(f"{__file__}.runs", "a").write("once")
import loky
from dpo_jax.data.tokens import pool
from tests.data.tokens import test_pool

right = loky.ProcessPoolExecutor.submit
def submit(self, *args):
  future = right(self, *args)
  print("pids", *self._processes, flush=True)
  return future
loky.ProcessPoolExecutor.submit = submit

def parts():
  ((_, _, some),) = test_pool.parts(1)
  for number in itertools.count():
    yield number, number, some * 500

signal.signal(signal.SIGUSR1, lambda *_: None)
for number, _ in pool.run(test_pool.TASK, parts(), 2):
  print("made", number, flush=True)
"""


@pytest.fixture
def script(tmp_path):
  """The process of SCRIPT, which leads a group, as of a terminal."""
  path = tmp_path / "script.py"
  path.write_text(SCRIPT)
  with subprocess.Popen(
    [sys.executable, str(path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    process_group=0,
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    env={**os.environ, "PYTHONPATH": str(conftest.ROOT)},
  ) as process:
    yield process
    process.kill()


def said(process, start):
  """The next line of a process that starts so."""
  return next(line for line in process.stdout if line.startswith(start))


def assert_they_end(pids, seconds=20):
  end = time.monotonic() + seconds
  while left := [p for p in pids if pathlib.Path(f"/proc/{p}").exists()]:
    assert time.monotonic() < end, f"{left} are still there"
    time.sleep(0.1)


@pytest.mark.parametrize("working", [False, True])
def test_ctrl_c_is_said_once_and_ends_all(script, working):
  """While the processes start, and while they work."""
  _, *pids = said(script, "pids").split()
  if working:
    said(script, "made 3")
  else:
    time.sleep(0.3)  # each is an interpreter that imports now
  os.killpg(script.pid, signal.SIGINT)
  _, errors = script.communicate(timeout=60)
  assert errors.count("Traceback") == errors.count("\nKeyboardInterrupt") == 1
  assert script.returncode == -signal.SIGINT
  assert_they_end(pids)


def test_other_signals_are_the_parents_and_none_outlives_it(script, tmp_path):
  _, *pids = said(script, "pids").split()
  said(script, "made 3")
  os.killpg(script.pid, signal.SIGUSR1)  # would end any of them
  said(script, "made 30")
  assert (tmp_path / "script.py.runs").read_text() == "once"
  script.kill()
  script.wait()
  assert_they_end(pids)
