"""Eight fake CPU devices, and matmuls in full f32, for every test."""

import os
import pathlib

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
