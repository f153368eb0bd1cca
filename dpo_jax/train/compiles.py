"""How long this process has compiled, as JAX tells it."""

import functools
import time

import jax

_PREFIX = "/jax/core/compile/"  # of tracing, lowering and compiling
_spans = []  # (start, end) of what was told, apart and in order


def seconds():
  """Seconds that were spent on compiling since this was first asked."""
  _listen()
  return sum(end - start for start, end in _spans)


@functools.cache
def _listen():
  jax.monitoring.register_event_duration_secs_listener(told)


def told(event, duration, **_):
  """Takes an event of JAX, at its end; it may hold others, told before."""
  if not event.startswith(_PREFIX):
    return
  end = time.perf_counter()
  start = end - duration
  while _spans and _spans[-1][0] >= start:
    _spans.pop()
  if _spans:
    start = max(start, _spans[-1][1])
  _spans.append((start, max(start, end)))
