"""A row of a data set, checked and made into a Record.

The forms of a row are listed in sources.py. Wherever a form has text, it may
have messages instead, {"role", "content"}; what is trained on is then one
message of the assistant, and all before it is the prompt.
"""

import itertools
import math
import numbers
from typing import Any, NamedTuple

from dpo_jax import lookup
from dpo_jax.data.read import fields


class Record(NamedTuple):
  """A prompt with completions, as read.

  Attributes:
    prompt: text before every completion, may be empty; or a tuple of messages,
      dicts of "role" and "content" (data/tokens/chat.py makes them text).
    completions: the texts; or, if the prompt is messages, tuples of one message
      of the assistant.
    pairs: (winner, loser) indices into `completions`; empty but for
      preferences.
    origin: "file:line" for messages to the user.
    labels: one per completion in the form "label", else None.
    source: which part of a mixture.
    tokens: ids of each completion as a policy drew it, or None.
    scores: a number for each completion, or None.
    ranking: indices into `completions`, best first, or None.
  """

  prompt: str | tuple[dict, ...]
  completions: tuple[Any, ...]
  pairs: tuple[tuple[int, int], ...]
  origin: str
  labels: tuple[float, ...] | None = None
  source: int = 0
  tokens: tuple[list[int], ...] | None = None
  scores: tuple[float, ...] | None = None
  ranking: tuple[int, ...] | None = None


def make(row, form, origin):
  """The Record of a row.

  Args:
    row: what was read, as a rule a dict; or the BadRecord that it is.
    form: of FORMS.
    origin: "file:line".
  Raises: fields.BadRecord.
  """
  make_form = lookup.lookup(FORMS, form, "form")
  with fields.at(origin):
    if isinstance(row, fields.BadRecord):
      raise row
    if not isinstance(row, dict):
      message = f"a record must be an object, not {row!r:.40}"
      raise fields.BadRecord("wrong type", message)
    return make_form(row, origin)


def _preference(row, origin):
  if "completions" in row:
    prompt, completions = _completions(row)
    tokens = _tokens(row, completions) if "tokens" in row else None
    ranking = _ranking(row, completions) if "ranking" in row else None
    if ranking is None:
      pairs = _pairs(row, completions)
    else:
      pairs = tuple(itertools.combinations(ranking, 2))
      _check_different(pairs, completions)
    return Record(
      prompt,
      completions,
      pairs,
      origin,
      tokens=tokens,
      scores=_scores(row, completions) if "scores" in row else None,
      ranking=ranking,
    )
  if "label" in row and "chosen" not in row:
    raise fields.BadRecord(
      "label",
      "the record has a label, and this loss compares completions; choose one "
      "of labels (kto, bco_unpaired), or give 'chosen' and 'rejected'",
    )
  prompt, sides = _sides(row, ("chosen", "rejected"))
  if sides[0] == sides[1]:
    raise fields.BadRecord(
      "identical pair", "'chosen' and 'rejected' are the same text"
    )
  names = ("score_chosen", "score_rejected")
  scores = None
  if any(name in row for name in names):
    scores = tuple(_number(row, name) for name in names)
  return Record(prompt, sides, ((0, 1),), origin, scores=scores)


def _feedback(row, origin):
  return (_label if "label" in row else _preference)(row, origin)


def _sft(row, origin):
  if "messages" in row:
    messages = fields.messages(row, "messages")
    prompt, reply = fields.split(messages, "field 'messages'")
    return Record(prompt, (reply,), (), origin)
  if "text" in row:
    return Record("", (fields.text(row, "text"),), (), origin)
  if "completion" in row:
    prompt, sides = _sides(row, ("completion",))
  elif "completions" in row:
    prompt, sides = _completions(row)
  else:
    prompt, sides = _sides(row, ("chosen",))
  return Record(prompt, sides[:1], (), origin)


def _prompt_only(row, origin):
  if "prompt" in row and not fields.holds_messages(row.get("chosen")):
    return Record(fields.prompt(row), (), (), origin)
  prompt = _sft(row, origin).prompt
  if not prompt:
    raise fields.BadRecord(
      "missing field",
      "the record has no prompt; set sample.prefix, for example (2, 8), to "
      "take the beginnings of texts",
    )
  return Record(prompt, (), (), origin)


def _label(row, origin):
  if "text" in row or "completion" not in row:
    prompt, sides = "", (fields.text(row, "text"),)
  else:
    prompt, sides = _sides(row, ("completion",))
  label = _number(row, "label")
  return Record(prompt, sides, (), origin, labels=(label,))


def _number(row, name):
  """A finite number."""
  value = fields.field(row, name, numbers.Real, "a number or a bool")
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  if not math.isfinite(number):
    raise fields.BadRecord(
      f"bad {name}", f"field {name!r} must be finite, not {value!r:.40}"
    )
  return number


