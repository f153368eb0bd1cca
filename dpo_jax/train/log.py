"""Metrics as JSON lines and on the console: progress, ETA, tokens/s, MFU."""

import contextlib
import json
import os
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import progress

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


# What the console shows of the metrics; metrics.jsonl has all.
_METRICS = {
  "loss": "loss",
  "rewards/margins": "margin",
  "rewards/accuracies": "accuracy",
  "logps/chosen": "chosen",
  "logps/rejected": "rejected",
}
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


def peak_flops():
  """(FLOP/s of all devices, whose): the maker's figure, or a measured matmul.

  Fake CPU devices share one processor, so there the measurement counts once.
  """
  devices = jax.devices()
  for part, peak in PEAK_FLOPS:
    if part in devices[0].device_kind:
      return peak * len(devices), "of the maker's bf16 peak"
  size, repeats = 1024, 4
  x = jnp.ones((size, size), jnp.float32)
  matmul = jax.jit(jnp.dot)
  matmul(x, x).block_until_ready()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    matmul(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
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
    self._every, self._total, self._start = every, total, start
    self._loud, self._name, self._trackers = loud, name, trackers
    self._live = loud and sys.stdout.isatty()
    self._peak, self._peak_is = peak_flops() if loud else (1.0, "")
    self._paused = 0.0  # seconds that training did not run
    self._pending = None  # (number, metrics, stats) of a step to be logged
    self._clock = None  # (time, tokens, flops) when the last one was logged
    self._begin = None  # (time, number) after the first step
    self._tokens = self._flops = 0
    if loud:
      self._drop_later_than(start)

  def _now(self):
    return time.perf_counter() - self._paused

  @contextlib.contextmanager
  def paused(self):
    """Evaluation and saving inside do not count as training time."""
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  def say(self, text):
    """A line on the console."""
    if self._loud:
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
      number: steps done.
      metrics: dict of scalar arrays.
      stats: data.loader.Stats of the batch.
      flops: needed FLOPs of the step.
    Returns: what `flush` does, for a step before this one; or for this one, if
      its metrics are there already.
    """
    logged = self.flush()
    if self._begin is None:
      # The first step compiles: the clock starts after it.
      jax.block_until_ready(metrics)
      self._begin = self._now(), number
      self._clock = self._begin[0], 0, 0
    else:
      self._tokens += stats.tokens
      self._flops += flops
    bar = f"{self._bar(number)} {number}/{self._total}"
    self.status(f"{bar}  ETA {self._eta(number)}")
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
    before, tokens, flops = self._clock
    now = self._now()
    if counts[0] > tokens:
      if self._peak_is and not self._name:
        self.say(f"mfu: needed FLOP/s as a share {self._peak_is}")
        self._peak_is = ""
      values["tokens_per_second"] = (counts[0] - tokens) / (now - before)
      values["mfu"] = (counts[1] - flops) / (now - before) / self._peak
    self._clock = (now, *counts)
    self.write("train", number, values)
    self.say(f"{self._name}{self._line(number, values)}")
    return values

  def evaluation(self, number, values):
    """Logs metrics of held-out data after step `number`."""
    self.write("eval", number, values)
    shown = "  ".join(_shown(values, _EVALUATION))
    self.say(f"{self._name}eval at {number}: {shown}")

  def write(self, kind, number, values):
    """Appends one JSON line."""
    # A source that this batch has nothing of is left out.
    values = {
      k: v
      for k, v in values.items()
      if not (k.startswith("source") and np.isnan(v))
    }
    if self._loud:
      # JSON has no NaN: what is not finite is null.
      numbers = {k: v if np.isfinite(v) else None for k, v in values.items()}
      row = {"step": number, "kind": kind, **numbers}
      with self._path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    for tracker in self._trackers:
      tracker.write(kind, number, values)

  def close(self):
    """Waits until the trackers have written all."""
    for tracker in self._trackers:
      tracker.close()

  def _bar(self, number):
    done = round(20 * number / max(1, self._total))
    return "█" * done + "·" * (20 - done)

  def _eta(self, number):
    begin, first = self._begin
    if number <= first:
      return "?"
    rate = (self._now() - begin) / (number - first)
    return progress.duration(rate * (self._total - number))

  def _line(self, number, values):
    parts = [f"{self._bar(number)} {number}/{self._total}"]
    parts += _shown(values, {**_METRICS, "grad_norm": "grad"})
    if values.get("skipped"):
      parts.append(f"SKIPPED {values['skipped']:.0f} (not finite)")
    if "tokens_per_second" in values:
      parts.append(f"{values['tokens_per_second']:.0f} tokens/s")
      parts.append(f"mfu {100 * values['mfu']:.0f}%")
    parts.append(f"ETA {self._eta(number)}")
    return "  ".join(parts)

  def _drop_later_than(self, step):
    """After a resume, lines beyond the checkpoint are written anew."""
    if not self._path.exists():
      return
    kept, damaged = [], 0
    for line in self._path.read_bytes().splitlines():
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line.decode())
      except (ValueError, KeyError, TypeError):
        damaged += 1
    if damaged > 1:  # a kill cuts one short
      text = f"{self._path}: {damaged} damaged lines were left out"
      warnings.warn(text, stacklevel=2)
    whole = self._path.parent / "metrics.jsonl.new"
    whole.write_text("".join(f"{line}\n" for line in kept))
    whole.replace(self._path)
