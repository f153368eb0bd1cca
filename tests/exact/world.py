"""A world small enough to know: every answer, its reward, its probability.

X prompts with K answers each. The optimum of the RLHF objective is then a line
of arithmetic, π* = π_ref e^(r/β) / Z, and the population loss a finite sum

    L(π) = Σ_ij wins_ij ℓ(i beats j)

with ℓ of the project's own loss functions. All is float64, but only inside the
functions here: they take and return numpy arrays.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from dpo_jax.ops import losses
from tests.exact import solver

BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)


class World(NamedTuple):
  """Prompts with all their answers.

  Attributes:
    ref: f64[X, K] log π_ref in nats.
    reward: f64[X, K] r*.
    wins: f64[X, K, K] share of the comparisons in which i beat j.
    lengths: f64[X, K] tokens of each answer.
  """

  ref: np.ndarray
  reward: np.ndarray
  wins: np.ndarray
  lengths: np.ndarray


def make(*, prompts=4, answers=8, seed=0, same=False, flipped=0.0):
  """A World of normal logits and rewards, with comparisons without end.

  Args:
    same: also compare answers with themselves, as two independent draws do.
    flipped: share of the labels that are turned round.
  """
  rng = np.random.default_rng(seed)
  logits, reward = rng.normal(size=(2, prompts, answers))
  lengths = rng.integers(1, 7, (prompts, answers)).astype(float)
  ref = normalised(logits)
  wins = comparisons(ref, reward, same=same, flipped=flipped)
  return World(ref, reward, wins, lengths)


def comparisons(ref, reward, *, same=False, flipped=0.0):
  """wins f64[X, K, K] of two draws from π_ref, labelled by Bradley–Terry."""
  drawn = np.exp(ref[..., :, None] + ref[..., None, :])
  if not same:
    drawn *= 1 - np.eye(ref.shape[-1])
  drawn /= drawn.sum((-2, -1), keepdims=True)
  p = beats(reward)
  # Both orders of a draw: i beat j as (i, j) and as (j, i).
  return 2 * drawn * ((1 - flipped) * p + flipped * (1 - p))


def beats(reward):
  """P(i ≻ j) = σ(r_i − r_j), f64[..., K, K]."""
  return scipy.special.expit(reward[..., :, None] - reward[..., None, :])


def normalised(scores):
  """log-probs ∝ e^scores, over the last axis."""
  return scores - scipy.special.logsumexp(scores, axis=-1, keepdims=True)


def shifted(log_policy):
  """log π of x -> log π(x), at the x = c per prompt where it sums to 1.

  Args:
    log_policy: c f64[X, 1] -> f64[X, K], rising in c; NaN beyond its domain.
  """
  with np.errstate(all="ignore"):
    high = np.full_like(log_policy(-1e4)[:, :1], 1e4)
    low = -high
    for _ in range(200):
      middle = (low + high) / 2
      total = np.exp(log_policy(middle)).sum(-1, keepdims=True)
      small = total < 1  # NaN is not
      low, high = np.where(small, middle, low), np.where(small, high, middle)
  return log_policy(low)


def optimum(world, beta):
  """log π* = log π_ref + r/β − log Z, f64[X, K]."""
  return normalised(world.ref + world.reward / beta)


def log_partition(world, beta):
  """log Z f64[X], Z = Σ_y π_ref e^(r/β)."""
  return scipy.special.logsumexp(world.ref + world.reward / beta, axis=-1)


def kl(logp, logq):
  """KL(p ‖ q) in nats, over the last axis."""
  return np.sum(np.exp(logp) * (logp - logq), axis=-1)


def total_variation(logp, logq):
  """½ Σ |p − q|, over the last axis."""
  return np.abs(np.exp(logp) - np.exp(logq)).sum(-1) / 2


def tile(world, values):
  """The World once for each of some values, and these by prompt.

  Returns: (World of len(values)·X prompts, f64[len(values)·X]).
  """
  prompts = len(world.ref)
  tiled = [np.concatenate([x] * len(values)) for x in world]
  return World(*tiled), np.repeat(np.asarray(values, float), prompts)


def compute(fn, *args):
  """fn(*args), compiled in f64 and anew at every call, as numpy arrays."""
  with jax.enable_x64(True):
    out = jax.jit(lambda *args: fn(*args))(*args)
    return jax.tree.map(np.asarray, out)


def sides(values):
  """values[K] of answers -> [K, K, 2]: of i and of j, for all pairs."""
  pair = jnp.broadcast_arrays(values[:, None], values[None, :])
  return jnp.stack(pair, axis=-1)


# What losses need beside the log-probs, for answers of a single step each.
NEEDS = {
  "lengths": lambda policy, world: world.lengths,
  "scores": lambda policy, world: world.reward,
  "prefix_logps": lambda policy, world: policy,
  "common_logps": lambda policy, world: policy,
  "ref_prefix_logps": lambda policy, world: world.ref,
  "ref_common_logps": lambda policy, world: world.ref,
  "sum_sq_probs": lambda policy, world: jnp.full_like(
    policy, jax.nn.logsumexp(2 * policy)
  ),
  "sequence_kl": lambda policy, world: jnp.full_like(
    policy, jnp.sum(jnp.exp(world.ref) * (world.ref - policy))
  ),
}


def population(policy, world, loss, fields, kept=0.0):
  """The loss of one prompt: f64 scalar, Σ wins · ℓ.

  Args:
    policy: f64[K] log π in nats; of a loss of rewards, these.
    world: World without the axis of prompts.
    loss: losses.Loss.
    fields: its own, as in config.loss.
    kept: mean reward of the steps before, of losses that keep one; after
      infinitely many it no longer moves.
  """
  args, extra, wins = COMPARED[loss.data](policy, world)
  extra |= {"weights": wins, "running": {"mean": kept, "count": 1e300}}
  for name, need in NEEDS.items():
    if name in loss.needs and name not in extra:
      extra[name] = sides(need(policy, world))
  needed = {name: extra[name] for name in loss.needs}
  out = loss.fn(*args, **needed, **fields)["loss"]
  if isinstance(out, tuple):
    values, factors = out
    return jnp.sum(wins * factors * values) / jnp.sum(wins * factors)
  return jnp.sum(wins * out)


def _pairs(policy, world):
  return (sides(policy), sides(world.ref)), {}, world.wins


def _rewards(policy, world):
  return (sides(policy),), {}, world.wins


def _labels(policy, world):
  """Every answer drawn from π_ref, desirable with probability σ(r*) or not."""
  good = jax.nn.sigmoid(world.reward)
  drawn = jnp.exp(world.ref) * jnp.stack([good, 1 - good])
  labels = jnp.broadcast_to(jnp.array([[1.0], [0.0]]), drawn.shape)
  args = [jnp.stack([x, x])[..., None] for x in (policy, world.ref)]
  return args, {"labels": labels}, drawn


def _mismatched(policy, world):
  """The same, each beside another answer as the one of another prompt."""
  args, extra, drawn = _labels(policy, world)
  return [jnp.concatenate([x, x[:, ::-1]], -1) for x in args], extra, drawn


def _reward_rankings(policy, world):
  (rewards, _), extra, drawn = _rankings(policy, world)
  return (rewards,), extra, drawn


def _rankings(policy, world):
  """All K! orders of the answers, as Plackett–Luce draws them under r*."""
  orders = np.array(list(itertools.permutations(range(len(policy)))))
  drawn = jnp.exp(order_logps(world.reward[orders]))
  present = jnp.ones(orders.shape, bool)
  return (policy[orders], world.ref[orders]), {"present": present}, drawn


COMPARED = {
  "pairs": _pairs,
  "rewards": _rewards,
  "labels": _labels,
  "mismatched": _mismatched,
  "rankings": _rankings,
  "reward_rankings": _reward_rankings,
}


def order_logps(ranked):
  """log Π_k e^(r_k) / Σ_{j ≥ k} e^(r_j) of rewards, best first, [..., K]."""
  behind = [
    jax.nn.logsumexp(ranked[..., k:], axis=-1) for k in range(ranked.shape[-1])
  ]
  return jnp.sum(ranked - jnp.stack(behind, axis=-1), axis=-1)


def objective(name, world, *, free=False, loss=None, kept=0.0, **fields):
  """(f, data): f(z, *data of a prompt) is the loss `name` of logits z[K].

  Args:
    free: z are log-probs themselves, which need not sum to 1.
    loss: the losses.Loss; None takes it from LOSSES.
    kept: see `population`, f64[X].
    **fields: numbers, for all prompts or f64[X] for each, and texts.
  """
  loss = losses.LOSSES[name] if loss is None else loss
  prompts = len(world.ref)
  text = {k: v for k, v in fields.items() if isinstance(v, str)}
  each = {
    k: np.broadcast_to(np.asarray(v, float), prompts)
    for k, v in fields.items()
    if k not in text
  }

  def f(z, world, each, kept):
    policy = z if free or loss.of_rewards else jax.nn.log_softmax(z)
    return population(policy, world, loss, {**each, **text}, kept)

  return f, (world, each, np.broadcast_to(kept, prompts))


def learn(name, world, **options):
  """The minimiser of a loss from π_ref on, see `objective`.

  Returns: (log π f64[X, K]; of a loss of rewards, these; loss f64[X]).
  """
  f, data = objective(name, world, **options)
  z, value = solver.minimise(f, world.ref, *data)
  loss = options.get("loss") or losses.LOSSES[name]
  free = options.get("free") or loss.of_rewards
  return (z if free else normalised(z)), value
