"""One writer per run folder, and a stop that loses nothing."""

import contextlib
import fcntl
import os
import signal
import threading

from etils import epath

EXIT_INTERRUPTED = 130  # Ctrl-C; everything is saved
EXIT_REQUEUE = 42  # SIGTERM or SIGUSR2; everything is saved, run it again


@contextlib.contextmanager
def lock(workdir):
  """Holds the run folder for this process; the system frees it on any exit.

  A folder on an object store (gs://…) cannot be locked and is not.

  Raises: ValueError if another process holds it.
  """
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if "://" in str(workdir):
    yield
    return
  with open(workdir / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(
        f"--workdir {workdir} is in use by another running process; wait for "
        "it, stop it, or choose another folder"
      ) from error
    yield


class Stop:
  """Set by a signal; the loop saves and leaves at the next step."""

  def __init__(self):
    self.signal = None
    self._at_once = False

  def __bool__(self):
    return self.signal is not None

  @property
  def exit_code(self):
    """EXIT_INTERRUPTED after Ctrl-C, else EXIT_REQUEUE."""
    interrupted = self.signal == signal.SIGINT
    return EXIT_INTERRUPTED if interrupted else EXIT_REQUEUE

  @contextlib.contextmanager
  def at_once(self):
    """A signal inside raises Stopped there: there is nothing to save yet."""
    self._at_once = True
    try:
      yield
    finally:
      self._at_once = False

  def set(self, number):
    """Takes signal `number`.

    Raises: Stopped inside `at_once`.
    """
    self.signal = number
    if self._at_once:
      raise Stopped(self.exit_code)


class Stopped(KeyboardInterrupt):
  """Work before the first step was left by a signal; what is done is kept."""

  def __init__(self, exit_code):
    super().__init__()
    self.exit_code = exit_code


@contextlib.contextmanager
def stop_on_signal():
  """Yields a Stop raised by SIGINT, SIGTERM or SIGUSR2.

  A second signal takes its usual effect at once. Outside the main thread
  (where Python has no signals) the Stop is never raised.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
  before = {s: signal.getsignal(s) for s in signals}

  def restore():
    for s, handler in before.items():
      signal.signal(s, handler)

  def handle(number, frame):
    del frame
    restore()
    stop.set(number)
    name = signal.Signals(number).name
    text = f"\n{name}: saving after this step (again: stop at once)\n"
    # Neither buffered nor fatal: the terminal may be gone already.
    with contextlib.suppress(OSError):
      os.write(2, text.encode())

  for s in signals:
    signal.signal(s, handle)
  try:
    yield stop
  finally:
    restore()
