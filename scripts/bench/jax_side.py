"""What the JAX workers share: compile times, and waiting."""

import time

import jax

_LARGE = 0.2  # seconds that XLA takes for a program worth counting
_EVENTS = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class Compilations:
  """Time that JAX spends on compiling in this process, from now on.

  Attributes:
    count: compiled programs, small ones too.
    large: those of more than _LARGE seconds.
  """

  def __init__(self):
    self.count = self.large = 0
    self._spans = []  # (begin, end), none inside another
    jax.monitoring.register_event_duration_secs_listener(self._event)

  def _event(self, name, seconds, **_):
    if name not in _EVENTS:
      return
    if name == _EVENTS[-1]:
      self.count += 1
      self.large += seconds > _LARGE
    end = time.perf_counter()
    begin = end - seconds
    # A trace ends after those of the functions that it calls.
    self._spans = [span for span in self._spans if span[1] <= begin]
    self._spans.append((begin, end))

  @property
  def seconds(self):
    """Of tracing, lowering and XLA together, each moment counted once."""
    return sum(end - begin for begin, end in self._spans)
