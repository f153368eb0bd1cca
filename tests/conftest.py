"""Eight fake CPU devices, and matmuls in full f32, for every test."""

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


@pytest.fixture(autouse=True)
def bounded_mappings():
  """Lets go of compiled programs before the process runs out of mappings."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MAPPINGS:
    jax.clear_caches()


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
