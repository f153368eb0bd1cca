"""Direct Preference Optimization in JAX/Flax.

The names a notebook needs, imported when first used.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
  "ALGOS": "dpo_jax.algos",
  "ATTENTION": "dpo_jax.ops.attention",
  "LOSSES": "dpo_jax.ops.losses",
  "Terms": "dpo_jax.algos.base",
  "batches": "dpo_jax.notebook",
  "build": "dpo_jax.notebook",
  "fit": "dpo_jax.loop",
  "load_config": "dpo_jax.config.load",
  "objective": "dpo_jax.notebook",
  "parallelize": "dpo_jax.notebook",
  "sweep": "dpo_jax.sweeps",
  "train_step": "dpo_jax.notebook",
}

__all__ = sorted(_NAMES)


def __getattr__(name):
  if name not in _NAMES:
    raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_NAMES[name]), name)
