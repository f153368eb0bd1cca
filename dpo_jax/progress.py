"""How far something is that takes long: a passing line, or lines in a file."""

import sys

import tqdm

detailed = False  # whether lines have our own terms too: `--verbose`
_SHOWN = 1e-9  # seconds: a bar without a delay shows itself before it begins


def duration(seconds):
  """`1:02:03` or `2:03`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )


class _Lines:
  """A file that makes lines of what would pass."""

  def write(self, text):
    if text := text.strip():
      print(text)

  def flush(self):
    sys.stdout.flush()


def over(
  items, total, what, *, unit="", size=lambda item: 1, quiet=0.0, loud=True
):
  """Yields `items`, showing how many of `total` are done, and how fast.

  A passing line on a terminal; elsewhere a line every ten seconds. The last
  line stays and tells the time.

  Args:
    items: iterable.
    total: of their sizes, roughly; None if nobody knows.
    what: is done, for example "tokenised".
    unit: what is counted, for example "records".
    size: item -> how many of them it is.
    quiet: seconds; what takes less says nothing.
    loud: whether to print; one process does.
  """
  live, unit = sys.stdout.isatty(), f" {unit}".rstrip()
  shown = "{desc} {n:,}  {rate_noinv_fmt}"
  if total is not None:
    begin = "{l_bar}{bar}| " if live else "{desc} "
    shown = begin + "{n:,}/{total:,}  {rate_noinv_fmt}  ETA {remaining}"
  with tqdm.tqdm(
    *(None, what, total),
    disable=not loud,
    file=sys.stdout if live else _Lines(),
    bar_format=shown,
    unit=unit,
    delay=max(quiet, _SHOWN),
    mininterval=0.2 if live else 10,
    miniters=1,
    smoothing=0,  # the mean rate, from the start
    dynamic_ncols=True,
    leave=False,
  ) as bar:
    for item in items:
      yield item
      bar.update(size(item))
    seconds = bar.format_dict["elapsed"]
  if loud and seconds >= quiet:
    rate = bar.n / max(seconds, _SHOWN)
    rate = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    took = f"in {duration(seconds)}, {rate}{unit}/s"
    print(f"{what}: {bar.n:,}{unit} {took}", flush=True)
