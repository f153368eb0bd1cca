"""Two processes draw together what one draws: each has all of it, in order."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from dpo_jax.eval import generate
from dpo_jax.run import build, trained
from tests import conftest, draw_driver

SECONDS = 240  # each takes twenty, alone on two cores


@pytest.mark.slow
def test_draws_of_two_processes_are_those_of_one(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = "--xla_force_host_platform_device_count"
  kept = [x for x in os.environ["XLA_FLAGS"].split() if flags not in x]
  env = {**os.environ, "XLA_FLAGS": " ".join([*kept, f"{flags}=2"])}
  command = [sys.executable, "-m", "tests.draw_driver", str(tmp_path)]
  processes = [
    subprocess.Popen(
      [*command, str(port), "2", str(number)],
      cwd=conftest.ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  try:
    errors = [x.communicate(timeout=SECONDS)[1] for x in processes]
  finally:
    for process in processes:
      process.kill()
  assert [x.returncode for x in processes] == [0, 0], "\n".join(errors)
  got = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]

  setup = build.prepare_model(draw_driver.load())
  params = trained.initial(setup)
  given = generate.prompts(setup)
  want = [d._asdict() for b in generate.draws(setup, params, given) for d in b]
  assert len(want) == 24
  assert got == [want, want]
  assert jax.process_count() == 1
