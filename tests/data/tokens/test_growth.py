"""The script that measures how time and memory grow."""

import subprocess
import sys

import pytest

from tests import conftest


@pytest.mark.slow  # a process with JAX for each number
def test_the_growth_of_data_is_a_table(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, str(conftest.ROOT / "scripts/growth.py"), "data"),
      *("--sizes", "40", "80", "--folder", str(tmp_path)),
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  *_, names, rule, small, large = done.stdout.splitlines()
  assert names.startswith("| comparisons |")
  assert set(rule) == set("|-:")
  assert small.startswith("| 40 |")
  assert large.startswith("| 80 |")
  assert {line.count("|") for line in (names, small, large)} == {11}
  assert list(tmp_path.iterdir()) == []
