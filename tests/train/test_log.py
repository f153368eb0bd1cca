"""Throughput, ETA and files of the logger, on a clock of our own."""

import json
import sys

import jax
import numpy as np
import pytest

from dpo_jax.data.batch import loader
from dpo_jax.train import compiles, log

STATS = loader.Stats(4, 4, 100, 50, 700, 0.9)


@pytest.fixture
def clock(monkeypatch):
  """A settable time.perf_counter, and a machine of 1000 FLOP/s."""
  now = [0.0]
  monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(log.time, "time", lambda: 1e9 + now[0])
  monkeypatch.setattr(compiles, "seconds", lambda: 0.0)
  monkeypatch.setattr(log, "peak_flops", lambda: (1000.0, "of a fixture"))
  return now


def rows_of(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_throughput_is_tokens_over_the_seconds_that_training_took(
  tmp_path, clock
):
  logger = log.Logger(tmp_path, every=2, total=6, start=0)
  for number in range(1, 7):
    clock[0] += 60 if number == 1 else 2  # the first step compiles
    logger.step(number, {"loss": 0.5}, STATS, 400)
    if number == 4:
      logger.flush()
      with logger.paused():
        clock[0] += 1000  # an evaluation
  logger.flush()
  rows = rows_of(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 4, 6]
  assert "tokens_per_second" not in rows[0]
  # A step is read when the next one has been dispatched, so that nothing
  # waits; step 4 is read at once, for the evaluation.
  assert rows[1]["tokens_per_second"] == 100 / 2
  assert rows[2]["tokens_per_second"] == 200 / 2
  assert rows[3]["tokens_per_second"] == 200 / 4
  assert rows[3]["mfu"] == 800 / 4 / 1000


def test_a_compilation_between_steps_is_no_training_time(
  tmp_path, clock, monkeypatch, capsys
):
  compiled = [0.0]
  monkeypatch.setattr(compiles, "seconds", lambda: compiled[0])
  logger = log.Logger(tmp_path, every=1, total=5, start=0)
  for number in range(1, 5):
    clock[0] += 2
    if number == 3:  # a batch of another shape
      clock[0] += 30
      compiled[0] += 30
    done = jax.block_until_ready(jax.numpy.float32(number))
    logger.step(number, {"loss": done}, STATS, 400)
    if number == 3:
      with logger.paused():  # an evaluation, which compiles too
        clock[0] += 100
        compiled[0] += 70
  rows = rows_of(tmp_path)
  assert [row.get("steps_per_second") for row in rows] == [None, 0.5, 0.5, 0.5]
  assert [row.get("tokens_per_second") for row in rows] == [None, 50, 50, 50]
  assert rows[3]["mfu"] == 400 / 2 / 1000
  assert "ETA 0:02" in capsys.readouterr().out.splitlines()[-1]


def test_a_line_has_its_time_and_how_long_it_took_to_get_there(
  tmp_path, clock, capsys
):
  logger = log.Logger(tmp_path, every=1, total=2, start=0)
  for number in (1, 2):
    clock[0] += 4
    done = jax.block_until_ready(jax.numpy.float32(number))
    metrics = {"loss": done, "learning_rate": jax.numpy.float32(3e-4)}
    jax.block_until_ready(metrics)
    logger.step(number, metrics, STATS, 400)
  clock[0] += 1
  logger.evaluation(2, {"loss": 0.5})
  rows = rows_of(tmp_path)
  assert [row["elapsed"] for row in rows] == [4, 8, 9]
  assert [row["wall_time"] for row in rows] == [1e9 + 4, 1e9 + 8, 1e9 + 9]
  line = capsys.readouterr().out.splitlines()[-2]
  at = log.time.strftime("%H:%M:%S", log.time.localtime(1e9 + 8))
  for part in ("lr 0.0003", "0.25 steps/s", "25 tokens/s", f"0:08 at {at}"):
    assert f"  {part}" in line


def test_a_run_of_one_step_knows_when_it_is_done(tmp_path, clock, capsys):
  logger = log.Logger(tmp_path, every=1, total=1, start=0)
  metrics = {"loss": jax.block_until_ready(jax.numpy.float32(1))}
  logger.step(1, metrics, STATS, 400)
  assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 0:00")


def test_a_resumed_run_says_so(tmp_path, clock, capsys):
  log.Logger(tmp_path, every=1, total=4, start=0)
  assert "resumed" not in capsys.readouterr().out
  log.Logger(tmp_path, every=1, total=4, start=2, name="beta=1: ")
  assert capsys.readouterr().out == "beta=1: resumed at step 2\n"


@pytest.mark.parametrize(
  "damage", [b"[1]", b"7", b"\xff\xfe", b'{"step": "x"}', b'{"kind": 1}', b"{"]
)
def test_damaged_lines_are_left_out_and_counted(
  tmp_path, clock, capsys, damage
):
  path = tmp_path / "metrics.jsonl"
  good = [{"step": s, "kind": "train", "loss": 1.0} for s in (1, 2)]
  first, second = (json.dumps(row).encode() for row in good)
  path.write_bytes(b"\n".join([first, damage, second, b'{"step": 2, "ki']))
  log.Logger(tmp_path, every=1, total=4, start=2)
  assert rows_of(tmp_path) == good
  (said, _) = capsys.readouterr().out.splitlines()
  assert said.startswith(f"{path}: 1 damaged line left out")
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"


class Metric:
  """A value of the device that remembers when the host waited for it."""

  def __init__(self, number, waits):
    self.number, self.waits, self.dispatched = number, waits, 0

  def __array__(self, dtype=None, copy=None):
    self.waits.append((self.number, self.dispatched))
    return np.array(0.5, np.float32)


def test_no_step_is_waited_for_before_the_next_is_dispatched(tmp_path, clock):
  logger, waits = log.Logger(tmp_path, every=1, total=9, start=0), []
  metrics = [Metric(number, waits) for number in range(1, 6)]
  for number, metric in enumerate(metrics, 1):
    clock[0] += 1
    for each in metrics:
      each.dispatched = number
    logger.step(number, {"loss": metric}, STATS, 400)
  assert waits == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_a_step_that_is_done_is_timed_to_its_end(tmp_path, clock):
  """As all are on a CPU, where the last one too takes the time it takes."""
  logger = log.Logger(tmp_path, every=1, total=4, start=0)
  for number in range(1, 5):
    clock[0] += 2
    done = jax.block_until_ready(jax.numpy.float32(number))
    assert logger.step(number, {"loss": done}, STATS, 400)["loss"] == number
  rows = rows_of(tmp_path)
  assert [row.get("tokens_per_second") for row in rows] == [None, 50, 50, 50]


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path, clock):
  path = tmp_path / "metrics.jsonl"
  whole = [{"step": s, "kind": "train", "loss": 1.0} for s in (1, 2, 3)]
  lines = [json.dumps(row) for row in whole]
  path.write_text("\n".join([*lines, '{"step": 4, "ki']))
  log.Logger(tmp_path, every=1, total=4, start=2)
  assert rows_of(tmp_path) == whole[:2]
  assert not (tmp_path / "metrics.jsonl.new").exists()


