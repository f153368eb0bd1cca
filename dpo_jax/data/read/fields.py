"""Reading a field of a row: its type, its text, its messages."""

import contextlib
import json
import math
import numbers

from dpo_jax import lookup

# Of some templates only, which must then write what they say.
RARE_ROLES = ("developer", "function", "ipython")
ROLES = ("system", "user", "assistant", "tool", *RARE_ROLES)
# A message may have these in place of a content.
INSTEAD = (
  *("tool_calls", "function_call"),
  *("reasoning_content", "reasoning", "thinking"),
)
# By these two messages differ; by other keys (an id, a date) they do not.
_SAID = ("role", "name", "tool_call_id", *INSTEAD)


class BadRecord(ValueError):
  """A record that cannot be used; the message says what to do."""

  def __init__(self, reason, message):
    super().__init__(reason, message)  # by which another process has it too
    self.reason = reason

  def __str__(self):
    return self.args[1]


class Row(dict):
  """A row that notes by `read` which of its fields are looked up."""

  def __init__(self, values):
    super().__init__(values)
    self.read = set()

  def __getitem__(self, name):
    self.read.add(name)
    return super().__getitem__(name)

  def get(self, name, default=None):
    self.read.add(name)
    return super().get(name, default)


@contextlib.contextmanager
def at(place):
  """Puts before the message of a BadRecord where it is."""
  try:
    yield
  except BadRecord as error:
    raise BadRecord(error.reason, f"{place}: {error}") from error


def without_nulls(value, whole=()):
  """A value without the keys that are null, however deep.

  Args:
    whole: keys whose values stay as they are.
  """
  if isinstance(value, dict):
    return {
      k: v if k in whole else without_nulls(v, whole)
      for k, v in value.items()
      if v is not None
    }
  if isinstance(value, list) and value and isinstance(value[0], dict | list):
    return [without_nulls(v, whole) for v in value]
  return value


def from_json(text):
  """The value of a JSON text.

  Raises: ValueError for no JSON, and BadRecord for a key that is there twice.
  """
  return json.loads(text, object_pairs_hook=_object)


def _object(pairs):
  """A JSON object, of which no key may be given twice: one would be lost."""
  out = dict(pairs)
  if len(out) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise BadRecord(
      "key twice", f"the key {twice!r} stands twice in one object; take one out"
    )
  return out


def is_empty(value):
  """Whether a value that is there says nothing: no text, no items."""
  return isinstance(value, str | list | dict) and not value


def field(row, name, kind, what=None):
  if name not in row:
    have = ", ".join(map(repr, row)) or "nothing"
    raise BadRecord(
      "missing field",
      f"field {name!r} is missing{lookup.nearest(name, row)} "
      f"(the record has {have})",
    )
  if not isinstance(row[name], kind):
    raise BadRecord(
      "wrong type",
      f"field {name!r} must be {what or kind.__name__}, not "
      f"{type(row[name]).__name__}",
    )
  if kind is str:
    check_text(row[name], f"field {name!r}")
  return row[name]


def text(row, name):
  text = field(row, name, str)
  if not text:
    raise BadRecord("empty", f"field {name!r} is empty")
  return text


def number(row, name):
  """A finite number."""
  value = field(row, name, numbers.Real, "a number or a bool")
  try:
    out = float(value)
  except OverflowError:
    out = math.inf
  if not math.isfinite(out):
    raise BadRecord(
      f"bad {name}", f"field {name!r} must be finite, not {value!r:.40}"
    )
  return out


def share(row, name):
  """A number from 0 to 1."""
  out = number(row, name)
  if not 0 <= out <= 1:
    raise BadRecord(
      f"bad {name}", f"field {name!r} must be from 0 to 1, not {out}"
    )
  return out


def prompt(row):
  if isinstance(row.get("prompt"), list):
    return messages(row, "prompt")
  return field(row, "prompt", str)


def check_text(value, where):
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadRecord("invalid UTF-8", f"{where} is not text: {error}") from error


def holds_messages(value):
  return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def messages(row, name):
  return check_messages(field(row, name, list), f"field {name!r}")


def check_messages(messages, where):
  """The messages with all their keys, but for those that are null.

  Each gets a content: a text, or a list of parts of text.
  """
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
    with at(place):
      out.append(_message(without_nulls(message, whole=("arguments",))))
  return tuple(out)


def _message(message):
  role = field(message, "role", str)
  if role not in ROLES:
    raise BadRecord(
      "bad role",
      f"role {role!r} is not known{lookup.nearest(role, ROLES)} "
      f"(allowed: {', '.join(ROLES)})",
    )
  if "tool_calls" in message:
    calls = _calls(message["tool_calls"])
    # Tables have an empty list where there is no call; templates that ask only
    # whether the key is there would write calls, and leave the content out.
    message = {k: v for k, v in message.items() if k != "tool_calls"}
    message |= {"tool_calls": calls} if calls else {}
  if any(message.get(key) for key in INSTEAD):
    message = {"role": role, "content": "", **message}
  if isinstance(message.get("content"), list):
    _check_parts(message["content"])
  else:
    field(message, "content", str, "text")
  return message


def _calls(value):
  """The calls of a message: a list, or the JSON of one, as tables have it."""
  calls = value
  if isinstance(value, str):
    try:
      calls = from_json(value) or [] if value.strip() else []
    except (ValueError, RecursionError):
      calls = None
  if isinstance(calls, list) and all(isinstance(c, dict) for c in calls):
    return calls
  raise BadRecord(
    "bad tool calls",
    "field 'tool_calls' must be a list of calls (objects), or the JSON of one, "
    f"not {value!r:.40}",
  )


def _check_parts(parts):
  for k, part in enumerate(parts):
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
      raise BadRecord(
        "not text",
        f"field 'content'[{k}] is a part of the type {kind!r}; only parts of "
        "the type 'text' can be trained on",
      )
    with at(f"field 'content'[{k}]"):
      field(part, "text", str)
  if not parts:
    raise BadRecord("empty", "field 'content' is an empty list")


def texts(message):
  """The texts of a message: one, or that of each part."""
  content = message["content"]
  if isinstance(content, str):
    return [content]
  return [part["text"] for part in content]


def essence(completion):
  """What two completions or prompts are compared by: text, or messages."""
  if isinstance(completion, str):
    return completion
  return [
    ("".join(texts(message)), *map(message.get, _SAID))
    for message in completion
  ]


def split(messages, where):
  """(all but the last message, the last), which is the assistant's."""
  if len(messages) < 2:
    raise BadRecord(
      "empty", f"{where} has one message; a prompt must come before the reply"
    )
  return messages[:-1], reply(messages[-1:], where)


def reply(messages, where):
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
  if not any(texts(messages[0])) and not any(map(messages[0].get, INSTEAD)):
    raise BadRecord("empty", f"{where}: the last message is empty")
  return messages
