"""What must be set before JAX starts: memory, compiler, other processes."""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import pathlib
import socket
import stat
import sys
import urllib.parse
import urllib.request
import warnings
from typing import NamedTuple

# Options of glibc's mallopt (malloc.h), and Linux's MADV_HUGEPAGE.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_MADV_HUGEPAGE = 14
_LARGE_PAGE = 2**21
_TRITON = "--xla_gpu_enable_triton_gemm"


def keep_pages():
  """Keeps freed memory for the next allocation, in large pages.

  A step frees and allocates the same buffers again. By default glibc returns
  large ones to the system at once, and each then comes back as fresh pages that
  the kernel must clear: on two cores, a fifth to a third of a training step.
  Large pages are fewer to find: a tenth of the rest. Does nothing where there
  is no glibc. To be called before there are other threads.

  Returns: whether it took effect.
  """
  if not sys.platform.startswith("linux"):
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return False
  settings = {
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: _NEVER,
    _TOP_PAD: 2**27,
    _ARENA_MAX: 1,
  }
  if not all([libc.mallopt(*setting) for setting in settings.items()]):
    return False
  _ask_for_large_pages(libc)
  return True


def _ask_for_large_pages(libc):
  """Has the kernel back the heap to come by pages of 2 MiB, if it would.

  The heap grows by three quarters of the machine's memory and is free again:
  addresses, which take no memory until they are written to.
  """
  libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  size = memory // 4 * 3 // _LARGE_PAGE * _LARGE_PAGE
  start = libc.malloc(size)
  if start is None:  # a limit on addresses
    return
  first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
  libc.madvise(first, size - _LARGE_PAGE, _MADV_HUGEPAGE)
  libc.free(start)


def claim_devices():
  """Has JAX take nine tenths of a GPU at the start, where its default is 3/4.

  XLA_PYTHON_CLIENT_MEM_FRACTION sets another share. To be called before JAX is
  imported.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


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
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    with contextlib.suppress(OSError):  # JAX says what is wrong with it
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  _warn_of_writers(os.environ["JAX_COMPILATION_CACHE_DIR"])


def _warn_of_writers(folder):
  """Warns if others can put programs into a folder, which would be run."""
  off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower()
  path = pathlib.Path(folder)
  if off in ("0", "false") or not path.is_dir():  # gs://… is none, either
    return
  about = path.stat()
  others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
  if others or about.st_uid not in (os.getuid(), 0):
    warnings.warn(
      f"JAX_COMPILATION_CACHE_DIR = {folder}: others can write there, and what "
      "they write is run as you; take a folder of your own (chmod go-w), or "
      "set JAX_ENABLE_COMPILATION_CACHE=0",
      stacklevel=3,
    )


def see_what_others_write():
  """Has clients of object stores ask each time what is there.

  They would remember what they once listed, and not see what other processes
  wrote since. To be called before fsspec is imported.
  """
  for store in ("GS", "S3", "ABFS"):
    os.environ.setdefault(f"FSSPEC_{store}", '{"use_listings_cache": false}')


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


def hub_or_cache(timeout=3.0):
  """Has the clients of the Hugging Face hub read their cache if it is far.

  Out of reach, each name would be tried for a minute, a line at a time. To be
  called before they are imported.

  Args:
    timeout: seconds to wait for an answer.
  Returns: why it is out of reach; None if it is not, or if nobody can tell: a
    proxy is left to the clients.
  """
  if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
    return None
  endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
  url = urllib.parse.urlsplit(endpoint)
  try:
    socket.create_connection((url.hostname, url.port or 443), timeout).close()
  except OSError as error:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return f"{url.hostname} cannot be reached ({error.strerror or error})"
  return None


TOGETHER = (0, 42, 130)  # exit codes that all processes have at once


class Processes(NamedTuple):
  """Which of several processes this one is.

  Attributes:
    coordinator: HOST:PORT where process 0 listens; None: JAX finds it out, as
      it does the other two.
    count: of processes.
    process: this one, from 0.
  """

  coordinator: str | None
  count: int | None
  process: int | None


_PARTS = ("coordinator", "processes", "process")


def processes(options):
  """The Processes that flags, else the environment, name; None is one alone.

  DPO_JAX_COORDINATOR, DPO_JAX_PROCESSES and DPO_JAX_PROCESS are for launchers
  and say what the flags do. Without any, several tasks of one SLURM step, or
  the workers of a slice of TPUs that TPU_WORKER_HOSTNAMES lists, are together.

  Args:
    options: {"coordinator", "processes", "process"}, strings as far as given.
  Raises: ValueError naming what is missing or wrong.
  """
  named = {f"--{name}": options.get(name) for name in _PARTS}
  if not any(value is not None for value in named.values()):
    variables = [f"DPO_JAX_{name.upper()}" for name in _PARTS]
    named = {name: os.environ.get(name) for name in variables}
  given = {name: value for name, value in named.items() if value is not None}
  if not given:
    return Processes(None, None, None) if _detected() else None
  missing = [name for name in named if name not in given]
  if missing:
    raise ValueError(
      f"{', '.join(given)} without {', '.join(missing)}: each of several "
      "processes needs all three, as --coordinator HOST:PORT --processes 2 "
      "--process 0; one alone needs none"
    )
  (where, coordinator), (total, count), (own, process) = named.items()
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f"{where} = {coordinator} must be HOST:PORT of process 0, as "
      "localhost:8476"
    )
  if not count.isdecimal() or int(count) < 1:
    raise ValueError(f"{total} = {count} must be a number of processes, from 1")
  if not process.isdecimal() or int(process) >= int(count):
    raise ValueError(
      f"{own} = {process} must be one of 0 to {int(count) - 1} ({total} = "
      f"{count})"
    )
  if int(count) == 1:
    return None
  return Processes(coordinator, int(count), int(process))


def _detected():
  """Whether this is one of several tasks that JAX knows how to bring together.

  A script of sbatch sees the number of tasks too, and is none of them: only a
  step of srun has a list of nodes of its own.
  """
  tasks = os.environ.get("SLURM_NTASKS", "1")
  if "SLURM_STEP_NODELIST" in os.environ and tasks.isdecimal():
    return int(tasks) > 1
  return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def join(several):
  """Meets the other processes; to be called before JAX has its devices.

  Args:
    several: Processes.
  """
  import jax

  # It would take SIGTERM for itself; health.stop_on_signal asks the others.
  jax.config.update("jax_enable_preemption_service", False)
  if several.coordinator is None:
    jax.distributed.initialize()
  else:
    # What else a cluster's environment says is not to be mixed with it.
    jax.distributed.initialize(*several, cluster_detection_method="deactivate")


def leave(code):
  """Ends this process at once, if it is one of several and only it failed.

  At its exit JAX would wait for the others, who wait for it. Those that are
  done, or were stopped together, leave in the usual way.
  """
  jax = sys.modules.get("jax")
  if code in TOGETHER or jax is None or not jax.distributed.is_initialized():
    return
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)
