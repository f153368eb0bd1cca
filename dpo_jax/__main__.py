"""`python -m dpo_jax` is `dpo-jax`."""

import sys

from dpo_jax import cli

if __name__ == "__main__":
  sys.exit(cli.command())
