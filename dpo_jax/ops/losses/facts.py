"""What is known of a loss before it computes anything. Imports no jax."""

from collections.abc import Callable
from typing import NamedTuple

from dpo_jax import lookup

_PACKAGE = "dpo_jax.ops.losses"
# What compares scalar rewards and no log-probs, and of which completions.
_OF_REWARDS = {"rewards": "pairs", "reward_rankings": "rankings"}


class Loss(NamedTuple):
  """A row of LOSSES.

  Attributes:
    function: `f(policy_logps, ref_logps, *, ...) -> dict`, or where that is:
      "margin.dpo". "loss" and the metrics are f32[...] per comparison, or
      (values, factors) of the comparison's weight.
    defaults: {field of config.loss: its paper's value}.
    ranges: {field: Bounds}, where they are not those of RANGES.
    needs: names of further arguments, see algos.needs.NEEDS.
    batch_level: the comparisons of a batch are coupled.
    data: what a comparison is made of: "pairs" (winner, loser), "rankings"
      (best to worst), "labels" (one completion with a label), "mismatched" (the
      same, and a completion of another prompt); or of reward models, whose
      losses are `f(rewards, *, …)`: "rewards" (of a pair) or "reward_rankings".
    best_alone: of a comparison it reads the first completion alone, so that in
      a mixture it fits pairs and rankings.
    reference: whether it reads ref_logps.
    dialects: whose formulas its field `dialect` names.
    of_h: of the log-ratios it reads h = Δ_w − Δ_l alone, so that another
      f-divergence may take the place of the reverse KL.
  """

  function: Callable | str
  defaults: dict = {}  # noqa: RUF012 - a constant
  ranges: dict = {}  # noqa: RUF012
  needs: tuple[str, ...] = ()
  batch_level: bool = False
  data: str = "pairs"
  best_alone: bool = False
  reference: bool = True
  dialects: tuple[str, ...] = ()
  of_h: bool = False

  @property
  def fn(self):
    """The function; its file is imported when it is first asked for."""
    return lookup.resolve(self.function, _PACKAGE)

  @property
  def of_rewards(self):
    """Whether it reads the scalar rewards of a reward model."""
    return self.data in _OF_REWARDS

  @property
  def compares(self):
    """`data` whatever is read of it: "pairs", "rankings", …"""
    return _OF_REWARDS.get(self.data, self.data)


class Divergence(NamedTuple):
  """A row of DIVERGENCES.

  Attributes:
    function: s(Δ), or where that is.
    defaults: fields that it adds to config.loss.
  """

  function: Callable | str
  defaults: dict = {}  # noqa: RUF012 - a constant

  @property
  def fn(self):
    """The function, as that of a Loss."""
    return lookup.resolve(self.function, _PACKAGE)


class Mixture(NamedTuple):
  """A row of MIXTURES.

  Attributes:
    terms: "0.8*dpo+0.2*bco".
    defaults: {term: {field: value}} that differ from those of the loss.
  """

  terms: str
  defaults: dict = {}  # noqa: RUF012 - a constant


class Bound(NamedTuple):
  """What a number of config.loss must satisfy.

  Attributes:
    holds: value -> bool.
    words: how a message goes on after "loss.beta = -1.0".
  """

  holds: Callable
  words: str


ABOVE_ZERO = Bound(lambda x: x > 0, " must be above 0")
AT_LEAST_ZERO = Bound(lambda x: x >= 0, " must be at least 0")
AT_MOST_ONE = Bound(lambda x: x <= 1, " must be at most 1")
BELOW_HALF = Bound(lambda x: 0 <= x < 0.5, " must be in [0, 0.5)")
SHARE = (AT_LEAST_ZERO, AT_MOST_ONE)
ANY = ()
