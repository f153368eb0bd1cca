"""Direct Preference Optimization in JAX/Flax.

The names a notebook needs, imported when first used.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
  "ALGOS": "dpo_jax.algos",
  "ATTENTION": "dpo_jax.ops.attention",
  "LOSSES": "dpo_jax.ops.losses",
  "SCORERS": "dpo_jax.eval.rewards",
  "Terms": "dpo_jax.algos.base",
  "batches": "dpo_jax.notebook",
  "build": "dpo_jax.notebook",
  "evaluate": "dpo_jax.notebook",
  "fit": "dpo_jax.loop",
  "load_config": "dpo_jax.config.load",
  "load_run": "dpo_jax.notebook",
  "objective": "dpo_jax.notebook",
  "parallelize": "dpo_jax.notebook",
  "report": "dpo_jax.report",  # itself: it can be called
  "sample": "dpo_jax.notebook",
  "sweep": "dpo_jax.notebook",
  "train_step": "dpo_jax.notebook",
}

__all__ = sorted(_NAMES)


def __getattr__(name):
  if name not in _NAMES:
    raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
  module = importlib.import_module(_NAMES[name])
  return module if name == "report" else getattr(module, name)


def __dir__():
  return sorted({*globals(), *_NAMES} - {"importlib"})
