"""R12: updates that are not finite change nothing, are counted, and end a run.

They are injected by a learning rate of NaN, which every algorithm has.
"""

import functools
import json

import numpy as np
import pytest

from dpo_jax import loop, sweeps
from dpo_jax.config import load as load_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build
from dpo_jax.train import checkpoint, guard
from dpo_jax.train import state as state_lib
from tests import conftest, processes
from tests.algos import rewarded

# (argument of the config, overrides). In the fast tier tests/train/test_step.py
# counts single steps on several devices and under accumulation.
HOW = {
  "jit": ("smoke",),
  "pmap": ("smoke", "mesh.mode=pmap"),
  "accumulation": ("smoke", "train.accumulation=2"),
  "ema": ("smoke,ref=ema",),
  "adapter": ("smoke,lora",),
}
EVERY_HOW = [
  pytest.param(how, marks=() if how == "jit" else pytest.mark.slow)
  for how in HOW
]


def load(*overrides, arg="smoke"):
  """A config that logs its first and last step alone."""
  spec = str(conftest.ROOT / f"configs/dpo.py:{arg}")
  given = "train.steps=12", "data.eval=None", "log.every=1000"
  return load_lib.load_config(spec, (*given, *overrides))


@functools.cache
def prepared(arg="smoke", *overrides):
  """(config, base.Run); what is compiled is shared by the tests."""
  config = load(*overrides, arg=arg)
  return config, build.prepare(config)


def broken(run, bad, done=None, **rhythm):
  """A run whose updates are not finite at the steps `bad`, counted from 1.

  Args:
    done: list that gets the number of each step.
    **rhythm: changes of run.rhythm.
  """

  def step(state, batch, hparams):
    number = int(state.step) + 1
    if done is not None:
      done.append(number)
    if number in bad:
      hparams = {**hparams, "learning_rate": np.float32("nan")}
    return run.step(state, batch, hparams)

  return run._replace(step=step, rhythm=run.rhythm._replace(**rhythm))


