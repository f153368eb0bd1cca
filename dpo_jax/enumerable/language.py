"""A language whose every answer can be listed.

An answer is L words of V behind a prompt of one word, so each of X prompts has
A = V^L answers, in the order of `answers`. Whatever a policy is worth is then a
finite sum,

    E[r] = mean_x Σ_y π(y|x) r*(x, y),  KL = mean_x Σ_y π(y|x) log π/π_ref

and the best that can be had at a KL is the curve of π_ref e^(r*/τ) / Z over τ
(arXiv:2305.18290 Eq. 4). Distributions are log-probs in nats, [X, A].
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from dpo_jax.data.batch import rows
from dpo_jax.data.tokens import comparisons
from dpo_jax.ops import logprobs

# Of the curve of optima; both ends of it are flat.
TEMPERATURES = np.geomspace(1e-3, 1e3, 601)
_LAYOUT = rows.Layout(
  packed=False, shared=True, row_multiple=1, max_row_length=None
)


class Language(NamedTuple):
  """What is said, and what it is worth.

  Attributes:
    words, length, prompts: V, L, X.
    reward: f64[X, A] r*, between 0 and 1.
    demonstrations: f64[X, A] log-probs of what a reference learns from.
  """

  words: int
  length: int
  prompts: int
  reward: np.ndarray
  demonstrations: np.ndarray


def make(*, words, length, prompts, seed):
  """A Language.

      r*(x, y) = σ(Σ_t w_x(y_t)),  w_x(v) ~ N(0, 1) + N(0, ½²) of the prompt

  Demonstrations are of a Markov chain whose logits are N(0, 1), an own one for
  each prompt.
  """
  rng = np.random.default_rng(seed)
  of_word = rng.normal(size=words) + 0.5 * rng.normal(size=(prompts, words))
  of_word -= of_word.mean(axis=1, keepdims=True)
  first = _normalised(rng.normal(size=(prompts, words)))
  following = _normalised(rng.normal(size=(prompts, words, words)))
  said = answers(words, length)
  spoken = first[:, said[:, 0]]
  for before, after in itertools.pairwise(said.T):
    spoken = spoken + following[:, before, after]
  reward = scipy.special.expit(of_word[:, said].sum(-1))
  return Language(words, length, prompts, reward, spoken)


def answers(words, length):
  """i32[V^L, L], the last word changing fastest."""
  every = itertools.product(range(words), repeat=length)
  return np.array(list(every), np.int32)


def number_of(said, words):
  """The place of answers [..., L] in `answers`."""
  number = said[..., 0]
  for t in range(1, said.shape[-1]):
    number = number * words + said[..., t]
  return number


def examples_of(prompts, said):
  """A comparisons.Example for each prompt i32[N] with its answers [N, K, L]."""
  return [
    comparisons.Example(
      number, 0, [int(prompt)], tuple(each.tolist() for each in several), ()
    )
    for number, (prompt, several) in enumerate(zip(prompts, said, strict=True))
  ]


def batch_of(examples, pairs):
  """The rows of examples of one size, one each, with room for comparisons."""
  first = examples[0]
  shape = rows.limits_shape(
    _LAYOUT,
    rows=len(examples),
    per_row=1,
    completions=len(first.completions),
    prompt=len(first.prompt),
    completion=len(first.completions[0]),
    pairs=pairs,
    multiple=1,
  )
  each = [[number] for number in range(len(examples))]
  return rows.build(examples, each, shape, _LAYOUT)


def prefixes(language):
  """The rows of all beginnings of answers, of L − 1 words each."""
  begun = answers(language.words, language.length - 1).tolist()
  every = itertools.product(range(language.prompts), begun)
  examples = [
    comparisons.Example(n, 0, [x, *said[:-1]], ([said[-1]],), ())
    for n, (x, said) in enumerate(every)
  ]
  return batch_of(examples, 0)


def log_policy(language, apply, params, batch):
  """log π f32[X, A] of a model.

  Args:
    apply: (params, batch) -> (hidden, Head).
    batch: of `prefixes`.
  """
  v, length = language.words, language.length
  hidden, head = apply(params, batch)
  following = jax.nn.log_softmax(logprobs.logits(hidden, head))[..., :v]
  begun = (language.prompts, *[v] * (length - 1))
  following = following.reshape(*begun, length, v)
  total = jnp.zeros(language.prompts)
  for t in range(length):
    # What word t is drawn from does not know those behind it.
    known = (slice(None),) * (1 + t) + (0,) * (length - 1 - t)
    total = total[..., None] + following[..., t, :][known]
  return total.reshape(language.prompts, -1)


def measure(log_policy, log_ref, reward):
  """{"reward", "kl", "entropy"} of a policy, means over prompts, in nats.

  Args: f[X, A] each, numpy or jax.
  """
  p = jnp.exp(log_policy)

  def mean(values):  # what is never said may have a log-prob of −inf
    return jnp.mean(jnp.sum(jnp.where(p > 0, p * values, 0.0), axis=-1))

  return {
    "reward": mean(reward),
    "kl": mean(log_policy - log_ref),
    "entropy": -mean(log_policy),
  }


def optimum(log_ref, reward, temperature):
  """log π* = log π_ref + r/τ − log Z."""
  return _normalised(log_ref + reward / temperature)


class Frontier(NamedTuple):
  """The best reward at each KL: f64[N] each, rising together."""

  kl: np.ndarray
  reward: np.ndarray

  def at(self, kl):
    """F*(k): linear between its points, the last one's reward behind it."""
    return np.interp(kl, self.kl, self.reward)


