"""Trains in a process whose disk is full: full_disk.py WORKDIR FROM TO FIELD …

From after step FROM until after step TO no byte can be written to a file.
"""

import resource
import signal
import sys

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.run import recorder


def bounded(size):
  """Lets files have so many bytes at most; None is any."""
  most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  limit = most if size is None else size
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


def main(workdir, begin, end, *overrides):
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  step_of = recorder.Recorder.step

  def step(self, number, *args):
    step_of(self, number, *args)
    if number == int(begin):
      bounded(0)
    if number == int(end):
      self._checkpoints._settle()  # what is written meanwhile has failed
      bounded(None)

  recorder.Recorder.step = step
  if int(begin) == 0:
    bounded(0)
  config = load.load_config("configs/dpo.py:smoke", overrides)
  return loop.fit(config, workdir).exit_code


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