FORMS = {
  "preference": _preference,
  "feedback": _feedback,
  "sft": _sft,
  "label": _label,
  "prompt": _prompt_only,
}


def _sides(row, names):
  """The prompt and the completions that stand in the fields `names`."""
  if fields.holds_messages(row.get(names[0])) and not isinstance(
    row.get("prompt"), list
  ):
    return _conversations(row, names)
  prompt = fields.prompt(row)
  if isinstance(prompt, str):
    return prompt, tuple(fields.text(row, name) for name in names)
  kind = "a list of messages, as 'prompt' is"
  for name in names:
    fields.field(row, name, list, kind)
  return prompt, tuple(
    fields.reply(fields.messages(row, name), f"field {name!r}")
    for name in names
  )


def _conversations(row, names):
  """Whole conversations, whose last message is the completion."""
  parts = []
  for name in names:
    messages = fields.messages(row, name)
    parts.append(fields.split(messages, f"field {name!r}"))
  prompt = parts[0][0]
  if any(part[0] != prompt for part in parts):
    raise fields.BadRecord(
      "different prompts",
      f"{' and '.join(map(repr, names))} differ before their last message; a "
      "comparison is of two replies to one prompt",
    )
  if "prompt" in row:  # some data sets repeat what the user said, as text
    said = fields.field(row, "prompt", str)
    if said.strip() not in [m["content"].strip() for m in prompt]:
      raise fields.BadRecord(
        "different prompts",
        f"field 'prompt' is none of the messages of {names[0]!r}",
      )
  return prompt, tuple(reply for _, reply in parts)


def _completions(row):
  """The prompt and the completions of the form with K of them."""
  prompt = fields.prompt(row)
  values = fields.field(row, "completions", list)
  if not values:
    raise fields.BadRecord("empty", "field 'completions' is empty")
  out = []
  for k, value in enumerate(values):
    where = f"'completions'[{k}]"
    if not isinstance(prompt, str):
      out.append(fields.reply(fields.check_messages(value, where), where))
      continue
    if not isinstance(value, str) or not value:
      raise fields.BadRecord(
        "empty" if value == "" else "wrong type",
        f"{where} must be a non-empty string, not {value!r:.40}",
      )
    fields.check_text(value, where)
    out.append(value)
  return prompt, tuple(out)


def _tokens(row, completions):
  """Ids of each completion, which must be text."""
  lists = fields.field(row, "tokens", list)
  good = len(lists) == len(completions) and isinstance(completions[0], str)
  good = good and all(isinstance(ids, list) and ids for ids in lists)
  if not good or any(type(i) is not int or i < 0 for ids in lists for i in ids):
    raise fields.BadRecord(
      "bad tokens",
      "'tokens' must hold a non-empty list of ids for each of "
      f"{len(completions)} completions that are text",
    )
  return tuple(lists)


def _pairs(row, completions):
  pairs = fields.field(row, "pairs", list)
  if not pairs:
    raise fields.BadRecord("empty", "field 'pairs' is empty")
  count = len(completions)
  for pair in pairs:
    good = isinstance(pair, list) and len(pair) == 2
    good = good and all(type(k) is int and 0 <= k < count for k in pair)
    if not good or pair[0] == pair[1]:
      raise fields.BadRecord(
        "bad pair",
        f"'pairs' holds {pair!r}; each must be [winner, loser], two different "
        f"indices below {count}",
      )
  _check_different(pairs, completions)
  return tuple(map(tuple, pairs))


def _check_different(pairs, completions):
  for one, other in pairs:
    if completions[one] == completions[other]:
      raise fields.BadRecord(
        "identical pair", f"completions of {[one, other]} are the same text"
      )


def _ranking(row, completions):
  """All completions by their indices, best first."""
  ranking = fields.field(row, "ranking", list)
  whole = all(type(k) is int for k in ranking)
  if not whole or sorted(ranking) != list(range(len(completions))):
    raise fields.BadRecord(
      "bad ranking",
      f"'ranking' = {ranking!r:.60} must name each of the {len(completions)} "
      "completions once, best first",
    )
  if len(ranking) < 2:
    raise fields.BadRecord(
      "bad ranking", "a ranking is of two completions or more"
    )
  return tuple(ranking)


def _scores(row, completions):
  """A finite number for each completion."""
  scores = fields.field(row, "scores", list)
  if len(scores) != len(completions):
    raise fields.BadRecord(
      "bad scores",
      f"'scores' has {len(scores)} numbers for {len(completions)} completions",
    )
  return tuple(_number({"scores": s}, "scores") for s in scores)
