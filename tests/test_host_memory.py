import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
  not sys.platform.startswith("linux"), reason="glibc's allocator"
)

KEEP = "from dpo_jax import host; assert host.keep_pages()"


def run(code):
  return subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  ).stdout.split()


@pytest.mark.parametrize("keep", [True, False])
def test_memory_beyond_the_largest_threshold_of_glibc_stays(keep):
  """It can be no more than 2 GiB, less than a step of a small model takes."""
  code = f"""
import ctypes
{KEEP if keep else ""}
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(3 * 2**30)  # addresses: nothing is written
before = libc.sbrk(0)
libc.free(block)
inside = block < before  # of the heap, not a mapping that free takes away
print(inside and libc.sbrk(0) == before)
"""
  assert run(code) == [str(keep)]


def test_what_is_allocated_asks_for_large_pages():
  """Whether there are any is the kernel's to say: it marks what asked, hg."""
  smaps = pathlib.Path("/proc/self/smaps")
  if not smaps.exists() or "VmFlags" not in smaps.read_text():
    pytest.skip("this kernel does not say what asked for large pages")
  modes = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if not modes.exists():
    pytest.skip("this kernel has no large pages")
  code = f"""
import pathlib
{KEEP}
import numpy as np
array = np.ones(2**23)  # 64 MiB
for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
  head = line.split()[0]
  if "-" in head and ":" not in head:
    start, end = (int(x, 16) for x in head.split("-"))
  elif head == "VmFlags:" and start <= array.ctypes.data < end:
    print("hg" in line.split())
"""
  assert run(code) == ["True"]
