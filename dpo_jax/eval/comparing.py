"""Comparisons of what was drawn for a prompt, made from its scores.

A pure function of the draws, their scores, rollout.seed and the example's id,
which numbers the prompts of all iterations.
"""

import math
from typing import NamedTuple

import numpy as np

from dpo_jax.data.read import pairs


class Compared(NamedTuple):
  """The comparisons of an example.

  Attributes:
    pairs: as those of comparisons.Example; weight 0 where nothing is learned.
    identical: of each, the share of it that compares the same tokens.
    tied: of each, the share of it that compares the same score.
  """

  pairs: tuple
  identical: tuple
  tied: tuple


class Kind(NamedTuple):
  """A row of KINDS.

  Attributes:
    make: (completions, scores, options, seed) -> Compared.
    count: options -> comparisons of an example.
    compared: options -> completions of a comparison.
  """

  make: object
  count: object
  compared: object


def with_comparisons(examples, kind, options):
  """(examples with their `pairs`, {name of rows.EXTRAS: of each example}).

  Args:
    examples: list of comparisons.Example, with scores.
    kind: a key of KINDS.
    options: the fields of config.rollout.
  """
  made = []
  for example in examples:
    ids = [list(map(int, each)) for each in example.completions]
    seed = [options.seed, example.example_id]
    made.append(KINDS[kind].make(ids, example.scores, options, seed))
  out = [
    example._replace(pairs=each.pairs)
    for example, each in zip(examples, made, strict=True)
  ]
  names = ("identical", "tied")
  return out, {
    name: [np.asarray(getattr(each, name), np.float32) for each in made]
    for name in names
  }


def _pairs(ids, scores, options, seed):
  judged = pairs.judged(
    *(ids, scores, options.labels, seed),
    which=options.compare,
    scale=options.label_scale or 1.0,
  )
  return Compared(
    tuple((j.winner, j.loser, float(j.counts)) for j in judged),
    tuple(float(j.identical) for j in judged),
    tuple(float(j.tied) for j in judged),
  )


def _ranking(ids, scores, options, seed):
  """One ranking; identical and tied are shares of the completions."""
  ranked = pairs.ranking(
    ids, scores, options.labels, seed, scale=options.label_scale or 1.0
  )
  count = len(ids)
  identical = 1 - len({tuple(each) for each in ids}) / count
  tied = 1 - len(set(scores)) / count
  return Compared(((*ranked, float(len(ranked) > 1)),), (identical,), (tied,))


def _best(ids, scores, options, seed):
  """The best of all, before the worst, which is not learned from."""
  del options, seed
  best, worst = pairs.best_worst(scores)
  identical, tied = ids[best] == ids[worst], scores[best] == scores[worst]
  return Compared(((best, worst, 1.0),), (float(identical),), (float(tied),))


def _count(options):
  return 1 if options.compare == "best_worst" else math.comb(options.draws, 2)


# By Algorithm.compares.
KINDS = {
  "pairs": Kind(_pairs, _count, lambda options: 2),
  "rankings": Kind(_ranking, lambda options: 1, lambda options: options.draws),
  "best": Kind(_best, lambda options: 1, lambda options: 2),
}
