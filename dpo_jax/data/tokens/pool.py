"""Processes that tokenise, side by side; results come in order.

Each is an interpreter of its own (loky) that imports no JAX and does not run
the user's script: a fork would copy the locks of JAX's threads.
"""

import collections
import contextlib
import functools
import os
import signal
import threading
import time
from multiprocessing import resource_tracker

from dpo_jax.data.tokens import encoding, tokenize

_MOST = 16  # beyond these the parent, which reads the records, is too slow
_AT_ONCE = 2  # parts that a process has: one waits while another is worked on
# What a terminal or a scheduler sends to all of a group: the parent decides.
_OF_PARENT = (
  *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
  *(signal.SIGUSR1, signal.SIGUSR2),
)


def processes():
  """How many are worth starting: one a core that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return min(_MOST, len(os.sched_getaffinity(0)))
  return min(_MOST, os.cpu_count() or 1)


def run(task, parts, count):
  """Yields (items, encoding.Made) of parts, in their order.

  Args:
    task: encoding.Task, whose tokenizer has a name.
    parts: iterable of (items, number of the first record, records); read a few
      ahead.
    count: processes.
  Raises: what `encoding.make` raised, in its place; RuntimeError if a process
    dies. Close the generator to end the processes early.
  """
  import loky  # a tenth of a second, where it takes long anyway

  executor = loky.ProcessPoolExecutor(
    count,
    initializer=_begin,
    initargs=(os.getpid(),),
    env={"TOKENIZERS_PARALLELISM": "false"},  # it takes one core
  )
  waiting = collections.deque()
  try:
    for items, first, records in parts:
      with _without_signals():  # the first one starts the processes
        future = executor.submit(_make, task, first, records)
      waiting.append((items, future))
      if len(waiting) > _AT_ONCE * count:
        items, future = waiting.popleft()
        yield items, future.result()
    while waiting:
      items, future = waiting.popleft()
      yield items, future.result()
  except loky.BrokenProcessPool as error:
    raise RuntimeError(
      "a process that tokenises is gone (out of memory?); run this again"
    ) from error
  finally:
    executor.shutdown(kill_workers=bool(waiting))


@contextlib.contextmanager
def _without_signals():
  """Ctrl-C and others wait; processes that are started here never get them."""
  resource_tracker.ensure_running()  # its start would let them through
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_PARENT)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin(parent):
  """Has a process end with its parent."""

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _make(task, first, records):
  """`encoding.make`, whose errors can be sent."""
  try:
    return encoding.make(task, _tokenizer(task), first, records)
  except ValueError as error:
    raise ValueError(str(error)) from None
  except Exception as error:
    raise RuntimeError(f"{type(error).__name__}: {error}") from None


@functools.cache
def _tokenizer(task):
  return tokenize.load(task.tokenizer)._replace(
    vocab_size=task.vocab_size, other_ends=task.other_ends
  )