def rows_of(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.mark.parametrize("how", EVERY_HOW)
def test_every_second_update_refused_is_counted_and_told(how, tmp_path, capsys):
  """R12: none of them is logged, and no two are in a row."""
  config, run = prepared(*HOW[how])
  run = broken(run, range(2, 13, 2), max_skipped=2)
  result = loop.fit(config, tmp_path, run)
  assert result.failure is None
  last = rows_of(tmp_path)[-1]
  assert (last["step"], last["skipped/total"], last["skipped/longest"]) == (
    *(12, 6, 1),
  )
  told = "updates refused for not being finite: 6, at most 1 in a row"
  assert f"done: 12 steps in {tmp_path}; {told}" in capsys.readouterr().out


def test_a_run_without_any_says_nothing_of_them(tmp_path, capsys):
  config, run = prepared()
  loop.fit(config, tmp_path, run)
  assert "refused" not in capsys.readouterr().out


@pytest.mark.parametrize("how", EVERY_HOW)
def test_a_run_ends_after_so_many_in_a_row_whatever_is_logged(how, tmp_path):
  """R12: at most run.AHEAD steps later, and the good checkpoint is kept."""
  config, run = prepared(*HOW[how])
  done = []
  run = broken(run, (5, 7, 8, 9), done, max_skipped=3, save=4)
  with pytest.raises(
    FloatingPointError,
    match=r"^3 updates in a row were not finite, up to step 9 \(4 of all 9\); "
    r"step 8 is kept .*train.max_skipped above 3",
  ):
    loop.fit(config, tmp_path, run)
  assert done[-1] <= 9 + run_lib.AHEAD
  assert checkpoint.latest_step(tmp_path) == 8


@pytest.mark.parametrize("bad", [(2, 3, 4), (10, 11, 12)])
def test_it_ends_at_a_save_and_at_the_last_step_too(bad, tmp_path):
  """R12: steps that may be under way are waited for before a save."""
  config, run = prepared()
  run = broken(run, bad, max_skipped=3, save=bad[-1])
  with pytest.raises(FloatingPointError, match="nothing was saved yet"):
    loop.fit(config, tmp_path, run)


def test_a_resumed_run_goes_on_counting_and_may_raise_the_limit(tmp_path):
  """R12: and it is the run that had the higher limit from the start."""
  bad = 4, 5, 6, 8
  config, run = prepared()
  whole = loop.fit(config, tmp_path / "whole", broken(run, bad)).state
  with pytest.raises(FloatingPointError, match="3 updates in a row"):
    loop.fit(config, tmp_path / "run", broken(run, bad, max_skipped=3, save=5))
  assert checkpoint.latest_step(tmp_path / "run") == 5
  # One more is enough: two were in the checkpoint.
  done = []
  with pytest.raises(FloatingPointError, match=r"3 .* up to step 6 \(3 of"):
    loop.fit(
      config, tmp_path / "run", broken(run, bad, done, max_skipped=3, save=1000)
    )
  assert done[0] == 6
  raised = load("train.max_skipped=4")
  run = run._replace(identity={**run.identity, "train": raised.train.to_dict()})
  state = loop.fit(
    raised, tmp_path / "run", broken(run, bad, max_skipped=4)
  ).state
  assert {k: int(x) for k, x in state.skipped.items()} == {
    **{"row": 0, "longest": 3, "total": 4}
  }
  assert state_lib.fingerprint(state_lib.saved(state)) == (
    state_lib.fingerprint(state_lib.saved(whole))
  )


def test_which_step_is_read_follows_from_the_count_alone(tmp_path):
  """R12: several processes end at one step, whichever of them is faster."""
  config, run = prepared()
  started, read = [], []

  class Count:
    """A metric that tells when it is read."""

    def __init__(self, number, value):
      self._number, self._value = number, value

    def __array__(self, dtype=None, copy=None):
      read.append((self._number, started[-1]))
      return np.asarray(self._value, dtype)

  def step(state, batch, hparams):
    number = int(state.step) + 1
    started.append(number)
    state, metrics = run.step(state, batch, hparams)
    return state, {**metrics, "skipped": Count(number, metrics["skipped"])}

  rhythm = run.rhythm._replace(save=8)
  loop.fit(config, tmp_path, run._replace(step=step, rhythm=rhythm))
  judged = dict(reversed(read))  # the logger reads the first and the last too
  ahead = {n: n + run_lib.AHEAD for n in range(2, 11)}
  assert {n: judged[n] for n in ahead} == {**ahead, 7: 8, 8: 8}


@pytest.mark.slow
def test_a_run_of_several_in_one_program_ends_alone(tmp_path, capsys):
  """R12: the others go on to their end."""
  config = load("sweep.together=2", "train.max_skipped=3")
  points = [{"optim.learning_rate": rate} for rate in (1e-3, 1e38)]
  assert sweeps.sweep(config, points, tmp_path) == 1
  out = capsys.readouterr().out
  assert "learning_rate=1e+38: 3 updates in a row were not finite" in out
  assert checkpoint.latest_step(tmp_path / "learning_rate=0.001") == 12
  assert checkpoint.latest_step(tmp_path / "learning_rate=1e+38") is None


@pytest.mark.slow
def test_an_on_policy_run_leaves_in_the_middle_of_an_iteration(
  tmp_path, monkeypatch
):
  """R12: the checkpoint of the iteration before is kept."""
  rewarded.registered(monkeypatch)
  config, done = rewarded.config_of("log.every=1000"), []
  run = rewarded.prepared("log.every=1000")
  # The last steps of the first iteration, and of the second all but the last.
  run = broken(run, (4, 5), done, max_skipped=2)
  with pytest.raises(FloatingPointError, match="step 4 is kept"):
    loop.fit(config, tmp_path, run)
  assert done[-1] == 7 < run.total


def test_a_checkpoint_with_the_count_in_a_row_alone_resumes(tmp_path):
  """R12: as runs of earlier versions left it."""
  config, run = prepared()
  _, first = loop.begin(run, tmp_path)
  old = first.replace(step=first.step + 6, skipped=first.step + 2)
  with checkpoint.Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(old, run.identity, wait=True)
  limited = broken(run, (7,), max_skipped=3)
  with pytest.raises(FloatingPointError, match=r"3 updates .* up to step 7"):
    loop.fit(config, tmp_path, limited)
  state = loop.fit(config, tmp_path, run).state
  counts = {k: int(x) for k, x in state.skipped.items()}
  assert counts == {"row": 0, "longest": 2, "total": 2}
  assert counts.keys() == guard.create(None).keys()


@pytest.mark.slow
def test_two_processes_end_at_one_step_for_one_reason(tmp_path):
  """R12: though one of them is slower, and logs what it has when it has it."""
  module = "tests.reliability.non_finite_driver"
  processes.assert_both_succeed(processes.together(module, tmp_path))
  one, two = (
    json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)
  )
  assert one == two
  assert one["said"].startswith(
    "3 updates in a row were not finite, up to step"
  )
  assert one["done"] == list(range(1, 9 + run_lib.AHEAD + 1))
  assert checkpoint.latest_step(tmp_path / "run") == 8
