"""Shapes of single public data sets, each as its authors wrote it.

Each function takes a row and returns it nearer to a form of sources.py, or None
if the row has another shape.
"""

import re

from dpo_jax.data.read import fields

_TURN = "\n\nAssistant:"
_ASKED = "\n\nHuman:"
_SUMMARY = "TL;DR:"
# Whether answer A is the better one, as tables write it.
_FIRST = {
  **{"true": True, "1": True, "1.0": True},
  **{"false": False, "0": False, "0.0": False},
}
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


def preferences(row):
  """Stanford Human Preferences, as the original repository frames it."""
  answers = "human_ref_A", "human_ref_B"
  first = _FIRST.get(str(row.get("labels")).lower())
  if first is None or "history" not in row:
    return None
  if not all(isinstance(row.get(name), str) for name in answers):
    return None
  better, worse = "AB" if first else "BA"
  made = {
    "prompt": f"\n\nHuman: {row['history']}{_TURN}",
    "chosen": f" {row[f'human_ref_{better}']}",
    "rejected": f" {row[f'human_ref_{worse}']}",
  }
  for name, side in (("score_chosen", better), ("score_rejected", worse)):
    score = row.get(f"score_{side}")
    text = isinstance(score, str) and _NUMBER.fullmatch(score.strip())
    made[name] = float(score) if text else score
  used = {"history", *answers, "labels", "score_A", "score_B"}
  made |= {k: v for k, v in row.items() if k not in used}
  return {k: v for k, v in made.items() if v is not None}


def dialogues(row):
  """Whole dialogues as text, cut as in the original repository."""
  chosen, rejected = row.get("chosen"), row.get("rejected")
  if "prompt" in row or not all(
    isinstance(x, str) and x.lstrip().startswith("Human:") and _TURN in x
    for x in (chosen, rejected)
  ):
    return None
  prompt = chosen[: chosen.rfind(_TURN) + len(_TURN)]
  if not rejected.startswith(prompt) or _TURN in rejected[len(prompt) :]:
    raise fields.BadRecord(
      "different prompts",
      "'chosen' and 'rejected' differ before their last 'Assistant:'; a "
      "comparison is of two replies to one prompt",
    )
  replies = {n: row[n][len(prompt) :] for n in ("chosen", "rejected")}
  return {**row, "prompt": prompt, **replies}


def summaries(row):
  """Summaries of Reddit posts that begin with what ends the prompts of others.

  In CarperAI's comparisons "TL;DR:" stands before both summaries, in its
  demonstrations at the end of the prompt, where a policy is asked for one.
  """
  prompt, sides = row.get("prompt"), ("chosen", "rejected")
  texts = [row.get(name) for name in sides]
  if not isinstance(prompt, str) or not all(
    isinstance(x, str) and x.startswith(_SUMMARY) for x in texts
  ):
    return None
  gap = "" if prompt.endswith("\n") else "\n"
  replies = {n: _apart(row[n].removeprefix(_SUMMARY)) for n in sides}
  return {**row, "prompt": f"{prompt}{gap}{_SUMMARY}", **replies}


def summary(row):
  """A summary that would run into the "TL;DR:" in front of it."""
  prompt, text = row.get("prompt"), row.get("completion")
  if not isinstance(prompt, str) or not prompt.endswith(_SUMMARY):
    return None
  if not isinstance(text, str) or _apart(text) == text:
    return None
  return {**row, "completion": _apart(text)}


def _apart(text):
  """A text behind a mark, with the space that stands between."""
  return text if text[:1].isspace() or not text else f" {text}"


def one_turn(row):
  """Whether a row is a dialogue of text in which a human speaks once."""
  talk = row.get("chosen")
  return isinstance(talk, str) and talk.count(_ASKED) == 1
