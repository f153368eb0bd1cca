"""How far a pass over many records is: rate and ETA."""

import sys
import time

_QUIET = 2.0  # seconds: what takes less says nothing


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )


class Progress:
  """A passing line on a terminal; elsewhere a line every ten seconds."""

  def __init__(self, what, total, loud):
    """Args:
    what: is done, for example "tokenised".
    total: records, roughly; None if nobody knows.
    loud: whether to print; one process does.
    """
    self._what, self._total, self._loud = what, total, loud
    self._live = loud and sys.stdout.isatty()
    self._begin = self._shown = time.monotonic()
    self._done = 0

  def add(self, count):
    """So many records more are done."""
    self._done += count
    now = time.monotonic()
    pause = 0.2 if self._live else 10
    early = now - self._begin < _QUIET
    if not self._loud or early or now - self._shown < pause:
      return
    self._shown, rate = now, self._done / (now - self._begin)
    text = f"{self._what} {self._done:,}"
    if self._total is not None:
      text += f"/{self._total:,}"
    text += f"  {rate:,.0f} records/s"
    if self._total is not None:
      left = max(0, self._total - self._done) / rate
      text += f"  ETA {_duration(left)}"
    if self._live:
      print(f"\r\x1b[K{text}", end="", flush=True)
    else:
      print(text, flush=True)

  def end(self):
    """The last line stays."""
    seconds = time.monotonic() - self._begin
    if not self._loud or seconds < _QUIET:
      return
    rate = self._done / seconds
    text = f"{self._what}: {self._done:,} records in {_duration(seconds)}"
    text += f", {rate:,.0f} records/s"
    print(f"\r\x1b[K{text}" if self._live else text, flush=True)
