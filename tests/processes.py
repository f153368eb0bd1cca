"""Processes of their own: one alone, and two that talk over the loopback."""

import os
import socket
import subprocess
import sys

from tests import conftest


def alone(module, *arguments):
  """The exit code of a process that runs a module, on one device."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  flags = [f for f in flags if "device_count" not in f]
  env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
  command = [sys.executable, "-m", module, *map(str, arguments)]
  return subprocess.run(command, env=env, cwd=conftest.ROOT).returncode


def together(module, folder, *arguments, devices=2, seconds=240):
  """[(exit code, stderr)] of two processes that run a module.

  Args:
    module: run as `python -m MODULE FOLDER PORT 2 PROCESS ARGUMENT…`.
    folder: for what they write.
    devices: fake devices of each.
    seconds: after which they are killed; twenty are usual on two cores.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = "--xla_force_host_platform_device_count"
  kept = [x for x in os.environ["XLA_FLAGS"].split() if flags not in x]
  env = {**os.environ, "XLA_FLAGS": " ".join([*kept, f"{flags}={devices}"])}
  command = [sys.executable, "-m", module, str(folder), str(port), "2"]
  processes = [
    subprocess.Popen(
      [*command, str(process), *map(str, arguments)],
      cwd=conftest.ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  try:
    errors = [x.communicate(timeout=seconds)[1] for x in processes]
  finally:
    for process in processes:
      process.kill()
  return [(x.returncode, e) for x, e in zip(processes, errors, strict=True)]


def assert_both_succeed(ends):
  assert [code for code, _ in ends] == [0, 0], "\n".join(e for _, e in ends)
