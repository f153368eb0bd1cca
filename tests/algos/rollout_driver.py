"""One process of several: rollout_driver.py FOLDER PORT COUNT PROCESS.

Trains two iterations of PPO with the others, without a run folder, and writes
the metrics of each step to FOLDER/PROCESS.json.
"""

import json
import pathlib
import sys

import jax

from dpo_jax.eval import rewards
from tests.algos import rewarded


def metrics_of(steps):
  """[{metric: value}] of the first steps of PPO on all devices."""
  run = rewarded.prepared()
  state, out = rewarded.state_of(run), []
  for number in range(steps):
    batch, _ = run.feed.batch(number, state)
    state, metrics = run.step(state, batch, run.hparams)
    out.append({k: float(v) for k, v in jax.device_get(metrics).items()})
  return out


def main(folder, port, count, process):
  jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
  assert jax.process_count() == int(count)
  rewards.SCORERS.update(rewarded.SCORERS)
  out = metrics_of(2 * rewarded.STEPS)
  (pathlib.Path(folder) / f"{process}.json").write_text(json.dumps(out))


if __name__ == "__main__":
  main(*sys.argv[1:])
