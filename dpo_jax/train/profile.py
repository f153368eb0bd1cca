"""A trace of a few steps, for TensorBoard or Perfetto."""

import jax
from etils import epath

_FIRST, _LAST = 3, 5  # steps of the run from its start; the first compiles


class Profile:
  """Traces steps 3 to 5 after the start of a run, into its folder.

  Where fewer are left, the last.
  """

  def __init__(self, workdir, start, total, say, *, wanted):
    """Args:
    start, total: the step that the run starts from, and the last.
    say: takes a line for the console.
    wanted: whether to trace at all.
    """
    self._folder = epath.Path(workdir) / "profile"
    self._first = min(start + _FIRST, total)
    self._last = min(start + _LAST, total)
    self._say, self._wanted, self._running = say, wanted, False

  def before(self, number):
    """Called before step `number` is dispatched, counted from 1."""
    if self._wanted and number == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, number, state):
    """Called with what step `number` returned, ready or not."""
    if self._running and number == self._last:
      jax.block_until_ready(state)
      self.close()

  def close(self):
    """Ends the trace, if it runs."""
    if not self._running:
      return
    self._running = False
    jax.profiler.stop_trace()
    self._say(
      f"profile in {self._folder}: tensorboard --logdir {self._folder.parent}, "
      "or open its .trace.json.gz at ui.perfetto.dev"
    )