def test_what_is_not_finite_is_null_in_json(tmp_path, clock):
  logger = log.Logger(tmp_path, every=1, total=1, start=0)
  logger.step(1, {"loss": float("nan")}, STATS, 1)
  logger.flush()
  assert rows_of(tmp_path)[0]["loss"] is None


def test_a_closed_output_does_not_stop_the_run(tmp_path, clock, monkeypatch):
  class Gone:
    def write(self, text):
      raise BrokenPipeError

    def flush(self):
      raise BrokenPipeError

    def isatty(self):
      return False

  monkeypatch.setattr(sys, "stdout", Gone())
  logger = log.Logger(tmp_path, every=1, total=2, start=0)
  for number in (1, 2):
    clock[0] += 1
    logger.step(number, {"loss": 0.5}, STATS, 1)
  clock[0] += 1
  logger.flush()
  assert len(rows_of(tmp_path)) == 2


def test_a_cell_of_a_notebook_has_one_bar_for_the_steps(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(log.progress, "in_cell", lambda: True)
  logger = log.Logger(tmp_path, every=1, total=4, start=1)
  for number in (2, 3, 4):
    logger.step(number, {"loss": 0.5}, STATS, 400)
  logger.flush()
  logger.evaluation(4, {"loss": 0.25})
  logger.close()
  out = capsys.readouterr().out
  *passing, last = out.split("\r")
  assert "4/4" in last
  assert "loss 0.5" in last
  assert any("2/4" in text for text in passing)
  # Lines are of evaluations alone; the steps' are in metrics.jsonl.
  assert [text for text in out.splitlines() if "eval at 4: loss 0.25" in text]
  # Beside it: that it resumed, what "mfu" is, and the end of the bar.
  assert out.count("\n") == 4
  assert [row["step"] for row in rows_of(tmp_path)] == [2, 3, 4, 4]
