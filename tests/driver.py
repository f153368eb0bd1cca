"""Runs `fit` in a process of its own: driver.py WORKDIRS KILL_AT OVERRIDE …

The same run in each of the WORKDIRS, which a comma separates, in turn. Writes
the example ids of every batch to WORKDIR/ids.jsonl as it is placed, and kills
itself without warning once KILL_AT steps have been logged in the last and a
checkpoint is complete.
"""

import json
import os
import pathlib
import signal
import sys
import time

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.data.batch import loader
from dpo_jax.train import log


def wait_for_a_checkpoint(workdir):
  """Saving goes on in the background; it has its final name when complete."""
  deadline = time.monotonic() + 60
  while not any(p.name.isdigit() for p in workdir.glob("checkpoints/*")):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def fit(workdir, kill_at, config):
  """The exit code of one run."""
  workdir.mkdir(parents=True, exist_ok=True)
  batch_of = loader.Loader.batch
  step_of = log.Logger.step

  def batch(self, number, *args):
    out = batch_of(self, number, *args)
    with (workdir / "ids.jsonl").open("a") as file:
      ids = sorted(self.indices(number).tolist())
      file.write(json.dumps([number, ids]) + "\n")
    return out

  def step(self, number, *args):
    out = step_of(self, number, *args)
    if str(number) == kill_at:
      wait_for_a_checkpoint(workdir)
      os.kill(os.getpid(), signal.SIGKILL)
    return out

  loader.Loader.batch, log.Logger.step = batch, step
  try:
    return loop.fit(config, workdir).exit_code
  finally:
    loader.Loader.batch, log.Logger.step = batch_of, step_of


def main(workdirs, kill_at, *overrides):
  config = load.load_config("configs/dpo.py:smoke", overrides)
  *before, last = map(pathlib.Path, workdirs.split(","))
  for workdir in before:
    assert fit(workdir, None, config) == 0
  return fit(last, kill_at, config)


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
