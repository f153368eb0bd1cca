"""A row of a data set, checked and made into a Record.

The forms of a row are listed in data/sources.py. Wherever a form has text, it
may have messages instead, {"role", "content"}; what is trained on is then one
message of the assistant, and all before it is the prompt.
"""

import math
import numbers
from typing import Any, NamedTuple

from dpo_jax import lookup

ROLES = ("system", "user", "assistant", "tool")


class Record(NamedTuple):
  """A prompt with completions, as read.

  Attributes:
    prompt: text before every completion, may be empty; or a tuple of messages,
      dicts of "role" and "content" (data/chat.py makes them text).
    completions: the texts; or, if the prompt is messages, tuples of one message
      of the assistant.
    pairs: (winner, loser) indices into `completions`; empty but for
      preferences.
    origin: "file:line" for messages to the user.
    labels: one per completion in the form "label", else None.
    source: which part of a mixture.
    tokens: ids of each completion as a policy drew it, or None.
  """

  prompt: str | tuple[dict, ...]
  completions: tuple[Any, ...]
  pairs: tuple[tuple[int, int], ...]
  origin: str
  labels: tuple[float, ...] | None = None
  source: int = 0
  tokens: tuple[list[int], ...] | None = None


class BadRecord(ValueError):
  """A record that cannot be used; the message says where and what to do."""

  def __init__(self, reason, message):
    super().__init__(message)
    self.reason = reason


def make(row, form, origin):
  """The Record of a row.

  Args:
    row: what was read, as a rule a dict.
    form: "preference", "sft", "label" or "prompt".
    origin: "file:line".
  Raises: BadRecord.
  """
  make_form = lookup.lookup(FORMS, form, "form")
  if not isinstance(row, dict):
    raise BadRecord(
      "wrong type", f"{origin}: a record must be an object, not {row!r:.40}"
    )
  return make_form(row, origin)


def _preference(row, origin):
  if "completions" in row:
    prompt, completions = _completions(row, origin)
    pairs = _pairs(row, completions, origin)
    tokens = _tokens(row, completions, origin) if "tokens" in row else None
    return Record(prompt, completions, pairs, origin, tokens=tokens)
  prompt, sides = _sides(row, ("chosen", "rejected"), origin)
  if sides[0] == sides[1]:
    raise BadRecord(
      "identical pair", f"{origin}: 'chosen' and 'rejected' are the same text"
    )
  return Record(prompt, sides, ((0, 1),), origin)


def _sft(row, origin):
  if "messages" in row:
    messages = _messages(row, "messages", origin)
    prompt, reply = _split(messages, f"{origin}: field 'messages'")
    return Record(prompt, (reply,), (), origin)
  if "text" in row:
    return Record("", (_text(row, "text", origin),), (), origin)
  if "completion" in row:
    prompt, sides = _sides(row, ("completion",), origin)
  elif "completions" in row:
    prompt, sides = _completions(row, origin)
  else:
    prompt, sides = _sides(row, ("chosen",), origin)
  return Record(prompt, sides[:1], (), origin)


def _prompt_only(row, origin):
  if "prompt" in row and not _holds_messages(row.get("chosen")):
    return Record(_prompt(row, origin), (), (), origin)
  prompt = _sft(row, origin).prompt
  if not prompt:
    raise BadRecord(
      "missing field",
      f"{origin}: the record has no prompt; set sample.prefix, for example "
      "(2, 8), to take the beginnings of texts",
    )
  return Record(prompt, (), (), origin)


def _label(row, origin):
  if "text" in row or "completion" not in row:
    prompt, sides = "", (_text(row, "text", origin),)
  else:
    prompt, sides = _sides(row, ("completion",), origin)
  label = _field(row, "label", numbers.Real, origin, "a number or a bool")
  try:
    value = float(label)
  except OverflowError:
    value = math.inf
  if not math.isfinite(value):
    raise BadRecord(
      "bad label", f"{origin}: field 'label' must be finite, not {label!r:.40}"
    )
  return Record(prompt, sides, (), origin, labels=(value,))


FORMS = {
  "preference": _preference,
  "sft": _sft,
  "label": _label,
  "prompt": _prompt_only,
}


def _sides(row, names, origin):
  """The prompt and the completions that stand in the fields `names`."""
  if _holds_messages(row.get(names[0])) and not isinstance(
    row.get("prompt"), list
  ):
    return _conversations(row, names, origin)
  prompt = _prompt(row, origin)
  if isinstance(prompt, str):
    return prompt, tuple(_text(row, name, origin) for name in names)
  kind = "a list of messages, as 'prompt' is"
  for name in names:
    _field(row, name, list, origin, kind)
  return prompt, tuple(
    _reply(_messages(row, name, origin), f"{origin}: field {name!r}")
    for name in names
  )


def _conversations(row, names, origin):
  """Whole conversations, whose last message is the completion."""
  parts = []
  for name in names:
    _field(row, name, list, origin)
    messages = _messages(row, name, origin)
    parts.append(_split(messages, f"{origin}: field {name!r}"))
  prompt = parts[0][0]
  if any(part[0] != prompt for part in parts):
    raise BadRecord(
      "different prompts",
      f"{origin}: {' and '.join(map(repr, names))} differ before their last "
      "message; a comparison is of two replies to one prompt",
    )
  if "prompt" in row:  # some data sets repeat what the user said, as text
    said = _field(row, "prompt", str, origin)
    if said.strip() not in [m["content"].strip() for m in prompt]:
      raise BadRecord(
        "different prompts",
        f"{origin}: field 'prompt' is none of the messages of {names[0]!r}",
      )
  return prompt, tuple(reply for _, reply in parts)


