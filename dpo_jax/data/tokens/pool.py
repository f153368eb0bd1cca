"""Processes that tokenise, side by side; results come in order.

Each is an interpreter of its own that imports no JAX and talks through a
socket: a fork would copy the locks of JAX's threads, and `multiprocessing`
would run the user's script once more in every process. They end when their
input does, so none outlives a parent that was killed.
"""

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import threading

from dpo_jax.data.tokens import encoding, tokenize

_MOST = 16  # beyond these the parent, which reads the records, is too slow
_AT_ONCE = 2  # parts that a process has: one waits while another is worked on
_LENGTH = struct.Struct("<Q")  # of the message that follows, in bytes


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
  free, workers = queue.SimpleQueue(), []
  threads = concurrent.futures.ThreadPoolExecutor(_AT_ONCE * count)

  def made(*part):
    worker = free.get()
    try:
      return worker(part)
    finally:
      free.put(worker)

  waiting = collections.deque()
  try:
    workers += [_Worker(task) for _ in range(count)]
    for worker in _AT_ONCE * workers:
      free.put(worker)
    for items, first, records in parts:
      waiting.append((items, threads.submit(made, first, records)))
      if len(waiting) > _AT_ONCE * count:
        items, result = waiting.popleft()
        yield items, result.result()
    while waiting:
      items, result = waiting.popleft()
      yield items, result.result()
  finally:
    for worker in workers:  # whose answers the threads wait for
      worker.kill()
    threads.shutdown(cancel_futures=True)
    for worker in workers:
      worker.close()


class _Worker:
  """A process; calling it, from any thread, is one request and its answer."""

  def __init__(self, task):
    self._socket, theirs = socket.socketpair()
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-m", "dpo_jax.data.tokens.pool"],
        stdin=theirs,
        process_group=0,  # Ctrl-C and a scheduler's signals are the parent's
        # It finds what this one would, and takes one core.
        env={
          **os.environ,
          "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
          "TOKENIZERS_PARALLELISM": "false",
        },
      )
    self._requests, self._answers = threading.Lock(), threading.Lock()
    self._first = [task]

  def __call__(self, part):
    try:
      with self._requests:
        while self._first:
          _send(self._socket, self._first.pop())
        _send(self._socket, part)
        self._answers.acquire()  # so that answers are taken in their order
      try:
        good, made = _receive(self._socket)
      finally:
        self._answers.release()
    except OSError as error:
      raise RuntimeError(
        "a process that tokenises is gone (out of memory?); run this again"
      ) from error
    if not good:
      raise made
    return made

  def kill(self):
    self._process.kill()

  def close(self):
    self._process.wait()
    self._socket.close()


def _send(to, value):
  content = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
  to.sendall(_LENGTH.pack(len(content)))
  to.sendall(content)


def _receive(source):
  """The next message; a ConnectionError, which is an OSError, without one."""
  (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
  return pickle.loads(_exactly(source, length))


def _exactly(source, length):
  content = bytearray(length)
  left = memoryview(content)
  while left:
    # In one call: a thread has to wait for its turn after each.
    done = source.recv_into(left, len(left), socket.MSG_WAITALL)
    if not done:
      raise ConnectionResetError("the other side is gone")
    left = left[done:]
  return content


def main():
  """One of the processes: a Task, then parts until the input ends."""
  parent = socket.socket(fileno=os.dup(sys.stdin.fileno()))
  with parent, contextlib.suppress(ConnectionError):
    _serve(parent)


def _tokenizer(task):
  return tokenize.load(task.tokenizer)._replace(vocab_size=task.vocab_size)


def _serve(parent):
  task, tokenizer = _receive(parent), None
  while True:
    part = _receive(parent)
    try:
      tokenizer = tokenizer or _tokenizer(task)
      answer = True, encoding.make(task, tokenizer, *part)
    except Exception as error:
      answer = False, ValueError(str(error))
      if not isinstance(error, ValueError):
        answer = False, RuntimeError(f"{type(error).__name__}: {error}")
    _send(parent, answer)


if __name__ == "__main__":
  main()
