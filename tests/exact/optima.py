"""Where theory puts the population optimum of every loss, and where it cannot.

A Case trains a loss of LOSSES, without end of data, in the exact world of
`world.py`, and says which policy must come out. `/` in the name of a case
separates the loss from the circumstances in which theory speaks.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special

from tests.exact import world as world_lib

normalised, shifted = world_lib.normalised, world_lib.shifted


class Case(NamedTuple):
  """A loss and its optimum.

  Attributes:
    fields: of config.loss.
    policy: (World, fields) -> f64[X, K] log π of the optimum, in nats.
    world: arguments of world.make.
    free: train log-probs that need not sum to 1.
    kept: (World, fields) -> f64[X], mean reward of the steps before.
    kinked: the loss has no second derivative, and two answers.
    divergence: of DIVERGENCES, and the fields it adds; or None.
  """

  fields: dict
  policy: Callable
  world: dict = {}  # noqa: RUF012 - a constant
  free: bool = False
  kept: Callable | None = None
  kinked: bool = False
  divergence: str | None = None


def rlhf(world, fields):
  """π_ref e^(r/β) / Z."""
  return world_lib.optimum(world, fields["beta"])


def against_all(world):
  """P(y ≻ μ) of y against a draw of μ = π_ref, f64[X, K]."""
  p = world_lib.beats(world.reward)
  return np.einsum("xij,xj->xi", p, np.exp(world.ref))


def winners(world, fields):
  """The distribution of the winners of the comparisons."""
  del fields
  return np.log(world.wins.sum(2))


def from_margin(world, margin):
  """log π of two answers, of log-ratios that differ by `margin` f64[X]."""
  shift = np.stack([margin, 0 * margin], axis=-1)
  return normalised(world.ref + shift)


def first_wins(world):
  """P(0 ≻ 1) of two answers, f64[X]."""
  return world_lib.beats(world.reward)[:, 0, 1]


def smoothed(world, fields):
  """cDPO: βh = logit of P with a share ε of the labels turned round."""
  p, e = first_wins(world), fields["label_smoothing"]
  logit = scipy.special.logit((1 - e) * p + e * (1 - p))
  return from_margin(world, logit / fields["beta"])


def ipo(world, fields):
  """h = (P(y ≻ μ) − P(y' ≻ μ)) / τ."""
  return normalised(world.ref + against_all(world) / fields["beta"])


def ipo_by_length(world, fields):
  """The same of Δ / n: log π = log π_ref + n (P(y ≻ μ) / τ + c)."""
  x = against_all(world) / fields["beta"]
  return shifted(lambda c: world.ref + world.lengths * (x + c))


def hinge(world, fields):
  """βh = ±1, for the likelier winner."""
  return from_margin(world, np.sign(first_wins(world) - 0.5) / fields["beta"])


def exo(world, fields):
  """βh = (2P − 1) log((1 − ε) / ε)."""
  e = fields["label_smoothing"]
  h = (2 * first_wins(world) - 1) * np.log((1 - e) / e) / fields["beta"]
  return from_margin(world, h)


def chi_po(world, fields):
  """u + log u = r/β + c, u = π / π_ref: Wright's ω."""
  x = world.reward / fields["beta"]
  return shifted(lambda c: world.ref + np.log(scipy.special.wrightomega(x + c)))


def by_length(world, fields):
  """log π = log π_ref + n (r/β + c)."""
  x = world.reward / fields["beta"]
  return shifted(lambda c: world.ref + world.lengths * (x + c))


def priced_length(world, fields):
  """π_ref e^((r − α n) / β) / Z."""
  reward = world.reward - fields["alpha"] * world.lengths
  return normalised(world.ref + reward / fields["beta"])


def simpo(world, fields):
  """log π = n (r/β + c)."""
  x = world.reward / fields["beta"]
  return shifted(lambda c: world.lengths * (x + c))


def alphapo(world, fields):
  """log π = −n log(1 − α (r/β + c)) / α."""
  x, a = world.reward / fields["beta"], fields["alpha"]
  return shifted(lambda c: -world.lengths * np.log(1 - a * (x + c)) / a)


def demanded_margin(world, gamma):
  """The best βs_0 − βs_1 of two answers when labels ask for γ more, f64[X].

  Where P σ(γ − m) = (1 − P) σ(γ + m), a quadratic in e^m.
  """
  p, g = first_wins(world), np.exp(gamma)
  half = (2 * p - 1) * g / 2
  root = np.sqrt(half**2 + p * (1 - p))
  return np.log((half + root) / (1 - p))


def simpo_margin(world, fields):
  """log π = n l with l_0 − l_1 = m / β of the demanded margin m."""
  m = demanded_margin(world, fields["gamma"]) / fields["beta"]
  x = np.stack([m, 0 * m], axis=-1)
  return shifted(lambda c: world.lengths * (x + c))


def alphapo_margin(world, fields):
  """As simpo_margin, of the bent rewards."""
  m = demanded_margin(world, fields["gamma"]) / fields["beta"]
  x, a = np.stack([m, 0 * m], axis=-1), fields["alpha"]
  return shifted(lambda c: -world.lengths * np.log(1 - a * (x + c)) / a)


def uniform_reference(world, fields):
  """e^(r/β) / Z."""
  return normalised(world.reward / fields["beta"])


def nca(world, fields):
  """2 P(y ≻ π_ref) π_ref."""
  del fields
  return world.ref + np.log(2 * against_all(world))


def sppo(world, fields):
  """Δ = (P(y ≻ μ) − ½) / β, which does not sum to 1."""
  return world.ref + (against_all(world) - 0.5) / fields["beta"]


def cal_dpo(world, fields):
  """Two answers, Δ = ±h/2 with σ(h) + h/2 = P + (2P − 1) / (2β)."""
  p = first_wins(world)
  target = p + (2 * p - 1) / (2 * fields["beta"])
  low, high = np.full_like(p, -1e4), np.full_like(p, 1e4)
  for _ in range(200):
    h = (low + high) / 2
    small = scipy.special.expit(h) + h / 2 < target
    low, high = np.where(small, h, low), np.where(small, high, h)
  return world.ref + np.stack([h / 2, -h / 2], axis=-1)


def odds(world):
  """log odds that y wins against a draw of μ, f64[X, K]."""
  return np.log(world.wins.sum(2) / world.wins.sum(1))


def bco_delta(world, fields):
  """The δ under which π_ref odds^(1/β) e^(δ/β) sums to 1."""
  total = scipy.special.logsumexp(
    world.ref + odds(world) / fields["beta"], axis=-1
  )
  return -fields["beta"] * total


def bco(world, fields):
  """π_ref odds(y ≻ μ)^(1/β) e^(δ/β)."""
  return normalised(world.ref + odds(world) / fields["beta"])


def bco_free(world, fields):
  """The same with δ = 0, which does not sum to 1."""
  return world.ref + odds(world) / fields["beta"]


def label_delta(world, fields):
  """As bco_delta, where y is desirable with probability σ(r*)."""
  return -fields["beta"] * world_lib.log_partition(world, fields["beta"])


def unlikelihood(world, fields):
  """∝ μ(y) [P(y ≻ μ) − α P(μ ≻ y)]."""
  won, lost = world.wins.sum(2), world.wins.sum(1)
  return normalised(np.log(won - fields["alpha"] * lost))


def slic(world, fields):
  """log π_0 − log π_1 = ±δ, for the likelier winner."""
  margin = np.sign(first_wins(world) - 0.5) * fields["delta"]
  return normalised(np.stack([margin, 0 * margin], axis=-1))


def true_reward(world, fields):
  """r* to mean 0."""
  del fields
  return world.reward - world.reward.mean(-1, keepdims=True)


def under(log_ratio):
  """An f-divergence: s(Δ) = r/β + c, with Δ = log_ratio(r/β + c)."""

  def policy(world, fields):
    x = world.reward / fields["beta"]
    return shifted(lambda c: world.ref + log_ratio(x + c))

  return policy


TWO = {"answers": 2}
PLAIN = {"beta": 0.5, "label_smoothing": 0.0}
ALPHA = {"divergence_alpha": 0.5}

CASES = {
  "dpo": Case(PLAIN, rlhf),
  "dpo/smoothed, two answers": Case(
    {"beta": 0.5, "label_smoothing": 0.1}, smoothed, TWO
  ),
  "robust/flipped labels": Case(
    {"beta": 0.5, "label_smoothing": 0.2}, rlhf, {"flipped": 0.2}
  ),
  "ipo/original": Case({"beta": 0.1, "dialect": "original"}, ipo),
  "ipo/paper": Case({"beta": 0.1, "dialect": "paper"}, ipo_by_length),
  "hinge/two answers": Case({"beta": 0.5}, hinge, TWO, kinked=True),
  "exo/two answers": Case({"beta": 0.5, "label_smoothing": 0.1}, exo, TWO),
  "chi_po": Case({"beta": 0.5}, chi_po),
  "ln_dpo": Case({"beta": 5.0}, by_length),
  "dpop/lambda=0": Case({"beta": 0.5, "penalty": 0.0}, rlhf),
  "r_dpo": Case({"beta": 0.5, "alpha": 0.1}, priced_length),
  "odpo/alpha=0": Case({"beta": 0.5, "alpha": 0.0}, rlhf),
  "tdpo1/one step": Case({"beta": 0.5}, rlhf),
  "tdpo2/alpha=0": Case({"beta": 0.5, "alpha": 0.0}, rlhf),
  "sampo/equal lengths": Case({"beta": 0.5}, rlhf),
  "ld_dpo/equal lengths": Case({"beta": 0.5, "alpha": 0.3}, rlhf),
  "wpo/paper": Case({"beta": 0.5, "dialect": "paper"}, rlhf),
  "wpo/trl_1": Case({"beta": 0.5, "dialect": "trl_1"}, rlhf),
  "nca/beta=1": Case({"beta": 1.0}, nca, {"same": True}),
  "sppo/free": Case({"beta": 0.5}, sppo, {"same": True}, free=True),
  "cal_dpo/free, two answers": Case({"beta": 0.5}, cal_dpo, TWO, free=True),
  "bco/paper": Case({"beta": 0.5, "dialect": "paper"}, bco, kept=bco_delta),
  "bco/trl_1, free": Case(
    {"beta": 0.5, "dialect": "trl_1"}, bco_free, free=True
  ),
  "bco_unpaired": Case({"beta": 0.5}, rlhf, kept=label_delta),
  "plackett_luce": Case({"beta": 0.5}, rlhf, {"answers": 4}),
  "sft": Case({}, winners),
  "nll": Case({}, winners),
  "unlikelihood": Case({"alpha": 0.1}, unlikelihood),
  "slic/lambda=0, two answers": Case(
    {"delta": 1.0, "nll_weight": 0.0}, slic, TWO, kinked=True
  ),
  "simpo/gamma=0": Case({"beta": 2.0, "gamma": 0.0}, simpo),
  "alphapo/gamma=0": Case({"beta": 2.5, "gamma": 0.0, "alpha": 0.25}, alphapo),
  "simpo/two answers": Case({"beta": 2.0, "gamma": 1.0}, simpo_margin, TWO),
  "alphapo/two answers": Case(
    {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}, alphapo_margin, TWO
  ),
  "cpo/alpha=0": Case(
    {"beta": 0.5, "alpha": 0.0, "dialect": "paper"}, uniform_reference
  ),
  "bradley_terry": Case({"label_smoothing": 0.0, "centring": 0.0}, true_reward),
  # The scores are r* themselves.
  "bradley_terry_margin": Case(
    {"alpha": 0.5, "centring": 0.0},
    lambda world, fields: (1 + fields["alpha"]) * true_reward(world, fields),
  ),
  "plackett_luce_reward": Case({"centring": 0.0}, true_reward, {"answers": 4}),
  "dpo under forward_kl": Case(
    PLAIN, under(lambda x: -np.log(1 - x)), divergence="forward_kl"
  ),
  "dpo under js": Case(
    PLAIN, under(lambda x: x - np.log(2 - np.exp(x))), divergence="js"
  ),
  "dpo under alpha": Case(
    {**PLAIN, **ALPHA},
    under(lambda x: -2 * np.log(1 - x / 2)),
    divergence="alpha",
  ),
}

# Losses without a finite optimum of two answers, from a uniform reference:
# pushing them apart always pays. Their fields, and how often the first wins.
BOUNDARY = {
  "dpo": (PLAIN, 1.0),
  "apo_zero": ({"beta": 0.5}, 0.8),
  "apo_down": ({"beta": 0.5}, 0.8),
  "kto_pair": ({"beta": 0.5}, 0.8),
  "kto": (
    {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    0.8,
  ),
  # Its labels follow the scores, so they are certain.
  "odpo": ({"beta": 0.5, "alpha": 1.0}, 1.0),
  "orpo": ({"odds_weight": 0.1}, 1.0),
  "aot": ({"beta": 0.5, "label_smoothing": 0.0}, 1.0),
  "aot_unpaired": ({"beta": 0.5, "label_smoothing": 0.0}, 1.0),
}

# What is compared with no theory, and why there is none.
NOT_COMPARED = {
  "aot": "of batches: it ranks margins, so no comparison has its own optimum",
  "aot_unpaired": "of batches, as aot",
  "bradley_terry": "centring > 0: it draws rewards together, not only to 0",
  "bradley_terry_margin": "centring > 0, as bradley_terry",
  "plackett_luce_reward": "centring > 0, as bradley_terry",
  "bco": "with the running mean: its shift moves as the policy does",
  "cal_dpo": "of policies, or more answers: calibration and ranking disagree",
  "cpo": "alpha > 0: a ranking and a likelihood at once",
  "discopop": "not convex, and no stationary margin in closed form",
  "dpo": "smoothed, more answers: no one reward has the smoothed labels",
  "dpop": "lambda > 0: the margin asked for moves with the chosen log-prob",
  "exo": "of more answers: no one reward has the targets of all pairs",
  "hinge": "of more answers: a linear programme, and not always one optimum",
  "ld_dpo": "of unequal lengths: it reads tokens, which answers here lack",
  "nca": "beta other than 1: its answer does not sum to 1",
  "orpo": "of uncertain labels: likelihood and odds pull to different policies",
  "sampo": "of unequal lengths, as ld_dpo",
  "simpo": "gamma > 0, more answers: as smoothed dpo; alphapo too",
  "slic": "lambda > 0: a hinge and a likelihood at once",
  "sppo": "of policies: its answer does not sum to 1",
  "tdpo1": "of several steps: the KL of the tokens enters the margin",
  "tdpo2": "alpha > 0: without the gradient of a KL it descends no function",
}
