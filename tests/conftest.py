"""Eight fake CPU devices, and matmuls in full f32, for every test."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_default_matmul_precision", "highest")

ROOT = pathlib.Path(__file__).parent.parent
