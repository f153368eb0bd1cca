"""Benchmarks of dpo_jax and its peers: see scripts/bench/driver.py."""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).parent.parent)  # the checkout

from scripts.bench import driver  # noqa: E402 - it is found there

if __name__ == "__main__":
  sys.exit(driver.main())
