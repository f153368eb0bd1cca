"""A chat template may not go on for ever: template_time.py, in a process.

An exception that is raised in a thread from outside leaves a mark in the
interpreter, and the profiler of JAX does not end in such a process.
"""

import subprocess
import sys

from tests import conftest


def test_a_template_is_ended_in_every_thread_and_nothing_comes_after():
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "tests/security/template_time.py"],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stdout
  assert " passed" in done.stdout
