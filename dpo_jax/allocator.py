"""What memory this process takes, and gives back to the system."""

import ctypes
import os
import sys

# Options of glibc's mallopt (malloc.h), and Linux's MADV_HUGEPAGE.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_MADV_HUGEPAGE = 14
_LARGE_PAGE = 2**21


def keep_pages():
  """Keeps freed memory for the next allocation, in large pages.

  A step frees and allocates the same buffers again. By default glibc returns
  large ones to the system at once, and each then comes back as fresh pages that
  the kernel must clear: on two cores, a fifth to a third of a training step.
  Large pages are fewer to find: a tenth of the rest. Does nothing where there
  is no glibc. To be called before there are other threads.

  Returns: whether it took effect.
  """
  if not sys.platform.startswith("linux"):
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return False
  settings = {
    _MMAP_MAX: 0,
    _TRIM_THRESHOLD: _NEVER,
    _TOP_PAD: 2**27,
    _ARENA_MAX: 1,
  }
  if not all([libc.mallopt(*setting) for setting in settings.items()]):
    return False
  _ask_for_large_pages(libc)
  return True


def _ask_for_large_pages(libc):
  """Has the kernel back the heap to come by pages of 2 MiB, if it would.

  The heap grows by three quarters of the machine's memory and is free again:
  addresses, which take no memory until they are written to.
  """
  libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  size = memory // 4 * 3 // _LARGE_PAGE * _LARGE_PAGE
  start = libc.malloc(size)
  if start is None:  # a limit on addresses
    return
  first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
  libc.madvise(first, size - _LARGE_PAGE, _MADV_HUGEPAGE)
  libc.free(start)


def claim_devices():
  """Has JAX take nine tenths of a GPU at the start, where its default is 3/4.

  XLA_PYTHON_CLIENT_MEM_FRACTION sets another share. To be called before JAX is
  imported.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
