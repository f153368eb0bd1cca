"""Several processes of a command: codes, signals, restarts."""

import os
import signal
import sys
import threading
import time

import pytest

from dpo_jax import cli, launch

NUMBER = "import os, sys, time; n = os.environ['DPO_JAX_PROCESS']; "


def script(text):
  return [sys.executable, "-c", NUMBER + text]


def test_all_know_of_one_another_and_others_are_prefixed(capfd):
  text = "print(n, os.environ['DPO_JAX_PROCESSES'])"
  assert launch.local(script(text), 2) == 0
  out, err = capfd.readouterr()
  assert out == "0 2\n"
  assert err == "[1] 1 2\n"


def test_one_that_dies_ends_the_others_and_gives_the_code():
  """R7: 128 + the signal, as a shell says it."""
  text = "os.kill(os.getpid(), 9) if n == '1' else time.sleep(60)"
  assert launch.local(script(text), 2, grace=0.2) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("code", "starts"), [(42, 3), (1, 3), (2, 1), (0, 1)])
def test_all_start_again_but_after_a_users_mistake(code, starts, tmp_path):
  """R7: as often as asked for."""
  text = f"open({str(tmp_path)!r} + '/' + n, 'a').write('x'); sys.exit({code})"
  assert launch.local(script(text), 2, restarts=2) == code
  assert [(tmp_path / n).read_text() for n in "01"] == ["x" * starts] * 2


def test_a_signal_goes_to_all_and_nothing_starts_again(tmp_path):
  """R5: the launcher of a preempted machine hands on what it got."""
  ready = str(tmp_path)
  text = (
    "import signal; signal.signal(15, lambda *_: sys.exit(42)); "
    f"open({ready!r} + '/' + n, 'w').close(); time.sleep(60)"
  )

  def send():
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
      time.sleep(0.02)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
      os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=send, daemon=True).start()
  assert launch.local(script(text), 2, restarts=5) == 42


def test_the_last_words_of_all_are_heard(capfd):
  """Also of one that is killed with its lines in a buffer, or none of text."""
  text = (
    "print('last'); sys.stdout.buffer.write(b'\\xff\\n'); "
    "sys.stdout.flush(); n == '1' and os.kill(os.getpid(), 9); time.sleep(60)"
  )
  assert launch.local(script(text), 2, grace=0.2) == 128 + signal.SIGKILL
  assert capfd.readouterr().err == "[1] last\n[1] \ufffd\n"


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
  """`nohup dpo-jax launch …` goes on when its terminal is closed."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    text = (
      "import signal; os.kill(os.getppid(), 1); time.sleep(0.2); "
      "sys.exit(signal.getsignal(1) is not signal.SIG_IGN)"
    )
    assert launch.local(script(text), 2) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["local"], "launch needs --"),
    (["cloud", "--", "train"], "launch knows local"),
    (["local", "--processes", "0", "--", "train"], "--processes = 0"),
    (["local", "--restarts=-1", "--", "train"], "--restarts = -1"),
    (["local", "--", "tain"], "tain"),
  ],
)
def test_mistakes_are_refused_before_anything_starts(words, said, capsys):
  assert cli.main(["launch", *words]) == 2
  assert said in capsys.readouterr().err


def test_stages_are_not_run_twice(capsys, monkeypatch, tmp_path):
  monkeypatch.setenv("DPO_JAX_COORDINATOR", "localhost:1")
  monkeypatch.setenv("DPO_JAX_PROCESSES", "2")
  monkeypatch.setenv("DPO_JAX_PROCESS", "0")
  words = "train", "--config", "hh:smoke", "--workdir", str(tmp_path)
  assert cli.main(words) == 2
  assert 'algo = "stages" runs as one process' in capsys.readouterr().err