def frontier(log_ref, reward):
  """The Frontier of a reference, one temperature for all prompts."""
  log_ref = np.asarray(log_ref, np.float64)
  points = []
  for temperature in TEMPERATURES[::-1]:
    best = optimum(log_ref, reward, temperature)
    p = np.exp(best)
    kl = np.sum(p * (best - log_ref), axis=-1).mean()
    points.append((kl, np.sum(p * reward, axis=-1).mean()))
  return Frontier(*np.array(points).T)


def best_of(log_ref, ranking, n):
  """log-probs of the best of n draws of a reference, f64[X, A].

      P(the best has rank v) = F(v)^n − F(v−)^n,  F(v) = P(rank ≤ v)

  Answers of one rank are taken as often as they are drawn.

  Args:
    ranking: f64[X, A], higher is better.
  """
  out = np.empty_like(log_ref, dtype=np.float64)
  for to, logp, rank in zip(out, np.float64(log_ref), ranking, strict=True):
    _, group = np.unique(rank, return_inverse=True)
    mass = np.bincount(group, np.exp(logp))
    until = np.cumsum(mass / mass.sum())
    before = np.concatenate([[0.0], until[:-1]])
    with np.errstate(divide="ignore"):
      chosen = np.log(until**n - before**n)
    to[:] = logp - np.log(mass)[group] + chosen[group]
  return out


class Comparisons(NamedTuple):
  """Groups of answers that were drawn together, and compared.

  Attributes:
    prompts: i32[G].
    said: i32[G, K, L].
    pairs: i32[G, Q, 2], winner and loser of all pairs of a group.
    weights: f32[G, Q]: 0 of a pair of which no label is known.
  """

  prompts: np.ndarray
  said: np.ndarray
  pairs: np.ndarray
  weights: np.ndarray


def draw(language, log_policy, groups, draws, rng):
  """Answers of one prompt each, the prompts by turns.

  Returns: (prompts i32[G], numbers of the answers i32[G, K]).
  """
  prompts = (np.arange(groups) % language.prompts).astype(np.int32)
  until = np.cumsum(np.exp(np.float64(log_policy)), axis=-1)
  until /= until[:, -1:]
  drawn = [
    np.searchsorted(until[x], below)
    for x, below in zip(prompts, rng.random((groups, draws)), strict=True)
  ]
  return prompts, np.array(drawn, np.int32)


def compared(language, log_ref, *, groups, draws, labels, scale, seed):
  """The Comparisons of draws of a reference.

  Args:
    groups, draws: G, and K of each.
    labels: "bradley_terry": i beats j with probability σ(scale (r*_i − r*_j));
      "deterministic": the higher r*. Equal answers, and of these equal r*,
      have no label.
    seed: of draws and labels: both labellings compare the same draws.
  """
  rng = np.random.default_rng(seed)
  prompts, drawn = draw(language, log_ref, groups, draws, rng)
  pairs = np.array(list(itertools.combinations(range(draws), 2)), np.int32)
  rewards = language.reward[prompts[:, None], drawn]
  ahead = rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]
  if labels == "deterministic":
    wins = ahead > 0
    known = ahead != 0
  else:
    wins = rng.random(ahead.shape) < scipy.special.expit(scale * ahead)
    known = drawn[:, pairs[:, 0]] != drawn[:, pairs[:, 1]]
  ordered = np.where(wins[..., None], pairs, pairs[:, ::-1])
  said = answers(language.words, language.length)[drawn]
  return Comparisons(prompts, said, ordered, known.astype(np.float32))


def _normalised(scores):
  return scores - scipy.special.logsumexp(scores, axis=-1, keepdims=True)
