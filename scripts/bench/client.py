"""The driver's side of the talk with a worker process."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from scripts.bench import cases

ROOT = pathlib.Path(__file__).parent.parent.parent
# dpo_jax.host.keep_pages as settings of glibc, for the others: without
# them torch, too, spends a good part of a step on fresh pages.
KEEP_PAGES = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
  "MALLOC_TOP_PAD_": str(2**27),
  "MALLOC_ARENA_MAX": "1",
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# The driver itself computes on CPUs, so that it holds no accelerator.
PLATFORMS = os.environ.get("JAX_PLATFORMS")
MALLOC = "glibc that keeps its pages, large ones, for all systems"


class Failed(Exception):
  """A worker ended, or said something that is no answer."""


def python(system):
  """The interpreter of a system.

  Raises: ValueError if neither its environment nor its package is there.
  """
  if system.venv is None:
    return sys.executable
  found = ROOT / system.venv / "bin" / "python"
  if not found.exists():
    if system.package and importlib.util.find_spec(system.package):
      return sys.executable
    raise ValueError(
      f"{system.what} needs {system.venv}, which `bash scripts/bench.sh` "
      "makes; or leave it out by --systems"
    )
  return str(found)


class Worker:
  """A process that does steps when it is asked to.

  Attributes:
    name: of cases.SYSTEMS.
    ready: what it said when it was, and how long that took.
  """

  def __init__(self, name, job, folder, cpus, seconds=None):
    """Starts it and waits until it is ready.

    Args:
      name: of cases.SYSTEMS.
      job: of inputs.job.
      folder: for its job and its log.
      cpus: set of the CPUs that it may use.
      seconds: after which it is killed, or None.
    """
    system = cases.SYSTEMS[name]
    self.name, self._log = name, folder / f"{name}.log"
    path = folder / f"{name}.json"
    workdir = folder / f"run-{name}"
    job = {**job, "workdir": str(workdir), "cpus": sorted(cpus)}
    path.write_text(json.dumps(job))
    begin = time.perf_counter()
    module = job.get("modules", {}).get(name, system.module)
    command = [python(system), "-m", f"scripts.bench.{module}", path]
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(system, folder, job),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
      )
    self._timer = None
    if seconds is not None:
      self._timer = threading.Timer(seconds, self._process.kill)
      self._timer.daemon = True
      self._timer.start()
    try:
      self.ready = self._read()
    except BaseException:  # it would go on without anybody to hear it
      self._process.kill()
      raise
    self.ready["start_seconds"] = time.perf_counter() - begin

  def steps(self, count):
    """Does `count` steps; the worker's answer."""
    try:
      self._send({"cmd": "steps", "n": count})
    except OSError as error:
      raise self._failed() from error
    return self._read()

  def stop(self):
    """Ends the process; it may have ended before."""
    if self._process.stdout.closed:
      return
    try:
      self._send({"cmd": "stop"})
      self._process.wait(timeout=60)
    except (OSError, subprocess.TimeoutExpired):
      self._process.kill()
    self._process.wait()
    if self._timer is not None:
      self._timer.cancel()
    with contextlib.suppress(OSError):  # it may hold what was not read
      self._process.stdin.close()
    self._process.stdout.close()

  def _send(self, command):
    self._process.stdin.write(json.dumps(command) + "\n")
    self._process.stdin.flush()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      raise self._failed()
    return json.loads(line)

  def _failed(self):
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=10)
    code = self._process.poll()
    self._process.kill()
    self.stop()
    if code == -signal.SIGKILL:
      code = f"{code}: killed, for want of memory or of time"
    tail = "\n".join(self._log.read_text().splitlines()[-25:])
    return Failed(f"the worker {self.name!r} ended ({code}):\n{tail}")


def _environment(system, folder, job):
  """Environment variables of a worker."""
  found = dict(os.environ)
  found.pop("JAX_PLATFORMS", None)
  if not job.get("device"):
    found |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
  else:
    # One GPU: torch would spread a batch over all that it sees.
    seen = found.get("CUDA_VISIBLE_DEVICES", "0")
    found["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]
    if PLATFORMS is not None:
      found["JAX_PLATFORMS"] = PLATFORMS
  # Compilations are measured, so none may be found.
  found.pop("JAX_COMPILATION_CACHE_DIR", None)
  found |= {
    "OMP_NUM_THREADS": str(len(job["cpus"])),
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(folder / "hf"),
    "TOKENIZERS_PARALLELISM": "false",
  }
  if system.module != "ours":  # it does so itself
    found |= KEEP_PAGES
  return found
