"""How programs are compiled, and where they are kept for the next run."""

import hashlib
import importlib.util
import os
import pathlib

_TRITON = "--xla_gpu_enable_triton_gemm"


def keep():
  """Has JAX keep what it compiles, unless its own settings say where or not.

  In `~/.cache/dpo_jax/programs`, a folder for each kind of processor: a program
  for one with more instructions would not run on another. Whoever can write
  there can have code run here; JAX_COMPILATION_CACHE_DIR names another folder,
  JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing. To be called before JAX is
  imported.
  """
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(home) / "dpo_jax" / "programs" / _processor()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def _processor():
  """A name for what this processor can do."""
  about, info = list(os.uname()[4:]), pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text().splitlines()
    about += [x for x in lines if x.startswith(("flags", "Features"))][:1]
  digest = hashlib.blake2b("".join(about).encode(), digest_size=6)
  return f"{os.uname().machine}-{digest.hexdigest()}"


def leave_triton_out():
  """Has XLA leave the matmuls of an NVIDIA GPU to cuBLAS.

  Trying Triton's kernels out for each of them takes minutes before the first
  step of a 24-layer model on an H100, and cuBLAS alone 25 s; to try nothing
  (--xla_gpu_autotune_level=0) compiles no faster, and steps took six times as
  long (Pythia-410m; the three were measured side by side on one card). What
  XLA_FLAGS says of it stays. To be called before JAX is imported.
  """
  plugins = "jax_cuda12_plugin", "jax_cuda13_plugin"
  flags = os.environ.get("XLA_FLAGS", "")
  if _TRITON not in flags and any(map(importlib.util.find_spec, plugins)):
    os.environ["XLA_FLAGS"] = f"{flags} {_TRITON}=false".strip()