def _completions(row, origin):
  """The prompt and the completions of the form with K of them."""
  prompt = _prompt(row, origin)
  values = _field(row, "completions", list, origin)
  if not values:
    raise BadRecord("empty", f"{origin}: field 'completions' is empty")
  out = []
  for k, value in enumerate(values):
    where = f"{origin}: 'completions'[{k}]"
    if not isinstance(prompt, str):
      out.append(_reply(_check_messages(value, where), where))
      continue
    if not isinstance(value, str) or not value:
      raise BadRecord(
        "empty" if value == "" else "wrong type",
        f"{where} must be a non-empty string, not {value!r:.40}",
      )
    _check_text(value, where)
    out.append(value)
  return prompt, tuple(out)


def _tokens(row, completions, origin):
  """Ids of each completion, which must be text."""
  lists = _field(row, "tokens", list, origin)
  good = len(lists) == len(completions) and isinstance(completions[0], str)
  good = good and all(isinstance(ids, list) and ids for ids in lists)
  if not good or any(type(i) is not int or i < 0 for ids in lists for i in ids):
    raise BadRecord(
      "bad tokens",
      f"{origin}: 'tokens' must hold a non-empty list of ids for each of "
      f"{len(completions)} completions that are text",
    )
  return tuple(lists)


def _pairs(row, completions, origin):
  pairs = _field(row, "pairs", list, origin)
  if not pairs:
    raise BadRecord("empty", f"{origin}: field 'pairs' is empty")
  count = len(completions)
  for pair in pairs:
    good = isinstance(pair, list) and len(pair) == 2
    good = good and all(type(k) is int and 0 <= k < count for k in pair)
    if not good or pair[0] == pair[1]:
      raise BadRecord(
        "bad pair",
        f"{origin}: 'pairs' holds {pair!r}; each must be [winner, loser], two "
        f"different indices below {count}",
      )
    if completions[pair[0]] == completions[pair[1]]:
      raise BadRecord(
        "identical pair", f"{origin}: completions of {pair} are the same text"
      )
  return tuple(map(tuple, pairs))


def _field(row, name, kind, origin, what=None):
  if name not in row:
    have = ", ".join(map(repr, row)) or "nothing"
    raise BadRecord(
      "missing field",
      f"{origin}: field {name!r} is missing{lookup.nearest(name, row)} "
      f"(the record has {have})",
    )
  if not isinstance(row[name], kind):
    raise BadRecord(
      "wrong type",
      f"{origin}: field {name!r} must be {what or kind.__name__}, not "
      f"{type(row[name]).__name__}",
    )
  if kind is str:
    _check_text(row[name], f"{origin}: field {name!r}")
  return row[name]


def _text(row, name, origin):
  text = _field(row, name, str, origin)
  if not text:
    raise BadRecord("empty", f"{origin}: field {name!r} is empty")
  return text


def _prompt(row, origin):
  if isinstance(row.get("prompt"), list):
    return _messages(row, "prompt", origin)
  return _field(row, "prompt", str, origin)


def _check_text(text, where):
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadRecord("invalid UTF-8", f"{where} is not text: {error}") from error


def _holds_messages(value):
  return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _messages(row, name, origin):
  return _check_messages(
    _field(row, name, list, origin), f"{origin}: field {name!r}"
  )


def _check_messages(messages, where):
  """The messages with their role and content only."""
  if not isinstance(messages, list) or not messages:
    raise BadRecord(
      "empty" if messages == [] else "wrong type",
      f"{where} must be a list of messages, not {messages!r:.40}",
    )
  out = []
  for k, message in enumerate(messages):
    place = f"{where}[{k}]"
    if not isinstance(message, dict):
      raise BadRecord(
        "wrong type", f"{place} must be a message, not {message!r:.40}"
      )
    role = _field(message, "role", str, place)
    if role not in ROLES:
      raise BadRecord(
        "bad role",
        f"{place}: role {role!r} is not known{lookup.nearest(role, ROLES)} "
        f"(allowed: {', '.join(ROLES)})",
      )
    content = _field(message, "content", str, place)
    out.append({"role": role, "content": content})
  return tuple(out)


def _split(messages, where):
  """(all but the last message, the last), which is the assistant's."""
  if len(messages) < 2:
    raise BadRecord(
      "empty", f"{where} has one message; a prompt must come before the reply"
    )
  return messages[:-1], _reply(messages[-1:], where)


def _reply(messages, where):
  """A completion: one message of the assistant, not empty."""
  if messages[-1]["role"] != "assistant":
    raise BadRecord(
      "bad role",
      f"{where} must end in a message of the assistant, not of the "
      f"{messages[-1]['role']}",
    )
  if len(messages) > 1:
    raise BadRecord(
      "several turns",
      f"{where} has {len(messages)} messages; only the last is a completion, "
      "the others belong to 'prompt'",
    )
  if not messages[0]["content"]:
    raise BadRecord("empty", f"{where}: the last message is empty")
  return messages
