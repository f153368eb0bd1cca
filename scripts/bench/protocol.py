"""The worker's side of the talk with the driver: JSON lines on stdin, stdout.

    worker   {"ready": true, "versions": {…}, "facts": {…}}
    driver   {"cmd": "steps", "n": 2}
    worker   {"seconds": 3.1, "losses": [0.693, 0.671], "peak_bytes": …}
    driver   {"cmd": "stop"}

Only the standard library: every virtual environment reads this file.
"""

import functools
import importlib.metadata
import json
import os
import sys
import time

_BEGIN = time.perf_counter()


class Channel:
  """The talk, from the worker.

  Attributes:
    job: what to do, see inputs.job.
    peak: function to the most memory used so far, in bytes or None.
  """

  def __init__(self):
    """Takes over stdout: what libraries print goes to stderr.

    And binds the process to its CPUs. Make it before any thread starts.
    """
    self._out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with open(sys.argv[1]) as file:
      self.job = json.load(file)
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, self.job["cpus"])
    self.peak = peak_bytes
    self._cpu = 0.0

  def ready(self, packages, **facts):
    """Says that steps may be asked for.

    Args:
      packages: whose versions are reported.
      **facts: plain values, for the results.
    """
    versions = {name: importlib.metadata.version(name) for name in packages}
    self.reply(ready=True, versions=versions, facts=facts)

  def steps(self):
    """Waits for a command; the number of steps asked for.

    Raises: SystemExit when the driver wants no more.
    """
    line = sys.stdin.readline()
    command = json.loads(line) if line else {"cmd": "stop"}
    if command["cmd"] == "stop":
      raise SystemExit(0)
    self._cpu = time.process_time()
    return command["n"]

  def reply(self, **values):
    """Answers with plain values, the peak memory, and the time of all cores.

    That tells a machine that does other work too: it is less than it should be.
    """
    cores = time.process_time() - self._cpu
    said = {**values, "cpu_seconds": cores, "peak_bytes": self.peak()}
    line = json.dumps(said)
    self._out.write(line + "\n")

  def serve(self, run):
    """Answers commands until the end.

    Args:
      run: n -> function without arguments to the losses of n steps, all of
        them done when `run` returns.
    """
    while True:
      count = self.steps()
      begin = time.perf_counter()
      losses = run(count)
      seconds = time.perf_counter() - begin
      self.reply(seconds=seconds, losses=losses())


class Parts:
  """Seconds that functions take, by name; calls within others count twice."""

  def __init__(self):
    self._seconds = {}

  def of(self, name, fn):
    """`fn`, whose time goes under a name."""

    @functools.wraps(fn)
    def timed(*args, **kwargs):
      begin = time.perf_counter()
      try:
        return fn(*args, **kwargs)
      finally:
        spent = time.perf_counter() - begin
        self._seconds[name] = self._seconds.get(name, 0.0) + spent

    return timed

  def take(self):
    """{name: seconds} since it was asked last."""
    taken, self._seconds = self._seconds, {}
    return taken


class Scores:
  """The reward of all systems: the share of even ids among the words drawn.

  Attributes:
    means: of each batch that was scored.
  """

  def __init__(self, job):
    self._count, self.means = job["max_completion"], []

  def __call__(self, prompts, completions, **_):
    """One number a completion.

    Raises: ValueError where much less was drawn than was asked for: an end
      comes by chance once in a vocabulary.
    """
    words = [text.split() for text in completions]
    drawn, wanted = sum(map(len, words)), self._count * len(words)
    # Ours tries a scorer on texts of one token first.
    if len(words) < drawn < 0.9 * wanted:
      raise ValueError(f"{drawn} tokens were drawn, of {wanted}")
    scores = [
      sum(int(word) % 2 == 0 for word in line) / self._count for line in words
    ]
    self.means.append(sum(scores) / len(scores))
    return scores


def note(text):
  """A line in the worker's log, which is shown if it fails."""
  print(f"{time.perf_counter() - _BEGIN:6.1f} s  {text}", file=sys.stderr)


def peak_bytes():
  """The most memory this process has held; None where the system hides it."""
  try:
    with open("/proc/self/status") as file:
      found = [line for line in file if line.startswith("VmHWM:")]
  except OSError:
    return None
  return int(found[0].split()[1]) * 1024


def read_examples(path):
  """[(prompt ids, chosen ids, rejected ids)] of a file of inputs.make."""
  with open(path) as file:
    rows = [json.loads(line) for line in file]
  end = [0]  # inputs.EOS
  return [
    (
      [int(token) for token in row["prompt"].split()],
      [int(token) for token in row["chosen"].split()] + end,
      [int(token) for token in row["rejected"].split()] + end,
    )
    for row in rows
  ]


def batches(job):
  """Yields the examples of each step, in the order of all systems."""
  examples = read_examples(job["in_order"])
  for start in range(0, len(examples), job["batch"]):
    yield examples[start : start + job["batch"]]
