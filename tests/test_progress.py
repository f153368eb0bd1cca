"""What a pass over many things shows, on a clock of our own."""

import sys
import types

import pytest
import tqdm

from dpo_jax import progress


@pytest.fixture
def clock(monkeypatch):
  """[seconds], which stand still unless a test moves them."""
  now = [100.0]
  monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
  return now


def walk(clock, pauses, total, what="done", **options):
  """Goes over as many things as there are pauses, in seconds."""
  for pause in progress.over(pauses, total, what, **options):
    clock[0] += pause


def test_durations_read_as_minutes_and_hours():
  assert progress.duration(62.4) == "1:02"
  assert progress.duration(3723) == "1:02:03"


def test_what_goes_in_comes_out_in_order():
  assert list(progress.over(iter("abc"), 3, "done", loud=False)) == [*"abc"]


def test_a_file_gets_a_line_every_ten_seconds_and_the_last_one(clock, capsys):
  walk(clock, [4.0] * 1500, 1500, "scored", unit="examples")
  out = capsys.readouterr().out
  assert "\r" not in out
  first, *lines, last = out.splitlines()
  assert first == "scored 3/1,500   0.25 examples/s  ETA 1:39:48"
  assert lines[0].startswith("scored 6/1,500 ")
  assert len(lines) == 499
  assert last == "scored: 1,500 examples in 1:40:00, 0.25 examples/s"


def test_a_terminal_has_one_passing_line_and_the_last_one(
  clock, capsys, monkeypatch
):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  walk(clock, [1.0] * 20, 20, "scored")
  *passing, last = capsys.readouterr().out.split("\r")
  assert all("\n" not in text for text in passing)
  assert any("scored:  50%" in text for text in passing)
  assert not passing[-1].strip()  # wiped out
  assert last == "scored: 20 in 0:20, 1/s\n"


def test_things_of_several_are_counted_by_their_size(clock, capsys):
  walk(clock, [10.0] * 4, 4000, size=lambda pause: 1000, unit="records")
  *_, last = capsys.readouterr().out.splitlines()
  assert last == "done: 4,000 records in 0:40, 100 records/s"


def test_without_a_total_nothing_is_said_of_the_time_left(clock, capsys):
  walk(clock, [10.0] * 3, None)
  first, *_ = capsys.readouterr().out.splitlines()
  assert first == "done 1   0.10/s"


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 1.9, 2.0])
def test_what_is_quick_says_nothing_where_that_is_asked_for(
  clock, capsys, monkeypatch, live, seconds
):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: live, raising=False)
  walk(clock, [0.0, seconds], 2, quiet=2.0)
  out = capsys.readouterr().out
  assert out.endswith("done: 2 in 0:02, 1/s\n" if seconds == 2 else "")
  assert bool(out) == (seconds == 2)
  walk(clock, [0.0, seconds], 2)
  assert "done: 2 in 0:0" in capsys.readouterr().out


def test_one_process_does_the_talking(clock, capsys):
  walk(clock, [20.0] * 3, 3, loud=False)
  assert capsys.readouterr().out == ""


def test_an_error_of_the_things_is_raised_and_no_end_is_claimed(clock, capsys):
  def failing():
    yield 20.0
    raise ValueError("here")

  with pytest.raises(ValueError, match="here"):
    walk(clock, failing(), 3)
  assert "done: " not in capsys.readouterr().out


@pytest.fixture
def cell(monkeypatch):
  """As in a notebook without ipywidgets."""
  monkeypatch.setattr(progress, "in_cell", lambda: True)


@pytest.mark.usefixtures("cell")
def test_a_cell_of_a_notebook_has_a_bar_and_the_last_line(clock, capsys):
  walk(clock, [1.0] * 20, 20, "scored")
  *passing, last = capsys.readouterr().out.split("\r")
  assert any("scored:  50%" in text for text in passing)
  assert last == "scored: 20 in 0:20, 1/s\n"


def test_there_is_no_cell_outside_a_notebook(monkeypatch):
  assert progress.bar(4, 0, "") is None
  fake = types.SimpleNamespace(get_ipython=lambda: None)
  monkeypatch.setitem(sys.modules, "IPython", fake)
  assert not progress.in_cell()
  shell = types.SimpleNamespace(config={"TerminalIPythonApp": {}})
  fake.get_ipython = lambda: shell
  assert not progress.in_cell()
  shell.config = {"IPKernelApp": {}}
  assert progress.in_cell()


@pytest.mark.usefixtures("cell")
def test_a_bar_of_a_cell_says_nothing_of_missing_widgets(recwarn):
  sys.modules.pop("tqdm.auto", None)
  progress.bar(4, 0, "").close()
  assert not recwarn
