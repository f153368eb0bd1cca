"""What all processes agree on before any of them acts."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def largest(value):
  """The largest of the integers that all processes give; waits for them all.

  One process alone has its own back, without a collective.
  """
  if jax.process_count() == 1:
    return int(value)
  given = multihost_utils.process_allgather(np.int32(value))
  return int(np.max(given))
