"""One stop path: every signal, every process."""

import json
import os
import signal
import time

import pytest

from dpo_jax.train import health
from tests.reliability import test_processes


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2]
)
def test_signals_that_end_a_process_ask_to_be_run_again(number):
  """R4: a closed terminal saves too."""
  with health.stop_on_signal() as stop:
    assert not stop.agreed(1, last=False)
    os.kill(os.getpid(), number)
    assert stop.agreed(2, last=False)
    assert stop.exit_code == health.EXIT_REQUEUE


def test_nohup_is_obeyed(request):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
  with health.stop_on_signal() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop


def test_several_processes_ask_every_so_many_steps_and_at_the_last(monkeypatch):
  """R5: from the step count only, and no collective at most steps."""
  asked = []

  def largest(value):
    asked.append(value)
    return signal.SIGTERM if len(asked) == 3 else value

  monkeypatch.setattr(health.jax, "process_count", lambda: 2)
  monkeypatch.setattr(health.processes, "largest", largest)
  stop = health.Stop()
  steps = [n for n in range(1, 30) if stop.agreed(n, last=False)]
  assert steps[0] == 24
  assert len(asked) == 3
  stop = health.Stop()
  with stop.at_once():
    stop.set(signal.SIGINT)  # the other does not know of it yet
  assert not stop
  assert stop.agreed(3, last=True)
  assert stop.exit_code == health.EXIT_INTERRUPTED


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_at_one_step(tmp_path):
  """R5: the second has it; both save, both exit 42."""
  running = test_processes.start(tmp_path, "train.steps=100000")
  metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 90
  while not (metrics.exists() and metrics.read_text().count("\n") > 3):
    assert time.monotonic() < deadline
    assert [p.poll() for p in running] == [None, None]
    time.sleep(0.1)
  running[1].send_signal(signal.SIGTERM)
  got = test_processes.ends(running)
  assert [code for code, _ in got] == [health.EXIT_REQUEUE] * 2, got
  rows = [json.loads(line) for line in metrics.read_text().splitlines()]
  saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert saved == [str(rows[-1]["step"])]
