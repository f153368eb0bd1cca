"""Metrics as JSON lines and on the console: progress, ETA, speed, MFU."""

import contextlib
import functools
import json
import os
import sys
import time
import timeit

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import lines, progress, store
from dpo_jax.train import compiles

# Peak bf16 matmul FLOP/s of one device, by a part of its device_kind.
PEAK_FLOPS = (
  ("H200", 989e12),
  ("H100", 989e12),
  ("A100", 312e12),
  ("TPU v6 lite", 918e12),
  ("TPU v5p", 459e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
)


# Of a line of metrics.jsonl, what no other run has the same: speeds, seconds
# since this start of the run, and those since 1970.
TIMED = frozenset(
  {"tokens_per_second", "steps_per_second", "mfu", "elapsed", "wall_time"}
)

# What the console shows of the metrics; metrics.jsonl has all.
_METRICS = {
  "loss": "loss",
  "rewards/margins": "margin",
  "rewards/accuracies": "accuracy",
  "logps/chosen": "chosen",
  "logps/rejected": "rejected",
  "objective/scores": "score",
  "objective/kl": "kl",
  "objective/length": "length",
  "objective/ended": "ended",
}
_STEP = {"grad_norm": "grad", "learning_rate": "lr"}
_EVALUATION = {
  **_METRICS,
  "drift/displaced": "displaced",
  "calibration_error": "calibration error",
}


def _shown(values, names):
  """What there is of `names`; metrics that nothing had weight for are NaN."""
  return [
    f"{short} {values[key]:.4g}"
    for key, short in names.items()
    if key in values and (key == "loss" or not np.isnan(values[key]))
  ]


@functools.cache
def peak_flops():
  """(FLOP/s of all devices, whose): the maker's figure, or a measured matmul.

  Fake CPU devices share one processor, so there the measurement counts once.
  It is taken once: the runs of a sweep are shares of one and the same.
  """
  devices = jax.devices()
  for part, peak in PEAK_FLOPS:
    if part in devices[0].device_kind:
      return peak * len(devices), "of the maker's bf16 peak"
  size, matmul = 1024, jax.jit(jnp.dot)
  x = jnp.ones((size, size), jnp.float32)
  # The first call compiles; the others take about as long as one another.
  times = timeit.repeat(lambda: matmul(x, x).block_until_ready(), number=1)
  count = 1 if devices[0].platform == "cpu" else len(devices)
  return count * 2 * size**3 / min(times), "of this machine's f32 matmul"


def _there(metrics):
  """Whether nothing has to be waited for."""
  return all(
    isinstance(x, jax.Array) and x.is_ready() for x in metrics.values()
  )


class Logger:
  """Writes metrics.jsonl and the console.

  A step's metrics stay on the device until the next logged step, so logging
  never waits for the step that was just dispatched.
  """

  def __init__(
    self, workdir, *, every, total, start, loud=True, name="", trackers=()
  ):
    """Args:
    workdir: run folder; metrics.jsonl is appended to.
    every: steps between log lines.
    total, start: last step and the step to start from.
    loud: whether to print; one process does.
    name: before every line of metrics, where several runs share the console.
    trackers: of train.trackers; get what metrics.jsonl gets.
    """
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._lines = lines.Writer(self._path)
    self._every, self._total, self._start = every, total, start
    self._loud, self._name, self._trackers = loud, name, trackers
    self._live = loud and sys.stdout.isatty()
    self._bar = None  # in the cell of a notebook, from the first step on
    self._peak, self._peak_is = peak_flops() if loud else (1.0, "")
    self._opened = time.perf_counter()
    self._paused = 0.0  # seconds that training did not run, or compile
    self._pending = None  # (number, metrics, stats) of a step to be logged
    # (time, number, tokens, flops) when the last one was logged
    self._clock = None
    self._begin = None  # (time, number) after the first step
    self._tokens = self._flops = 0
    self._refused = {}  # {metric: count} of updates, in the last line
    self.unwritten = 0  # lines that a full disk did not take
    if loud:
      self._drop_later_than(start)
    if start:
      self.say(f"{name}resumed at step {start}")

  def _now(self):
    """Seconds of training: batches of a new shape compile, which is none."""
    return time.perf_counter() - self._paused - compiles.seconds()

  @contextlib.contextmanager
  def paused(self):
    """Evaluation and saving inside do not count as training time."""
    start = self._now()
    yield
    self._paused += self._now() - start

  def say(self, text):
    """A line on the console."""
    if self._bar is not None:
      self._bar.write(text)
    elif self._loud:
      self._print(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")

  def status(self, text):
    """A passing line on a terminal, gone with the next one."""
    if self._live:
      self._print(f"\r\x1b[K{text}")

  def _print(self, text):
    """A reader that went away (`| head`) must not stop the training."""
    try:
      sys.stdout.write(text)
      sys.stdout.flush()
    except (OSError, ValueError):
      self._live = False
      sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end

  def step(self, number, metrics, stats, flops):
    """Takes the (device) metrics of step `number`, counted from 1.

    Args:
      stats: data.batch.loader.Stats of the batch.
      flops: needed FLOPs of the step.
    Returns: what `flush` does, for a step before this one; or for this one, if
      its metrics are there already.
    """
    logged = self.flush()
    if self._begin is None:
      # The first step compiles: the clock starts after it.
      jax.block_until_ready(metrics)
      self._begin = self._now(), number
      self._clock = *self._begin, 0, 0
      if self._loud:
        self._bar = progress.bar(self._total, number, self._name)
    else:
      self._tokens += stats.tokens
      self._flops += flops
    if self._bar is not None:
      self._bar.update(number - self._bar.n)
    self.status(self._line(number))
    if number % self._every == 0 or number in (self._start + 1, self._total):
      counts = self._tokens, self._flops
      self._pending = number, metrics, stats, counts
      if logged is None and _there(metrics):  # its time ends now
        logged = self.flush()
    return logged

  def flush(self):
    """Logs the step that is waiting, if one is; returns its values."""
    if self._pending is None:
      return None
    number, metrics, stats, counts = self._pending
    self._pending = None
    values = {k: float(np.asarray(v)) for k, v in metrics.items()}
    values["fill"] = stats.fill
    before, last, tokens, flops = self._clock
    now = self._now()
    if number > last:
      if self._peak_is and not self._name:
        self.say(f"mfu: needed FLOP/s as a share {self._peak_is}")
        self._peak_is = ""
      seconds = max(now - before, 1e-6)  # JAX tells of compiles by its clock
      values["steps_per_second"] = (number - last) / seconds
      values["tokens_per_second"] = (counts[0] - tokens) / seconds
      values["mfu"] = (counts[1] - flops) / seconds / self._peak
    self._clock = now, number, *counts
    self.write("train", number, values)
    parts = _shown(values, {**_METRICS, **_STEP})
    parts += self._refused_since(values)
    if "tokens_per_second" in values:
      parts.append(f"{values['steps_per_second']:.3g} steps/s")
      parts.append(f"{values['tokens_per_second']:.0f} tokens/s")
      parts.append(f"mfu {100 * values['mfu']:.0f}%")
    if self._bar is not None:
      self._bar.set_postfix_str("  ".join(parts), refresh=False)
      return values
    elapsed = progress.duration(time.perf_counter() - self._opened)
    at = time.strftime("%H:%M:%S", time.localtime(time.time()))
    parts.append(f"{elapsed} at {at}")
    self.say(f"{self._name}{self._line(number, *parts)}")
    return values

  def _refused_since(self, values):
    """What of the updates since the line before was refused."""
    names = {"skipped/total": "not finite", "skipped/spikes": "spikes"}
    parts = []
    for key, why in names.items():
      count, before = values.get(key, 0), self._refused.get(key, 0)
      self._refused[key] = count
      if count > before:
        parts.append(f"SKIPPED {count - before:.0f} ({why})")
    return parts

  def evaluation(self, number, values):
    """Logs metrics of held-out data after step `number`."""
    self.write("eval", number, values)
    shown = "  ".join(_shown(values, _EVALUATION))
    self.say(f"{self._name}eval at {number}: {shown}")

  def write(self, kind, number, values):
    """Appends one JSON line; one that the disk does not take is counted."""
    # A source that this batch has nothing of is left out.
    absent = {
      k for k in values if k.startswith("source") and np.isnan(values[k])
    }
    values = {k: v for k, v in values.items() if k not in absent}
    values["elapsed"] = time.perf_counter() - self._opened
    values["wall_time"] = time.time()
    if self._loud:
      # JSON has no NaN: what is not finite is null.
      numbers = {k: v if np.isfinite(v) else None for k, v in values.items()}
      row = {"step": number, "kind": kind, **numbers}
      self._append(json.dumps(row) + "\n")
    for tracker in self._trackers:
      tracker.write(kind, number, values)

  def _append(self, line):
    try:
      self._lines.append(line)
    except OSError as error:
      if not self.unwritten:
        reason = error.strerror or error
        self.say(f"{self._path} cannot be written ({reason}); training goes on")
      self.unwritten += 1

  def close(self):
    """Waits until the trackers have written all."""
    if self._bar is not None:
      self._bar.close()
    for tracker in self._trackers:
      tracker.close()

  def _line(self, number, *parts):
    """How far the run is, and when it will be done."""
    done = round(20 * number / max(1, self._total))
    bar = "█" * done + "·" * (20 - done)
    (begin, first), eta = self._begin, "?"
    if number >= self._total:
      eta = progress.duration(0)
    elif number > first:
      rate = (self._now() - begin) / (number - first)
      eta = progress.duration(rate * (self._total - number))
    return "  ".join([f"{bar} {number}/{self._total}", *parts, f"ETA {eta}"])

  def _drop_later_than(self, step):
    """After a resume, lines beyond the checkpoint are written anew."""
    if not lines.exists(self._path):
      return
    kept, damaged = [], []
    found = lines.read(self._path)
    *whole, last = found.split(b"\n")  # it is b"", or cut
    for line in whole:
      number = _step_of(line)
      if number is None and line.strip():
        damaged.append(line)
      elif number is not None and number <= step:
        kept.append(line)
    number = _step_of(last)
    kept += [last] if number is not None and number <= step else []
    try:
      if damaged:
        aside = self._path.parent / "metrics.jsonl.damaged"
        store.write(aside, b"".join(line + b"\n" for line in damaged))
        count = f"{len(damaged)} damaged line{'s' * (len(damaged) > 1)}"
        self.say(f"{self._path}: {count} left out, kept in {aside}")
      content = b"".join(line + b"\n" for line in kept)
      if content != found:
        lines.replace(self._path, content)
    except OSError as error:
      reason = error.strerror or error
      self.say(
        f"{self._path} cannot be written ({reason}): what it has of damaged "
        f"lines, and of steps after {step}, stays there"
      )


def _step_of(line):
  """The step of a line of metrics.jsonl, or None if it is damaged."""
  try:
    number = json.loads(line)["step"]
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return number if type(number) in (int, float) else None
