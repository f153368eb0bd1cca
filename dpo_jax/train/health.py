"""One writer per run folder, a stop that loses nothing, and what must hold."""

import contextlib
import fcntl
import math
import os
import signal
import threading

import jax
from etils import epath

from dpo_jax import store
from dpo_jax.parallel import processes
from dpo_jax.train import lease
from dpo_jax.train import state as state_lib

EXIT_INTERRUPTED = 130  # Ctrl-C; everything is saved
EXIT_REQUEUE = 42  # another signal; everything is saved, run it again
# Steps after which several processes ask one another for signals: they wait for
# all steps begun then, so neither each step nor later than a preemption allows.
_ASK_EVERY = 8


@contextlib.contextmanager
def lock(workdir):
  """Holds the run folder for this process; the system frees it on any exit.

  On an object store (gs://…) that is a lease, see `lease`.

  Raises: ValueError if another process holds it.
  """
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if not store.is_local(workdir):
    with lease.held(workdir / ".lock"):
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
  """Set by a signal; the loop saves and leaves at the next step.

  Of several processes, all are set at the step where `agreed` finds that one
  has a signal, and none before: they would wait for one another forever.
  """

  def __init__(self):
    self.signal = None
    self._own = 0  # signal of this process; 0 without one
    self._asked = 0  # step of the last question to all
    self._at_once = False

  def __bool__(self):
    return self.signal is not None

  @property
  def exit_code(self):
    """EXIT_INTERRUPTED after Ctrl-C, else EXIT_REQUEUE."""
    return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_REQUEUE

  @contextlib.contextmanager
  def at_once(self):
    """A signal inside raises Stopped there: there is nothing to save yet."""
    self._at_once = True
    try:
      yield
    finally:
      self._at_once = False

  def agreed(self, step, *, last):
    """Whether all processes stop after `step`; each must ask at the same ones.

    Args:
      step: number of steps done.
      last: nothing follows, so a signal counts now or never.
    """
    due = last or step // _ASK_EVERY > self._asked // _ASK_EVERY
    if jax.process_count() > 1 and self.signal is None and due:
      self._asked = step
      self.signal = processes.largest(self._own) or None
    return bool(self)

  def set(self, number):
    """Takes signal `number`.

    Raises: Stopped inside `at_once`, of a process alone.
    """
    self._own = number
    if jax.process_count() > 1:
      return
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
  """Yields a Stop raised by SIGINT, SIGTERM, SIGHUP or SIGUSR2.

  A SIGHUP that is ignored stays so: `nohup` asked for it. A second signal
  takes its usual effect at once. Outside the main thread (where Python has no
  signals) the Stop is never raised.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signals.append(signal.SIGHUP)
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


def first_step(metrics, first, limit):
  """A line about a run's first step, where policy = reference.

  Args:
    metrics: of the step, taken before its update: "loss"; and
      "rewards/largest" and "drift/largest", the largest |reward| and |Δ|,
      which would be 0 but for rounding: the noise floor of this dtype, mesh
      and reference.
    first: of algos.base.Algorithm, with its hparams bound; or None.
    limit: of the rewards.
  Raises: ValueError if rewards or loss are further off.
  """
  noise, loss = float(metrics["rewards/largest"]), float(metrics["loss"])
  if noise == -math.inf:  # the largest of none
    return "step 0: no comparison counts"
  if not noise <= limit:
    raise ValueError(
      f"at step 0 policy and reference differ by rewards of up to {noise:.3g}, "
      f"more than train.max_noise = {limit}: is the reference another model, "
      "or of another precision? If this is the rounding of your dtype, raise "
      "train.max_noise"
    )
  line = f"step 0: rewards within {noise:.2g} of 0 (policy = reference), loss "
  bounds = first and first(float(metrics["drift/largest"]))
  if bounds is None:
    return f"{line}{loss:.6g}"
  low, expected, high = bounds
  slack = 1e-3 * max(1.0, abs(expected))
  if not low - slack <= loss <= high + slack:
    raise ValueError(
      f"at step 0 the loss is {loss:.6g}, where policy = reference gives "
      f"{expected:.6g}: it does not see the rewards that are logged"
    )
  return f"{line}{loss:.6g} ({expected:.6g} without rounding)"


def reference_is(params, fingerprint):
  """Raises RuntimeError if the fingerprint of a reference is another now."""
  changed = [
    path
    for path, value in state_lib.fingerprint(params).items()
    if fingerprint.get(path) != value
  ]
  if changed:
    raise RuntimeError(
      f"the reference changed during the run, in {changed[0]} and "
      f"{len(changed) - 1} more: nothing writes to it, so suspect the memory; "
      "the last checkpoint is kept"
    )
