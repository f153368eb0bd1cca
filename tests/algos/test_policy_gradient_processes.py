"""PPO on two processes is PPO on one: draws, advantages, updates."""

import json

import numpy as np
import pytest

from tests import processes
from tests.algos import rewarded, rollout_driver


@pytest.mark.slow
def test_ppo_on_two_processes_is_that_of_one(tmp_path, monkeypatch):
  """Eight devices in all: whitening and means are of the global batch."""
  ends = processes.together("tests.algos.rollout_driver", tmp_path, devices=4)
  processes.assert_both_succeed(ends)
  one, two = (
    json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)
  )
  assert one == two
  rewarded.registered(monkeypatch)
  want = rollout_driver.metrics_of(2 * rewarded.STEPS)
  assert len(want) == len(one)
  for got, row in zip(one, want, strict=True):
    assert got.keys() == row.keys()
    for name, value in row.items():
      # Their sums meet in another order.
      np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5)
