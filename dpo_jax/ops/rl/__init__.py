"""Policy gradients: what each loss of rollouts is, before it computes anything.

An estimator turns the rewards of sampled completions, token by token, into
advantages; the clipped loss behind them is one, see `losses`. A numeric field
of `config.loss` is a row's, a text field is static. Imports no jax.
"""

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax import lookup
from dpo_jax.ops import losses as preference
from dpo_jax.ops.losses import facts

# How the terms of tokens become that of the loss, see `losses.averaged`.
AVERAGES = ("tokens", "sums", "means")
WHITENED = ("none", "advantages", "rewards", "both")


class Estimator(NamedTuple):
  """A row of ESTIMATORS.

  Attributes:
    function: f(rewards, mask, …) -> (advantages, returns), f32[B, K, N] each,
      see `advantages`; or where it is.
    defaults: {field of config.loss: its source's value}.
    critic: whether it reads the values of a critic.
    group: whether a completion is compared with others of its prompt.
    texts: {text field: what it may be}, beside those of all.
  """

  function: Callable | str
  defaults: dict
  critic: bool = False
  group: bool = False
  texts: dict = {}  # noqa: RUF012 - a constant

  @property
  def fn(self):
    """The function; its file is imported when it is first asked for."""
    return lookup.resolve(self.function, "dpo_jax.ops.rl")


ESTIMATORS = {
  "ppo": Estimator(
    "advantages.gae",
    {
      "beta": 0.05,
      "clip": 0.2,
      "entropy_weight": 0.0,
      "average": "tokens",
      "whiten": "advantages",
      "gamma": 1.0,
      "lam": 0.95,
      "value_lam": 0.95,
      "value_clip": 0.2,
      "value_weight": 0.1,
    },
    critic=True,
  ),
  "reinforce": Estimator(
    "advantages.reinforce",
    {
      "beta": 0.05,
      "clip": 0.2,
      "entropy_weight": 0.0,
      "average": "sums",
      "whiten": "advantages",
      "gamma": 1.0,
    },
  ),
  "rloo": Estimator(
    "advantages.rloo",
    {
      "beta": 0.05,
      "clip": 0.2,
      "entropy_weight": 0.0,
      "average": "sums",
      "whiten": "none",
    },
    group=True,
  ),
  "grpo": Estimator(
    "advantages.grpo",
    {
      "beta": 0.04,
      "clip": 0.2,
      "entropy_weight": 0.0,
      "average": "means",
      "whiten": "none",
      "scale": "std",
    },
    group=True,
    texts={"scale": ("std", "none")},
  ),
}

_SHARE = facts.SHARE
_RANGES = {
  "beta": (facts.AT_LEAST_ZERO,),
  "clip": (facts.ABOVE_ZERO,),
  "entropy_weight": (facts.AT_LEAST_ZERO,),
  "gamma": _SHARE,
  "lam": _SHARE,
  "value_lam": _SHARE,
  "value_clip": (facts.ABOVE_ZERO,),
  "value_weight": (facts.ABOVE_ZERO,),
}


def check(fields):
  """The Estimator that config.loss names; its fields are checked.

  Args:
    fields: config.loss as plain values.
  Raises: ValueError for what no run can have.
  """
  known = {**ESTIMATORS, **dict.fromkeys(preference.LOSSES)}
  row = lookup.lookup(known, fields["name"], "loss.name")
  if row is None:
    raise ValueError(
      f"loss.name = {fields['name']!r} compares completions that are there; "
      f"of rollouts there are {', '.join(ESTIMATORS)} (algo = 'online' samples "
      "pairs for it)"
    )
  takes = {"name", *row.defaults}
  if set(fields) != takes:
    raise ValueError(
      f"config.loss has the fields {sorted(set(fields) - {'name'})}, but "
      f"{fields['name']!r} takes {sorted(row.defaults)}; select it by the "
      f"config's argument: --config ppo:loss={fields['name']}"
    )
  texts = {"average": AVERAGES, "whiten": WHITENED, **row.texts}
  for name, allowed in texts.items():
    lookup.lookup(allowed, fields[name], f"loss.{name}")
  for name, bounds in _RANGES.items():
    for bound in bounds if name in fields else ():
      if not bound.holds(fields[name]):
        raise ValueError(f"loss.{name} = {fields[name]}{bound.words}")
  return row
