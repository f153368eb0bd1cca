"""A time limit on code that a model brings, in whatever thread it runs."""

import ctypes
import threading
import time

_POLL = 0.1  # seconds between looks at what is running
_AGAIN = 5.0  # seconds until what did not end is told once more
_lock = threading.Lock()
_watchers = []  # the thread that watches, if one does
_running = {}  # {object: [thread, when it has to be done, whether it was told]}


class TooLong(ValueError):
  """Code that went on for longer than it may."""


class _Stop(BaseException):
  """Raised in a thread from outside; no `except Exception` there takes it."""


def within(limit, message, work):
  """work(), which is ended after `limit` seconds, between two of its steps.

  Signals reach the main thread alone, and a thread cannot be ended; an
  exception can be raised in it. One call of C, such as copying a long string,
  is waited for.

  Args:
    limit: seconds.
    message: of the error.
    work: function without arguments.
  Raises: TooLong.
  """
  mine = object()
  try:
    try:
      _begin(mine, limit)
      return work()
    finally:
      with _lock:
        *_, told = _running.pop(mine, (False,))
      if told:
        _let_in()
  except _Stop:
    raise TooLong(message) from None
  finally:
    _running.pop(mine, None)


def _begin(mine, limit):
  with _lock:
    # One that sleeps is alive; in a fork of this process it is not.
    if not any(watcher.is_alive() for watcher in _watchers):
      _watchers[:] = [threading.Thread(target=_watch, daemon=True)]
      _watchers[0].start()
    _running[mine] = [threading.get_ident(), time.monotonic() + limit, False]


def _watch():
  """Tells those whose time is over, until nothing is running."""
  while True:
    time.sleep(_POLL)
    with _lock:
      if not _running:
        _watchers.clear()
        return
      for each in _running.values():
        thread, end, _ = each
        if time.monotonic() > end:
          # Again, if a destructor or the like was where it got to.
          each[1:] = time.monotonic() + _AGAIN, True
          ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(_Stop)
          )


def _let_in():
  """Has an exception arrive that this thread was told of, if it is not there.

  It comes at the next turn of a loop. It could be taken back instead; but then
  CPython goes on looking for it, and a profiler in that process never ends.
  """
  try:
    for _ in range(100):
      pass
  except _Stop:
    return
