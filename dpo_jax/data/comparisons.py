"""Examples, and what is compared in them: pairs, rankings, single labels."""

from typing import NamedTuple

import numpy as np

from dpo_jax.data import fields


class Example(NamedTuple):
  """A prompt with completions, in token ids.

  Attributes:
    example_id: identity for randomness and logs: the record's number.
    source: which data set of a mixture.
    prompt: ids, never empty.
    completions: ids of each, never empty; all are scored.
    pairs: (winner, loser, weight), indices into `completions`. Of other kinds
      (see `arrange`): (best, …, worst, weight), (completion, weight), or
      (completion, that of another prompt, weight).
    ref_logps: f32[scored tokens], the reference's log-probs in nats of all
      completions, one after the other; None until they are computed.
    labels: of each completion; of each of `pairs` once arranged; or None.
    scores: of each completion, or None.
    ranking: indices into `completions`, best first, or None.
    ended: whether each completion has its end, and was not cut; or None.
    origin: "file:line" for messages to the user.
  """

  example_id: int
  source: int
  prompt: list[int]
  completions: tuple[list[int], ...]
  pairs: tuple[tuple, ...]
  ref_logps: np.ndarray | None = None
  labels: tuple[float, ...] | None = None
  scores: tuple[float, ...] | None = None
  ranking: tuple[int, ...] | None = None
  ended: tuple[bool, ...] | None = None
  origin: str = ""


# Arrays that a batch has where its examples do: their attributes, by name.
EXTRAS = {
  "ref_token_logps": "ref_logps",
  "labels": "labels",
  "scores": "scores",
}


def extras_of(examples):
  """The names of EXTRAS that all of some examples have."""
  return tuple(
    name
    for name, field in EXTRAS.items()
    if all(getattr(e, field) is not None for e in examples)
  )


# The form of the rows for each kind of example: see sources.py.
FORMS = {
  "sft": "sft",
  "pairs": "preference",
  "rankings": "preference",
  "labels": "feedback",
  "mismatched": "feedback",
}


def arrange(examples, kind, scored, policy):
  """Examples whose `pairs` hold what a loss of this kind compares.

      pairs       (winner, loser, weight)
      rankings    (best, …, worst, weight); a pair is a ranking of two
      labels      (completion, weight), labels 1 or 0; a pair is one of each
      mismatched  (completion, completion of another prompt, weight); the
                  latter, of the next record with another prompt, comes last

  Args:
    examples: list of Example.
    kind: see losses.Loss.data, or "sft".
    scored: whether the loss reads the scores of completions.
    policy: sources.Policy, for those that `problem` finds.
  Raises: ValueError where no record has another prompt.
  """
  good = []
  for example in examples:
    error = problem(example, kind, scored)
    if error is None:
      good.append(example)
    else:
      policy.bad(error)
  if not good:
    raise ValueError(f"no usable record is left (skipped: {policy.skipped})")
  if not scored:  # nor do they count as a change of the data
    good = [example._replace(scores=None) for example in good]
  if kind == "rankings":
    return [_ranked(example) for example in good]
  if kind in ("labels", "mismatched"):
    good = [_labelled(example) for example in good]
  return _mismatched(good) if kind == "mismatched" else good


def problem(example, kind, scored):
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
  return _score_problem(example) if scored else None


def _score_problem(example):
  if example.scores is None:
    return fields.BadRecord(
      "missing scores",
      f"{example.origin}: this loss needs 'scores' of the completions (or "
      "'score_chosen' and 'score_rejected')",
    )
  for winner, loser, _ in example.pairs:
    if not example.scores[winner] > example.scores[loser]:
      return fields.BadRecord(
        "bad scores",
        f"{example.origin}: completion {winner} won with the score "
        f"{example.scores[winner]} against {example.scores[loser]}; this loss "
        "needs winners with the higher score",
      )
  return None


def _ranked(example):
  if example.ranking is None:
    return example
  return example._replace(pairs=((*example.ranking, 1.0),))


def _labelled(example):
  if example.labels is None:
    labels = (1.0, 0.0) * len(example.pairs)
    pairs = tuple((k, w) for *pair, w in example.pairs for k in pair)
    return example._replace(pairs=pairs, labels=labels)
  pairs = tuple((k, 1.0) for k in range(len(example.completions)))
  labels = tuple(float(label > 0) for label in example.labels)
  return example._replace(pairs=pairs, labels=labels)


def _mismatched(examples):
  out, others = [], _next_with_another_prompt(examples)
  for number, (example, other) in enumerate(zip(examples, others, strict=True)):
    last = len(example.completions)
    # By turns, so that chosen and rejected ones are as many.
    taken = number % len(other.completions)
    ended = None
    if example.ended is not None:
      ended = (*example.ended, other.ended[taken])
    out.append(
      example._replace(
        completions=(*example.completions, other.completions[taken]),
        pairs=tuple((k, last, weight) for k, weight in example.pairs),
        ended=ended,
      )
    )
  return out


def _next_with_another_prompt(examples):
  """For each example the nearest behind it, from the first after the last."""
  following = [None] * len(examples)
  for index in reversed(range(2 * len(examples))):
    here = examples[index % len(examples)]
    after = examples[(index + 1) % len(examples)]
    if after.prompt == here.prompt:
      after = following[(index + 1) % len(examples)]
    following[index % len(examples)] = after
  if any(other is None for other in following):
    raise ValueError(
      f"{examples[0].origin}: KTO compares with completions of other prompts, "
      "and all records have the same one"
    )
  return following
