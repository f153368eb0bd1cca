"""Eight fake CPU devices, and matmuls in full f32, for every test."""

import gc
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

ROOT = pathlib.Path(__file__).parent.parent

# Linux gives a process 65,530 memory mappings, and every compiled program holds
# some: beyond them LLVM aborts the process.
_MAPPINGS = 25_000
_ended = itertools.count(1)

# Files of few dear tests that share next to nothing: they fill the run's end.
_SPREAD = (
  "tests/algos/test_own_loss.py",
  "tests/algos/test_toy_on_policy.py",
  "tests/parallel/test_hlo.py",
  "tests/parallel/test_topology.py",
  "tests/test_loop.py",
)


@pytest.fixture(autouse=True)
def bounded_mappings():
  """Lets go of compiled programs before the process runs out of mappings.

  Linux takes milliseconds to list them, so it is asked after every tenth test.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if next(_ended) % 10 or not maps.exists():
    return
  if maps.read_bytes().count(b"\n") > _MAPPINGS:
    jax.clear_caches()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """`--dist loadgroup`: a file is one worker's, one of _SPREAD is anyone's."""
  if config.getvalue("dist") != "loadgroup":
    return None
  from xdist import scheduler

  by_file = scheduler.LoadFileScheduling(config, log)
  by_file._split_scope = unit_of
  return by_file


def unit_of(nodeid):
  """What goes to one worker with a test; the largest units go first."""
  file = nodeid.partition("::")[0]
  return nodeid if file in _SPREAD else file


def pytest_collection_finish(session):
  """Modules and tests stay: no collection of garbage walks them again."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
  """The folder that `pip install .` copies to site-packages."""
  root = tmp_path_factory.mktemp("installed")
  names = ["setup.py", "pyproject.toml", "README.md", "dpo_jax", "configs"]
  for name in names:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, root / name)
  command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"]
  subprocess.run(command, check=True, cwd=root, capture_output=True)
  for name in names:
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  return root / "lib"


def run_installed(installed, folder, *words):
  """stdout and stderr of a command with the installed package."""
  env = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, *words],
    env=env,
    cwd=folder,
    capture_output=True,
    text=True,
  )
