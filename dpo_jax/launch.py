"""Several processes of one command on this machine, started again if need be.

They meet over the loopback (host.processes): a rehearsal of a pod, on its CPU.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from dpo_jax import lookup

_POLL = 0.1  # seconds
# What a process that lost another may take to end by itself, before it is
# killed: it may be saving. Seconds.
_GRACE = 30.0
_SAY = 5.0  # seconds for the last lines of a process that has ended
_FLAGS = {"processes": ("2", 1), "restarts": ("0", 0)}  # default, least
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def options(words):
  """({"processes", "restarts"}, command) of `local --processes 2 -- train …`.

  Raises: ValueError naming the word that is wrong.
  """
  if "--" not in words or words[-1] == "--":
    raise ValueError(
      "launch needs -- and a command: dpo-jax launch local --processes 2 -- "
      "train --config dpo --workdir DIR"
    )
  cut = words.index("--")
  own, command = iter(words[:cut]), words[cut + 1 :]
  where = next(own, None)
  if where != "local":
    raise ValueError(f"launch knows local (this machine), not {where!r}")
  values = {name: default for name, (default, _) in _FLAGS.items()}
  for word in own:
    name, given, value = word.removeprefix("--").partition("=")
    lookup.lookup(_FLAGS, name, "option of launch")
    values[name] = value if given else next(own, "")
  for name, (_, least) in _FLAGS.items():
    if not values[name].isdecimal() or int(values[name]) < least:
      raise ValueError(
        f"--{name} = {values[name]} must be a number from {least}"
      )
  return {name: int(value) for name, value in values.items()}, command


def local(command, count, restarts=0, grace=_GRACE):
  """Runs a command as several processes that know of one another.

  Process 0 has the console to itself as it is; the lines of others begin with
  their number. Signals go to all of them.

  Args:
    command: words of it.
    count: of processes.
    restarts: how often all are started again after one died or asked to be run
      again; not after a user's mistake (2), nor after a signal to this one.
    grace: seconds that the others have to end when one died.
  Returns: exit code: 0 if all are; else that of the first to fail, 128 + the
    signal for one that was killed.
  """
  asked, running, told = [], [], {}
  # What is ignored stays so, here and in the processes: `nohup`, `&`.
  before = {s: signal.getsignal(s) for s in _SIGNALS}
  before = {s: h for s, h in before.items() if h != signal.SIG_IGN}

  def forward(number, _frame):
    asked.append(number)
    tell()

  def tell():
    """Sends each process the signals that it was not sent yet."""
    for process in list(running):
      since, told[process.pid] = told.get(process.pid, 0), len(asked)
      for number in asked[since:] if process.poll() is None else ():
        process.send_signal(number)

  for number in before:
    signal.signal(number, forward)
  try:
    for attempt in range(restarts + 1):
      running.clear()
      readers = _start(command, count, running)
      tell()  # of what came while they were being started
      code = _wait(running, grace)
      for reader in readers:
        reader.join(_SAY)
      final = code in (0, 2) or asked or attempt == restarts
      if final:
        return code
      print(
        f"launch: exit code {code}; starting again ({attempt + 1} of "
        f"{restarts})",
        file=sys.stderr,
        flush=True,
      )
  finally:
    for process in running:
      process.kill()
    for number, handler in before.items():
      signal.signal(number, handler)


def _start(command, count, running):
  """Adds the processes to `running`.

  Returns: threads that pass on what those after the first say.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  together = {
    "DPO_JAX_COORDINATOR": f"localhost:{port}",
    "DPO_JAX_PROCESSES": str(count),
    # JAX would listen on all addresses of this machine.
    "JAX_COORDINATOR_BIND_ADDRESS": f"localhost:{port}",
    "JAX_PLATFORMS": "cpu",  # two processes cannot share an accelerator
    "PYTHONUNBUFFERED": "1",
  }
  readers = []
  for number in range(count):
    env = os.environ | together | {"DPO_JAX_PROCESS": str(number)}
    said = {}
    if number:
      said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # A session of their own: Ctrl-C reaches them once, through `forward`.
    process = subprocess.Popen(
      command,
      env=env,
      start_new_session=True,
      encoding="utf-8",
      errors="replace",
      **said,
    )
    running.append(process)
    if number:
      arguments = number, process.stdout
      readers.append(
        threading.Thread(target=_pass_on, args=arguments, daemon=True)
      )
      readers[-1].start()
  return readers


def _pass_on(number, lines):
  for line in lines:
    with contextlib.suppress(OSError, ValueError):  # the reader went away
      sys.stderr.write(f"[{number}] {line}")


def _wait(running, grace):
  """The exit code of all; kills those that do not end after one failed."""
  first, deadline = 0, None
  while any(process.poll() is None for process in running):
    failed = [x.returncode for x in running if x.poll()]
    if failed and deadline is None:
      first, deadline = failed[0], time.monotonic() + grace
    if deadline is not None and time.monotonic() > deadline:
      for process in running:
        process.kill()
    time.sleep(_POLL)
  failed = [x.returncode for x in running if x.returncode]
  code = first or (failed[0] if failed else 0)
  return 128 - code if code < 0 else code
