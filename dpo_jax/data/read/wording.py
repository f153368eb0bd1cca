"""Messages as others write them: as text, in other words, one for a list.

Functions row -> the row with its messages as fields.py reads them, or None if
there is nothing to change. They are entries of the table in shapes.py.
"""

import ast
import re

from dpo_jax import lookup
from dpo_jax.data.read import fields

REPLIES = ("chosen", "rejected", "completion")
_TALKS = ("prompt", "messages", *REPLIES)  # where messages may stand
_MORE_TALKS = (*_TALKS, "conversations", "conversation")
_BEFORE = ("prompt", "messages", "conversations", "conversation")
_ROLES = {
  **{role: role for role in fields.ROLES},
  **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
  **{"model": "assistant", "bot": "assistant", "observation": "tool"},
}
_MAY_BE_LIST = re.compile(r"""\s*("?\s*[\[{]|array\()""")
# The beginning of messages, whatever comes after it.
_LIKE_MESSAGES = re.compile(
  r"""\s*(array\()?\[?\s*\{\s*['"]((role|content|from|value)['"]|"""
  r"""\w+['"]\s*:.*['"](role|from)['"]\s*:\s*['"](system|user|assistant|human"""
  r"""|gpt)['"])""",
  re.DOTALL,
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
    not isinstance(x, str) or _MAY_BE_LIST.match(x)
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
  return _spelt(row, fields.from_json)


def from_repr(row):
  """Messages that are the text of their Python objects.

  Raises: BadRecord for text that begins like messages and is neither.
  """
  made = _spelt(row, ast.literal_eval)
  _refuse_damaged(made or row)
  return made


def parsed(text, *parsers):
  """What a text is the JSON or Python's repr of; None if it is neither.

  Args:
    parsers: some of fields.from_json and ast.literal_eval; none means both.
  Raises: BadRecord for JSON with a key that is there twice.
  """
  for parse in parsers or (fields.from_json, ast.literal_eval):
    try:
      value = parse(text.strip())
    except fields.BadRecord:
      raise
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      continue
    again = isinstance(value, str) and _MAY_BE_LIST.match(value)
    return parsed(value, parse) if again else value
  return None


def talk(value):
  """The list of messages that a value is, or is the text of; else None."""
  if isinstance(value, str):
    value = _read(value)
  value = [value] if _is_message(value) else value
  return value if is_talk(value) else None


def _read(text, *parsers):
  """`parsed` of a text that may be messages, or about anything."""
  if not _MAY_BE_LIST.match(text):
    return None
  try:
    return parsed(text, *parsers)
  except fields.BadRecord:
    if _LIKE_MESSAGES.match(text):
      raise
    return None


def _spelt(row, parse):
  def read(value):
    made = _read(value, parse) if isinstance(value, str) else None
    return made if _is_message(made) or is_talk(made) else value

  made = changed(row, _MORE_TALKS, read)
  if made is None:
    return None
  said = changed(row, REPLIES, read) or row
  if said is row or not any(isinstance(x, str) for x in replies(said)):
    return made
  if replies(made) != replies(row) and any(
    made.get(name) is not row.get(name) for name in _BEFORE
  ):
    raise fields.BadRecord(
      "wrong type",
      "the prompt and one reply are messages written as text, another reply is "
      "not; write all replies in one way",
    )
  return None  # one answer is text, so the other may be text about JSON


def _refuse_damaged(row):
  """Raises BadRecord for text that must be messages and cannot be read."""
  said, before = replies(row), [row[n] for n in _BEFORE if n in row]
  damaged = [
    x
    for x in said + before
    if isinstance(x, str) and _LIKE_MESSAGES.match(x) and parsed(x) is None
  ]
  # Of a single answer it is not sure: it may be text about messages.
  whole = said or [x for n, x in row.items() if n in _BEFORE[1:]]
  if damaged and (
    any(map(is_talk, said + before)) or all(x in damaged for x in whole)
  ):
    raise fields.BadRecord(
      "wrong type",
      f"{damaged[0]!r:.40} begins like messages and is neither JSON nor "
      "Python's repr of them, or was cut short; write lists as JSON "
      "(json.dumps), or save as .jsonl or .parquet",
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
  """Messages in a field of another name.

  Raises: BadRecord for one that has roles of its own, and is all there is.
  """
  for name in _BEFORE[2:]:
    if "messages" not in row and is_talk(row.get(name)):
      made = {k: v for k, v in row.items() if k != name}
      return {**made, "messages": row[name]}
    if fields.holds_messages(row.get(name)) and row.keys().isdisjoint(
      (*_TALKS, "text", "completions")
    ):
      _check_roles(row[name], name)
  return None


def _check_roles(messages, name):
  for k, message in enumerate(messages):
    role = isinstance(message, dict) and message.get(
      "role", message.get("from")
    )
    if isinstance(role, str) and role not in _ROLES:
      raise fields.BadRecord(
        "bad role",
        f"field {name!r}[{k}]: role {role!r} is not known"
        f"{lookup.nearest(role, _ROLES)} (allowed: {', '.join(_ROLES)})",
      )


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
