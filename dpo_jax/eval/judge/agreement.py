"""How far two judges agree."""

import collections

from etils import epath

from dpo_jax import store
from dpo_jax.data.read import fields, files


def kappa(first, second):
  """Cohen's κ of two judges of the same cases.

      κ = (p_o − p_e) / (1 − p_e),    p_e = Σ_k p_first(k) p_second(k)

  p_o is the share of cases on which they agree, p_e what chance alone would
  make of their own shares of each category k. 1 is agreement, 0 is chance.

  Args:
    first, second: categories of n cases, hashable.
  Returns: float; None where both always say the same one thing, or of no case.
  Source: Cohen 1960, doi:10.1177/001316446002000104.
  """
  n = len(first)
  if not n:
    return None
  ours, theirs = collections.Counter(first), collections.Counter(second)
  observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
  chance = sum(ours[k] * theirs[k] for k in ours) / n**2
  return (observed - chance) / (1 - chance) if chance < 1 else None


def compare(rows, path):
  """The agreement of judged rows with those of another judge's file.

  Args:
    rows: dicts of judgements.jsonl.
    path: of another judgements.jsonl; pairs are matched by their three texts.
  Returns: {"file", "pairs", "agree", "kappa": of win, tie and loss;
    "decided", "agree_decided": of the pairs in which neither tied}.
  Raises: ValueError if they judged no pair in common.
  """
  theirs = _verdicts(_read(path), path)
  ours = _verdicts(rows, "judgements.jsonl")
  both = [(ours[key], theirs[key]) for key in ours if key in theirs]
  if not both:
    raise ValueError(
      f"judge.agree_with: {path} has no pair in common with this judge; it "
      "must be of the same judge.samples and judge.against"
    )
  decided = [(a, b) for a, b in both if 0.5 not in (a, b)]
  return {
    "file": str(path),
    "pairs": len(both),
    "agree": _share(both),
    "kappa": kappa(*zip(*both, strict=True)),
    "decided": len(decided),
    "agree_decided": _share(decided),
  }


def _share(both):
  return sum(a == b for a, b in both) / len(both) if both else None


def _read(path):
  path = epath.Path(path)
  with store.explained(
    f"{path}: cannot be read", "judge.agree_with names judgements.jsonl files"
  ):
    path.open("rb").close()
  return [row for _, row in files.jsonl(path)]


def _verdicts(rows, path):
  """{(prompt, ours, theirs): verdict} of those that have one."""
  out = {}
  for row in rows:
    if isinstance(row, fields.BadRecord) or not isinstance(row, dict):
      raise ValueError(f"{path} is damaged: a line is no JSON object")
    try:
      key = tuple(row[name] for name in ("prompt", "ours", "theirs"))
      value = row["verdict"]
    except KeyError as error:
      raise ValueError(
        f"{path}: a row has no field {error}; is it a judgements.jsonl?"
      ) from None
    if value is not None:
      out[key] = value
  return out
