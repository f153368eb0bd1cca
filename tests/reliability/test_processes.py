"""Several processes from the command line are one run."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax import cli, host, loop
from dpo_jax.train import health
from tests import conftest

VARIABLES = (
  *("DPO_JAX_COORDINATOR", "DPO_JAX_PROCESSES", "DPO_JAX_PROCESS"),
  *("SLURM_STEP_NODELIST", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"),
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)


def options(coordinator="localhost:1234", processes="2", process="1"):
  values = coordinator, processes, process
  names = "coordinator", "processes", "process"
  return {k: v for k, v in zip(names, values, strict=True) if v is not None}


def test_flags_name_the_process_and_one_alone_is_none():
  assert host.processes(options()) == ("localhost:1234", 2, 1)
  assert host.processes(options(processes="1", process="0")) is None
  assert host.processes({}) is None


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    ({"process": None}, r"--coordinator, --processes without --process:"),
    ({"coordinator": None}, r"without --coordinator:"),
    ({"coordinator": "localhost"}, "must be HOST:PORT"),
    ({"coordinator": ":80"}, "must be HOST:PORT"),
    ({"coordinator": "a:70000"}, "must be HOST:PORT"),
    ({"processes": "0"}, "--processes = 0 must be a number"),
    ({"processes": "two"}, "--processes = two must be a number"),
    ({"process": "2"}, "--process = 2 must be one of 0 to 1"),
    ({"process": "-1"}, "--process = -1 must be one of 0 to 1"),
  ],
)
def test_wrong_or_half_given_flags_are_refused(wrong, said):
  with pytest.raises(ValueError, match=said):
    host.processes(options(**wrong))


def test_a_launcher_sets_variables_and_flags_go_before_them(monkeypatch):
  monkeypatch.setenv("DPO_JAX_COORDINATOR", "other:5")
  monkeypatch.setenv("DPO_JAX_PROCESSES", "4")
  with pytest.raises(ValueError, match="without DPO_JAX_PROCESS:"):
    host.processes({})
  monkeypatch.setenv("DPO_JAX_PROCESS", "3")
  assert host.processes({}) == ("other:5", 4, 3)
  assert host.processes(options()) == ("localhost:1234", 2, 1)


@pytest.mark.parametrize(
  ("variables", "several"),
  [
    ({"SLURM_NTASKS": "2"}, False),  # the script of sbatch, not a task
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
  ],
)
def test_several_tasks_of_a_cluster_are_found(variables, several, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  want = (None, None, None) if several else None
  assert host.processes({}) == want


def test_a_verb_that_runs_as_one_process_refuses_several(capsys):
  flags = "--coordinator=localhost:1", "--processes=2", "--process=0"
  assert cli.main(["losses", *flags]) == 2
  assert "train, sample run as several" in capsys.readouterr().err


FIELDS = ("data.eval=None", "log.every=1", "checkpoint.every=100000")


def start(workdir, *fields, devices=1):
  """Two processes of `dpo-jax train`, with so many devices each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flag = "--xla_force_host_platform_device_count"
  kept = [x for x in os.environ["XLA_FLAGS"].split() if flag not in x]
  flags = " ".join([*kept, f"{flag}={devices}"])
  command = [
    *(sys.executable, "-m", "dpo_jax", "train", "--config", "dpo:smoke"),
    *("--workdir", str(workdir)),
    *("--coordinator", f"localhost:{port}", "--processes", "2"),
    *(f"--config.{field}" for field in (*FIELDS, *fields)),
  ]
  return [
    subprocess.Popen(
      [*command, "--process", str(process)],
      cwd=conftest.ROOT,
      env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(2)
  ]


def ends(processes):
  """[(exit code, output)]."""
  try:
    said = [x.communicate(timeout=200)[0] for x in processes]
  finally:
    for process in processes:
      process.kill()
  return [(x.returncode, s) for x, s in zip(processes, said, strict=True)]


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.mark.slow
def test_two_processes_from_the_command_line_train_as_one(tmp_path):
  """R14's half without uneven data: two of one device are one of two."""
  got = ends(start(tmp_path / "two", "train.steps=3"))
  assert [code for code, _ in got] == [0, 0], got
  flags = os.environ["XLA_FLAGS"]
  command = [
    *(sys.executable, "-m", "dpo_jax", "train", "--config", "dpo:smoke"),
    *("--workdir", str(tmp_path / "one"), "--config.train.steps=3"),
    *(f"--config.{field}" for field in FIELDS),
  ]
  flags += " --xla_force_host_platform_device_count=2"
  env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  subprocess.run(command, cwd=conftest.ROOT, env=env, check=True)
  one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
  assert one.keys() == two.keys() == {1, 2, 3}
  for step, loss in one.items():
    np.testing.assert_allclose(two[step], loss, rtol=1e-5)


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_both_at_once(tmp_path):
  """R16: the second does not wait for the heartbeat of the first."""
  with health.lock(tmp_path):
    got = ends(start(tmp_path, "train.steps=3"))
  assert [code for code, _ in got] == [2, 2], got
  assert "in use by another running process" in got[0][1]
  assert "the first process cannot hold --workdir" in got[1][1]


def test_what_the_first_is_refused_ends_the_others(tmp_path, monkeypatch):
  """R16: none trains in a folder that the first does not hold."""
  monkeypatch.setattr(loop.jax, "process_index", lambda: 1)
  monkeypatch.setattr(loop.processes, "largest", lambda own: 1 - own)
  with (
    pytest.raises(ValueError, match="first process cannot hold --workdir"),
    loop.held([tmp_path]),
  ):
    pass


ALONE = """
import os, signal, sys, time
from dpo_jax import cli, host
port, process = sys.argv[1:]
host.join(host.Processes(f"localhost:{port}", 2, int(process)))
import jax
jax.devices()
if process == "0":
  cli.main = lambda: time.sleep(30) or 0
else:
  cli.main = lambda: %s
print("joined", flush=True)
sys.exit(cli.command())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("what", "code"),
  [
    ("2", 2),  # a mistake that it alone sees, a file that it lacks
    ("1 / 0", 1),
    ("os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30)", -15),
  ],
)
def test_what_ends_one_alone_ends_it_at_once(what, code):
  """R7: at its exit JAX would wait five minutes for the others."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  running = [
    subprocess.Popen(
      [sys.executable, "-c", ALONE % what, port, str(process)],
      cwd=conftest.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  try:
    assert running[1].stdout.readline() == "joined\n"
    assert running[1].wait(timeout=20) == code
    assert running[0].poll() is None
  finally:
    for process in running:
      process.kill()
