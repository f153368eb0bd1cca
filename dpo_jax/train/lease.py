"""One writer of a folder of an object store: a lease that is renewed.

A store frees nothing when a process dies. `.lock` is created where there is
none, which the store grants to one, and written again every few seconds. Who
finds it watches it: if it changes, its holder lives; if it does not, the holder
is gone, and it is taken over. No clocks are compared.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid

import fsspec

BEAT = 10.0  # seconds between renewals
PATIENCE = 45.0  # without one, until the holder counts as gone


@contextlib.contextmanager
def held(path):
  """Holds the lease of an object's path.

  If another took it over, since the machine slept, say, this process gets a
  SIGTERM.

  Raises: ValueError if another process holds it.
  """
  lease = _Lease(str(path))
  lease.take()
  thread = threading.Thread(target=lease.renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    lease.ended.set()
    thread.join()
    lease.free()


class _Lease:
  """An object that says who holds it, and how often that was renewed."""

  def __init__(self, path):
    self._path = path
    self._store, self._name = fsspec.core.url_to_fs(path)
    self._about = {
      "token": uuid.uuid4().hex,
      "host": socket.gethostname(),
      "process": os.getpid(),
      "beats": 0,
    }
    self.ended = threading.Event()

  def take(self):
    """Creates it, or takes it over from one that is gone."""
    deadline, seen, taken = None, None, False
    while not self._created():
      there = self._read()
      if there is None:
        continue  # just freed
      if there != seen:
        if seen is not None and there.get("token") == seen.get("token"):
          raise ValueError(
            f"{self._path}: in use by process {there.get('process')} on "
            f"{there.get('host')}; wait for it, stop it, or choose another "
            "--workdir"
          )
        if seen is None:
          print(
            f"{self._path} was left by process {there.get('process')} on "
            f"{there.get('host')}; is it alive? ({PATIENCE:.0f} s)",
            flush=True,
          )
        seen, deadline = there, time.monotonic() + PATIENCE
      elif time.monotonic() > deadline:
        with contextlib.suppress(FileNotFoundError):
          self._store.rm_file(self._name)
        taken = True
        continue
      time.sleep(BEAT / 10)
    if taken:  # another may have waited as long, and removed this one's
      time.sleep(BEAT / 5)
      if (self._read() or {}).get("token") != self._about["token"]:
        raise ValueError(f"{self._path}: another process took it; try again")

  def renew(self):
    """Writes it again, until it is `ended` or another holds it."""
    while not self.ended.wait(BEAT):
      try:
        there = self._read()
        if there is None or there.get("token") != self._about["token"]:
          sys.stderr.write(f"{self._path} was taken over by another process\n")
          os.kill(os.getpid(), signal.SIGTERM)
          return
        self._about["beats"] += 1
        self._store.pipe_file(self._name, self._bytes())
      except Exception as error:  # whatever a store raises that is away
        sys.stderr.write(f"{self._path} could not be renewed: {error}\n")

  def free(self):
    """Removes it, if it is still this process's."""
    with contextlib.suppress(Exception):  # the next one waits a little
      if (self._read() or {}).get("token") == self._about["token"]:
        self._store.rm_file(self._name)

  def _created(self):
    try:
      self._store.pipe_file(self._name, self._bytes(), mode="create")
    except Exception:  # each store has its own for what is there already
      there = self._read()
      if there is None:
        raise
      return there.get("token") == self._about["token"]  # a retried request
    return True

  def _read(self):
    """What the object says, or None if there is none."""
    try:
      return json.loads(self._store.cat_file(self._name))
    except FileNotFoundError:
      return None
    except ValueError:
      return {}

  def _bytes(self):
    return json.dumps(self._about).encode()
