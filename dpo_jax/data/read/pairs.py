"""Prompts from texts, and comparisons of sampled completions from rewards."""

import collections
import itertools
import math
from typing import NamedTuple

import numpy as np


class Judged(NamedTuple):
  """Two completions of a prompt, compared by their rewards.

  Attributes:
    winner, loser: their indices.
    identical: whether they are the same.
    tied: whether their rewards are.
    counts: whether the label says anything: not of identical ones, and
      "deterministic" not of ties.
  """

  winner: int
  loser: int
  identical: bool
  tied: bool
  counts: bool


def beginnings(texts, encode, decode, span, seed):
  """Cuts texts to their first few tokens, at the beginning of a word.

  The number of tokens is uniform over those in `span` that a new word follows;
  texts without one, or with nothing left after it, are left out.

  Args:
    texts: list of str.
    encode: list[str] -> list[list[int]].
    decode: list[int] -> str.
    span: (fewest, most) tokens.
    seed: of the cut.
  Returns: list of (index of the text, beginning).
  """
  rng = np.random.default_rng(seed)
  out = []
  for index, (text, ids) in enumerate(zip(texts, encode(texts), strict=True)):
    counts = range(span[0], min(span[1] + 1, len(ids)))
    starts = [decode(ids[:count]) for count in counts]
    starts = [
      start  # behind which a new word follows
      for start in starts
      if text.startswith(f"{start} ") and text.removeprefix(start).strip()
    ]
    draw = rng.random()  # drawn for every text: one cut moves no other
    if starts:
      out.append((index, starts[int(draw * len(starts))]))
  return out


def compare(completions, rewards, labels, seed, *, scale=1.0):
  """[winner, loser] of all comparisons that count, see `judged`."""
  every = judged(completions, rewards, labels, seed, scale=scale)
  return [[each.winner, each.loser] for each in every if each.counts]


def judged(completions, rewards, labels, seed, *, which="all", scale=1.0):
  """Comparisons between the completions of one prompt.

      bradley_terry   i beats j with probability σ(κ (r_i − r_j))
      deterministic   the higher reward wins; ties do not count

  Args:
    completions: of any type; equal ones are identical.
    rewards: of each.
    labels: "bradley_terry" or "deterministic".
    seed: of the draws, a list of ints.
    which: "all" of them, or "best_worst": the highest reward and the lowest.
    scale: κ.
  Returns: list of Judged.
  Raises: ValueError for a reward that is not finite.
  Source: arXiv:2305.18290 Eq. 1.
  """
  _refuse_infinite(rewards)
  rng = np.random.default_rng(seed)
  chosen = itertools.combinations(range(len(completions)), 2)
  if which == "best_worst":
    chosen = [best_worst(rewards)]
  out = []
  for i, j in chosen:
    gap, draw = scale * (rewards[i] - rewards[j]), rng.random()
    identical, tied = completions[i] == completions[j], gap == 0
    if labels == "bradley_terry":
      wins = draw < 0.5 * (1 + np.tanh(gap / 2))  # σ(gap), without overflow
      counts = not identical
    else:
      wins, counts = gap > 0, not (identical or tied)
    sides = (i, j) if wins else (j, i)
    out.append(Judged(*sides, identical, bool(tied), counts))
  return out


def best_worst(rewards):
  """Indices of the highest reward and of the lowest; never the same one."""
  order = np.argsort(-np.asarray(rewards), kind="stable")
  return int(order[0]), int(order[-1])


def ranking(completions, rewards, labels, seed, *, scale=1.0):
  """Indices of completions from the best to the worst.

      bradley_terry   drawn: Π_k e^(κ r_k) / Σ_{j ≥ k} e^(κ r_j), Plackett–Luce
      deterministic   by their rewards

  Of identical ones the first is ranked; by "deterministic", of ties too.

  Args and Raises: see `judged`.
  Source: arXiv:2305.18290 Eq. 18; the draw is a sort of κ r + Gumbel noise.
  """
  _refuse_infinite(rewards)
  kept = []
  for i, completion in enumerate(completions):
    known = any(
      completions[j] == completion
      or (labels == "deterministic" and rewards[j] == rewards[i])
      for j in kept
    )
    kept += [] if known else [i]
  values = scale * np.asarray(rewards, np.float64)
  noise = np.random.default_rng(seed).gumbel(size=len(values))
  if labels == "bradley_terry":
    values = values + noise
  return sorted(kept, key=lambda i: -values[i])


def _refuse_infinite(rewards):
  if not np.all(np.isfinite(rewards)):
    raise ValueError(f"rewards {rewards} cannot be compared: not all finite")


def records(draws, labels, seed, *, scale=1.0):
  """Draws as records of comparisons.

  Args:
    draws: list of dicts with "id", "prompt", "completion", "tokens", "reward"
      and perhaps "bos" (see records.Record), those of one prompt together.
    labels, seed, scale: see `compare`.
  Returns: (list of {"prompt", "completions", "tokens", "pairs", "scores"},
    Counter of what was left out).
  """
  groups, left_out = collections.defaultdict(list), collections.Counter()
  for draw in draws:
    groups[draw["id"]].append(draw)
  out = []
  for number, group in groups.items():
    kept = [draw for draw in group if draw["completion"]]
    left_out["empty completions"] += len(group) - len(kept)
    texts = [draw["completion"] for draw in kept]
    rewards = [draw["reward"] for draw in kept]
    pairs = compare(texts, rewards, labels, [seed, number], scale=scale)
    equal = math.comb(len(texts), 2) - len(pairs)
    left_out["pairs of equal completions or rewards"] += equal
    if pairs:
      out.append(
        {
          **{n: kept[0][n] for n in ("prompt", "bos") if n in kept[0]},
          "completions": texts,
          "tokens": [draw["tokens"] for draw in kept],
          "pairs": pairs,
          "scores": [float(reward) for reward in rewards],
        }
      )
  return out, left_out
