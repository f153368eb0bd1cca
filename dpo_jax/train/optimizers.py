"""The optimisers, their fields and constants. Imports no jax."""

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax import lookup


class Kind(NamedTuple):
  """A row of OPTIMIZERS.

  Attributes:
    function: config.optim -> optax transform that ends before the learning
      rate, or where that is: "optim.adamw".
    defaults: {field of config.optim: value}, its learning rate among them.
  """

  function: Callable | str
  defaults: dict

  @property
  def make(self):
    """The function; its file is imported when it is first asked for."""
    return lookup.resolve(self.function, "dpo_jax.train")


# The constants of the DPO paper's appendix B, and of AdamW.
OPTIMIZERS = {
  "rmsprop": Kind(
    "optim.rmsprop",
    {"learning_rate": 1e-6, "decay": 0.99, "eps": 1e-8, "moments": "float32"},
  ),
  "adamw": Kind(
    "optim.adamw",
    {
      "learning_rate": 1e-6,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "weight_decay": 0.0,
      "moments": "float32",  # how they are kept: float32 or bfloat16
    },
  ),
  "sgd": Kind("optim.sgd", {"learning_rate": 1e-2}),
}
# Fields of every optimiser, beside its name and its own.
COMMON = {
  "warmup": 150,  # steps of linear warm-up
  "schedule": "constant",  # after warm-up: constant, linear or cosine
  "clip_norm": 10.0,  # global norm, None: no clipping
  # A norm above so many times the running mean of them is refused; None: none.
  "max_spike": None,
  "freeze": (),  # path regexes of parameters that are not trained
}
