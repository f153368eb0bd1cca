"""Messages as others write them: as text, in other words, one for a list.

Functions row -> the row with its messages as fields.py reads them, or None if
there is nothing to change. They are entries of the table in shapes.py.
"""

import ast
import json
import re

from dpo_jax.data.read import fields

REPLIES = ("chosen", "rejected", "completion")
_TALKS = ("prompt", "messages", *REPLIES)  # where messages may stand
_MORE_TALKS = (*_TALKS, "conversations", "conversation")
_ROLES = {
  **{role: role for role in fields.ROLES},
  **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
  **{"model": "assistant", "bot": "assistant", "observation": "tool"},
}
_LIKE_MESSAGES = re.compile(
  r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]"""
)


def replies(row):
  """All replies of a row, as they stand in its fields."""
  more = row.get("completions")
  out = [row[name] for name in REPLIES if name in row]
  return out + (more if isinstance(more, list) else [])


def changed(row, names, change):
  """The row with `change` made in some fields, or None if it changes nothing.

  Each of "completions" is changed with them.
  """
  made = {name: change(row[name]) for name in names if name in row}
  if isinstance(row.get("completions"), list):
    made["completions"] = [change(value) for value in row["completions"]]
  made = {name: value for name, value in made.items() if value != row[name]}
  return {**row, **made} if made else None


def may_talk(row):
  """Whether messages, or texts that may be of messages, are in a row."""
  values = [row[name] for name in _MORE_TALKS if name in row]
  return any(
    not isinstance(x, str) or x.lstrip()[:1] in ("[", "{")
    for x in values + replies(row)
  )


def is_talk(value):
  """Whether a value is a list of messages, in whatever words."""
  return isinstance(value, list) and value and all(map(_is_message, value))


def _is_message(value):
  if not isinstance(value, dict):
    return False
  role = value.get("role", value.get("from"))
  if not isinstance(role, str) or role not in _ROLES:
    return False
  return any(key in value for key in ("content", "value", *fields.INSTEAD))


def from_json(row):
  """Messages that are the text of their JSON."""
  return _spelt(row, json.loads)


def from_repr(row):
  """Messages that are the text of their Python objects.

  Raises: BadRecord for text that begins like messages and is neither.
  """
  made = _spelt(row, ast.literal_eval)
  if made is None:
    _refuse_damaged(row)
  return made


def _spelt(row, parse):
  def read(value):
    if not isinstance(value, str) or not _LIKE_MESSAGES.match(value):
      return value
    parsed = _parsed(value, parse)
    return parsed if _is_message(parsed) or is_talk(parsed) else value

  made = changed(row, _MORE_TALKS, read)
  if made is None:
    return None
  said = changed(row, REPLIES, read) or row
  if said is not row and any(isinstance(x, str) for x in replies(said)):
    return None  # one answer is text, so the other may be text about JSON
  return made


def _parsed(text, *parsers):
  for parse in parsers:
    try:
      return parse(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue
  return None


def _refuse_damaged(row):
  # All of them: one answer may well be text about messages.
  whole = [row[n] for n in ("messages", "conversations") if n in row]
  texts = replies(row) or whole
  if texts and all(
    isinstance(x, str)
    and _LIKE_MESSAGES.match(x)
    and _parsed(x, json.loads, ast.literal_eval) is None
    for x in texts
  ):
    raise fields.BadRecord(
      "wrong type",
      f"{texts[0]!r:.40} begins like messages and is neither JSON nor Python's "
      "repr of them; write lists as JSON (json.dumps), or save as .jsonl or "
      ".parquet",
    )


def from_columns(row):
  """{"role": [...], "content": [...]} where a list of messages is meant."""

  def read(value):
    if not isinstance(value, dict) or not value:
      return value
    if not all(isinstance(column, list) for column in value.values()):
      return value
    if len({len(column) for column in value.values()}) > 1:
      return value
    every = [
      dict(zip(value, cells, strict=True))
      for cells in zip(*value.values(), strict=True)
    ]
    return every if is_talk(every) else value

  return changed(row, _MORE_TALKS, read)


def from_conversations(row):
  """Messages in a field of another name."""
  for name in ("conversations", "conversation"):
    if "messages" not in row and is_talk(row.get(name)):
      made = {k: v for k, v in row.items() if k != name}
      return {**made, "messages": row[name]}
  return None


def from_other_words(row):
  """Messages of "from" and "value", or with the roles "human" and "gpt"."""

  def message(value):
    value = dict(value)
    for theirs, ours in (("from", "role"), ("value", "content")):
      if theirs in value and ours not in value:
        value[ours] = value.pop(theirs)
    return {**value, "role": _ROLES[value["role"]]}

  def read(value):
    if is_talk(value):
      return list(map(message, value))
    return message(value) if _is_message(value) else value

  return changed(row, _TALKS, read)


def from_one(row):
  """A message where a list of one is meant."""
  return changed(
    row, _TALKS, lambda value: [value] if _is_message(value) else value
  )
