"""PPO that was killed goes on to the same bits, or is refused.

    python -m tests.algos.test_policy_gradient_resume FOLDER KILL_AT

trains and kills the process before step KILL_AT.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys

import jax
import pytest

from dpo_jax import loop
from dpo_jax.eval import rewards
from dpo_jax.run import build
from dpo_jax.train import checkpoint
from tests import folders, processes
from tests.algos import rewarded

slow = pytest.mark.slow
TOTAL = 3 * rewarded.STEPS
# A controller that moves, a critic that is warmed up, a stop.
CONTROLLED = (
  *("rollout.warmup=1", "rollout.kl_target=1e-3", "rollout.kl_horizon=20"),
  *("rollout.kl_stop=1e-4", f"train.steps={TOTAL}"),
)


@pytest.fixture(autouse=True)
def _scorers(monkeypatch):
  rewarded.registered(monkeypatch)


def saved_steps(folder):
  with checkpoint.Checkpointer(folder, keep=2) as saved:
    return saved.steps()


def goes_on(run, config, tmp_path):
  """Trains whole, and again with a kill between boundaries; the last state."""
  loop.fit(config, tmp_path / "whole", run)
  with pytest.raises(rewarded.Killed):
    loop.fit(config, tmp_path / "cut", rewarded.killed_before(run, 6))
  assert saved_steps(tmp_path / "cut") == [rewarded.STEPS]  # boundaries alone
  resumed = loop.fit(config, tmp_path / "cut", run)
  sums = [
    rewarded.checksums(tmp_path / name, TOTAL) for name in ("whole", "cut")
  ]
  assert sums[0] == sums[1]
  rows = [rewarded.metrics(tmp_path / name)[-1] for name in ("whole", "cut")]
  for name in ("loss", "objective/kl", "objective/kl_coefficient"):
    assert rows[0].get(name) == rows[1].get(name), name
  return resumed.state


def test_ppo_killed_between_boundaries_goes_on_to_the_same_bits(tmp_path):
  config = rewarded.config_of(*CONTROLLED)
  state = goes_on(rewarded.alone(*CONTROLLED), config, tmp_path)
  # What was to be kept is in what was kept: it had moved by then.
  beta = config.loss.beta
  assert abs(float(state.extra["coefficient"]) / beta - 1) > 0.01
  assert float(state.extra["learns"]) == 1
  assert abs(state.params["value"]["kernel"]).max() > 0
  paths = " ".join(rewarded.checksums(tmp_path / "cut", TOTAL))
  for name in ("coefficient", "learns", "rests", "value"):
    assert name in paths, name


WAYS = {
  "2x2x2": ("", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")),
  "pmap": ("", ("mesh.mode=pmap",)),
  "copy": ("", ("rollout.critic=copy",)),
  "adapters": (",lora", ()),
  "accumulation": ("", ("train.accumulation=2",)),
}


@slow
@pytest.mark.parametrize("way", WAYS)
def test_every_ppo_goes_on_to_the_same_bits(way, tmp_path):
  arg, overrides = WAYS[way]
  overrides = (*CONTROLLED, *overrides)
  config = rewarded.config_of(*overrides, arg=arg)
  goes_on(build.prepare(config), config, tmp_path)


@slow
def test_a_killed_process_of_ppo_goes_on_to_the_same_bits(tmp_path):
  names, kills = ("whole", "cut", "cut"), (-1, 7, -1)
  codes = [
    processes.alone(
      "tests.algos.test_policy_gradient_resume", tmp_path / name, kill
    )
    for name, kill in zip(names, kills, strict=True)
  ]
  assert codes == [0, -signal.SIGKILL, 0]
  sums = [
    rewarded.checksums(tmp_path / name, TOTAL) for name in ("whole", "cut")
  ]
  assert sums[0] == sums[1]
  steps = [row["step"] for row in rewarded.metrics(tmp_path / "cut")]
  assert steps == list(range(1, TOTAL + 1))


def write_prompts(path, last):
  texts = [*(f"what of {n}?" for n in range(9)), last]
  path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))


def test_ppo_with_other_prompts_or_another_scorer_is_refused(tmp_path):
  """What it draws would be another run's."""
  prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "run"
  write_prompts(prompts, "and of this?")
  overrides = (f"data.train={prompts}", *CONTROLLED)
  config = rewarded.config_of(*overrides)
  run, _ = folders.untrained(config, folder, rewarded.STEPS)
  # The same prompts go on.
  with contextlib.ExitStack() as opened:
    state = loop.restore(run, folder, None, opened)[1]
  assert int(state.step) == rewarded.STEPS
  other = rewarded.config_of(*overrides, "rollout.scorer=ascii:other")
  with pytest.raises(ValueError, match=r"rollout\.scorer"):
    loop.fit(other, folder)
  write_prompts(prompts, "or of that?")
  with pytest.raises(ValueError, match="prompts"):
    loop.fit(config, folder)
  assert saved_steps(folder) == [rewarded.STEPS]


def main(folder, kill_at):
  rewards.SCORERS.update(rewarded.SCORERS)
  config = rewarded.config_of(*CONTROLLED)
  run = build.prepare(config)

  def batch(number, state):
    if number == kill_at:
      os.kill(os.getpid(), signal.SIGKILL)
    return run.feed.batch(number, state)

  killed = run._replace(feed=run.feed._replace(batch=batch))
  loop.fit(config, pathlib.Path(folder), killed)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 1)
  main(sys.argv[1], int(sys.argv[2]))
