"""What a judge says of a pair."""

from typing import NamedTuple


class Verdict(NamedTuple):
  """Of a Pair.

  Attributes:
    value: 1 where ours is the better text, 0 where theirs is, ½ for a tie; None
      if there is no verdict.
    why: of WHY.
    about: plain dict of what it rests on.
  """

  value: float | None
  why: str
  about: dict


# By what a table calls them; the first are verdicts, the last are none.
WHY = (
  *("decided", "flip", "identical", "equal"),
  *("malformed", "failed", "not asked"),
)


def identical(pair):
  """The Verdict of a pair of equal texts, which nobody has to be asked."""
  return Verdict(0.5, "identical", {})


def of_scores(ours, theirs):
  """The higher score wins; equal ones tie."""
  value = 0.5 * (1 + (ours > theirs) - (ours < theirs))
  why = "equal" if ours == theirs else "decided"
  return Verdict(value, why, {"scores": [float(ours), float(theirs)]})
