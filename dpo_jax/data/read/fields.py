"""Reading a field of a row: its type, its text, its messages."""

import contextlib

from dpo_jax import lookup

ROLES = ("system", "user", "assistant", "tool")


class BadRecord(ValueError):
  """A record that cannot be used; the message says what to do."""

  def __init__(self, reason, message):
    super().__init__(reason, message)  # by which another process has it too
    self.reason = reason

  def __str__(self):
    return self.args[1]


@contextlib.contextmanager
def at(place):
  """Puts before the message of a BadRecord where it is."""
  try:
    yield
  except BadRecord as error:
    raise BadRecord(error.reason, f"{place}: {error}") from error


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
    with at(place):
      role = field(message, "role", str)
      if role not in ROLES:
        raise BadRecord(
          "bad role",
          f"role {role!r} is not known{lookup.nearest(role, ROLES)} "
          f"(allowed: {', '.join(ROLES)})",
        )
      out.append({"role": role, "content": field(message, "content", str)})
  return tuple(out)


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
  if not messages[0]["content"]:
    raise BadRecord("empty", f"{where}: the last message is empty")
  return messages
