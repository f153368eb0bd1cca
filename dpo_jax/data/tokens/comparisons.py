"""Examples, and what is compared in them: pairs, rankings, single labels."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data.read import fields


class Example(NamedTuple):
  """A prompt with completions, in token ids.

  Attributes:
    example_id: number of the record, for randomness and logs.
    source: which data set of a mixture.
    prompt: ids, never empty; a list, or a view of an array.
    completions: ids of each, never empty; all are scored.
    pairs: (winner, loser, weight), indices into `completions`. Of other kinds
      (see `arrange`): (best, …, worst, weight), (completion, weight), or
      (completion, that of another prompt, weight).
    labels: of each completion; of each of `pairs` once arranged; or None.
    scores: of each completion, or None.
    ranking: indices into `completions`, best first, or None.
    ended: whether each completion has its end, and was not cut; or None.
    origin: "file:line" for messages to the user.
  """

  example_id: int
  source: int
  prompt: Sequence[int]
  completions: tuple[Sequence[int], ...]
  pairs: tuple[tuple, ...]
  labels: tuple[float, ...] | None = None
  scores: tuple[float, ...] | None = None
  ranking: tuple[int, ...] | None = None
  ended: tuple[bool, ...] | None = None
  origin: str = ""


# The form of the rows for each kind of example: see sources.py.
FORMS = {
  "sft": "sft",
  "completions": "completions",
  "pairs": "preference",
  "rankings": "preference",
  "labels": "feedback",
  "mismatched": "feedback",
}


def weighted(pairs, probabilities):
  """(winner, loser, weight) of comparisons, and of soft ones both ways round.

  Args:
    pairs: of (winner, loser).
    probabilities: for each, that the winner is the better one, P; or None. It
      becomes a comparison of the weight P, and one turned round of 1 − P.
  """
  if probabilities is None:
    return tuple((*pair, 1.0) for pair in pairs)
  both = (
    way
    for pair, p in zip(pairs, probabilities, strict=True)
    for way in ((*pair, p), (*pair[::-1], 1 - p))
  )
  return tuple(way for way in both if way[-1] > 0)


def arrange(example, kind, with_scores):
  """The example whose `pairs` hold what a loss of this kind compares.

      pairs       (winner, loser, weight)
      rankings    (best, …, worst, weight); a pair is a ranking of two
      labels      (completion, weight), labels 1 or 0; a pair is one of each
      mismatched  the same; `mismatched` makes the rest of all examples

  Args:
    example: Example.
    kind: see losses.Loss.compares; or "sft" and "completions", which compare
      nothing.
    with_scores: whether the loss reads the scores of completions; where it does
      not, they do not count as a change of the data either.
  Raises: fields.BadRecord where `problem` finds one.
  """
  error = problem(example, kind, with_scores)
  if error is not None:
    raise error
  if not with_scores:
    example = example._replace(scores=None)
  if kind == "rankings" and example.ranking is not None:
    return example._replace(pairs=((*example.ranking, 1.0),))
  return _labelled(example) if kind in ("labels", "mismatched") else example


def problem(example, kind, with_scores):
  """The BadRecord that says why a loss cannot use an example, or None.

  Args: see `arrange`.
  """
  if kind in ("labels", "mismatched") and example.labels is not None:
    for label in example.labels:
      if label not in (1, 0, -1):
        return fields.BadRecord(
          "bad label",
          f"{example.origin}: label {label} must be true or false, 1 or 0, or "
          "1 or -1; set a threshold before you train on it",
        )
  if not with_scores:
    return None
  if example.scores is None:
    return fields.BadRecord(
      "missing scores",
      f"{example.origin}: this loss needs 'scores' of the completions (or "
      "'score_chosen' and 'score_rejected')",
    )
  for winner, loser, weight in example.pairs:
    if weight < 1:
      return fields.BadRecord(
        "soft label",
        f"{example.origin}: this loss needs winners with the higher score, and "
        "a soft label ('probability') has no winner; take one of them out",
      )
    if not example.scores[winner] > example.scores[loser]:
      return fields.BadRecord(
        "bad scores",
        f"{example.origin}: completion {winner} won with the score "
        f"{example.scores[winner]} against {example.scores[loser]}; this loss "
        "needs winners with the higher score",
      )
  return None


def _labelled(example):
  if example.labels is None:
    labels = (1.0, 0.0) * len(example.pairs)
    pairs = tuple((k, w) for *pair, w in example.pairs for k in pair)
    return example._replace(pairs=pairs, labels=labels)
  pairs = tuple((k, 1.0) for k in range(len(example.completions)))
  labels = tuple(float(label > 0) for label in example.labels)
  return example._replace(pairs=pairs, labels=labels)


def mismatched(examples, where):
  """Yields examples with a last completion that belongs to another prompt.

  Of labelled ones; their `pairs` become (completion, the last one, weight). The
  other prompt is the nearest behind, from the first after the last.

  Args:
    examples: sequence of Example, arranged for "mismatched".
    where: what they are of, for the message.
  Raises: ValueError where no example has another prompt.
  """
  numbers, waiting = itertools.count(), []  # for the next other prompt
  for example in examples:
    if waiting and not np.array_equal(example.prompt, waiting[0].prompt):
      yield from map(_mismatch, waiting, itertools.repeat(example), numbers)
      waiting = []
    waiting.append(example)
  same = waiting[0].prompt
  others = (e for e in examples if not np.array_equal(e.prompt, same))
  other = next(others, None)
  if other is None:
    raise ValueError(
      f"{where}: KTO compares with completions of other prompts, and all "
      "records have the same one"
    )
  yield from map(_mismatch, waiting, itertools.repeat(other), numbers)


def _mismatch(example, other, number):
  # By turns, so that chosen and rejected ones are as many.
  last, taken = len(example.completions), number % len(other.completions)
  return example._replace(
    completions=(*example.completions, other.completions[taken]),
    pairs=tuple((k, last, weight) for k, weight in example.pairs),
    ended=example.ended and (*example.ended, other.ended[taken]),
  )
