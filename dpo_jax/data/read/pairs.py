"""Prompts from texts, and comparisons of sampled completions from rewards."""

import collections
import itertools
import math

import numpy as np


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


def compare(completions, rewards, labels, seed):
  """All comparisons between the completions of one prompt.

      bradley_terry   i beats j with probability σ(r_i − r_j)
      deterministic   the higher reward wins; ties are left out

  Args:
    completions: texts; equal ones are not compared.
    rewards: of each.
    labels: "bradley_terry" or "deterministic".
    seed: of the draws, a list of ints.
  Returns: list of [winner, loser].
  Raises: ValueError for a reward that is not finite.
  Source: arXiv:2305.18290 Eq. 1.
  """
  if not np.all(np.isfinite(rewards)):
    raise ValueError(f"rewards {rewards} cannot be compared: not all finite")
  rng = np.random.default_rng(seed)
  pairs = []
  for i, j in itertools.combinations(range(len(completions)), 2):
    gap = rewards[i] - rewards[j]
    draw = rng.random()
    if completions[i] == completions[j]:
      continue
    if labels == "bradley_terry":
      wins = draw < 0.5 * (1 + np.tanh(gap / 2))  # σ(gap), without overflow
    elif gap == 0:
      continue
    else:
      wins = gap > 0
    pairs.append([i, j] if wins else [j, i])
  return pairs


def records(draws, labels, seed):
  """Draws as records of comparisons.

  Args:
    draws: list of dicts with "id", "prompt", "completion", "tokens", "reward"
      and perhaps "bos" (see records.Record), those of one prompt together.
    labels, seed: see `compare`.
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
    pairs = compare(texts, rewards, labels, [seed, number])
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
