"""What memory this process takes, and gives back to the system."""

import ctypes
import os
import sys

# Options of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_pages():
  """Keeps freed memory for the next allocation.

  A step frees and allocates the same buffers again. By default glibc returns
  large ones to the system at once, and each then comes back as fresh pages that
  the kernel must clear: on two cores, a fifth to a third of a training step.
  Does nothing where there is no glibc.

  Returns: whether it took effect.
  """
  if not sys.platform.startswith("linux"):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  settings = {
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: 2**31 - 1,
    _TOP_PAD: 2**27,
    _ARENA_MAX: 1,
  }
  return all([mallopt(option, value) for option, value in settings.items()])


def claim_devices():
  """Has JAX take nine tenths of a GPU at the start, where its default is 3/4.

  XLA_PYTHON_CLIENT_MEM_FRACTION sets another share. To be called before JAX is
  imported.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
