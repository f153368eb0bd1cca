"""How far something is that takes long: a passing line, or lines in a file.

In a notebook it is a bar in the cell.
"""

import importlib
import sys
import warnings

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


def in_cell():
  """Whether what is printed shows in the cell of a notebook."""
  if "IPython" not in sys.modules:
    return False
  shell = sys.modules["IPython"].get_ipython()
  return shell is not None and "IPKernelApp" in shell.config


def _bars():
  """tqdm's class of bars for a cell: a widget where there are widgets."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # without ipywidgets it draws a bar of text
    return importlib.import_module("tqdm.auto").tqdm


def bar(total, start, what):
  """A bar for a cell that is moved by hand; None outside a notebook.

  Args:
    total, start: where it ends and where it begins.
    what: stands before it, or "".
  """
  if not in_cell():
    return None
  shown = "{desc}{bar} {n:,}/{total:,}{postfix}  ETA {remaining}"
  options = {"bar_format": shown, "dynamic_ncols": True, "miniters": 1}
  return _bars()(
    desc=what, total=total, initial=start, file=sys.stdout, **options
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

  A passing line on a terminal, a bar in a notebook; elsewhere a line every ten
  seconds. The last line stays and tells the time.

  Args:
    items: iterable.
    total: of their sizes, roughly; None if nobody knows.
    what: is done, for example "tokenised".
    unit: what is counted, for example "records".
    size: item -> how many of them it is.
    quiet: seconds; what takes less says nothing.
    loud: whether to print; one process does.
  """
  cell, unit = in_cell(), f" {unit}".rstrip()
  live = cell or sys.stdout.isatty()
  shown = "{desc} {n:,}  {rate_noinv_fmt}"
  if total is not None:
    begin = "{l_bar}{bar}| " if live else "{desc} "
    shown = begin + "{n:,}/{total:,}  {rate_noinv_fmt}  ETA {remaining}"
  with (_bars() if cell else tqdm.tqdm)(
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
