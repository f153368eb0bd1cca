"""What a chat template leaves out of the messages and tools that it gets.

What it reads is what changes its text when it is taken away.
"""

import json

from dpo_jax.data.read import fields

_KNOWN = {"role", "content"}  # keys that every template reads


def check_reply(text, prompt, reply, speak):
  """Raises BadRecord if a text has nothing of a reply without a content.

  Args:
    text: what the template writes of all messages.
    prompt: list of messages.
    reply: message.
    speak: see chat.render.
  """
  bare = {"role": reply["role"], "content": ""}
  if _written([*prompt, bare], speak) == text:
    raise fields.BadRecord(
      "template",
      "the chat template writes nothing of the reply; it does not read "
      f"{', '.join(map(repr, sorted(set(reply) - _KNOWN)))}",
    )


def remarks(record, texts, speak, joined):
  """Yields a remark on each key, tool, part and turn that is not read.

  Args:
    record: records.Record of messages.
    texts: what the template writes of them with each completion.
    speak: see chat.render.
    joined: whether parts of text were joined before it got them.
  Raises: BadRecord for a turn of fields.RARE_ROLES that it leaves out.
  """
  talks = [[*record.prompt, *reply] for reply in record.completions]

  def reads(change, **more):
    return texts != [_written(change(talk), speak, **more) for talk in talks]

  def reads_key(*keys):
    return reads(lambda talk: [_without(keys, m) for m in talk])

  pairs = (pair for talk in talks for m in talk for pair in m.items())
  keys = {k for k, value in pairs if not fields.is_empty(value)} - _KNOWN
  if keys and reads_key(*keys):
    keys = {key for key in keys if not reads_key(key)}
  for key in sorted(keys):
    yield f"message key {key!r} is not read by the chat template"
  if record.tools and not reads(list, tools=None):
    yield "column 'tools' is not read by the chat template"
  quoted = (
    json.dumps(arguments) in text and arguments not in text
    for talk, text in zip(talks, texts, strict=True)
    for arguments in _texts_of_calls(talk)
  )
  if any(quoted):
    yield (
      "arguments of a call are JSON in a text, which the chat template quotes; "
      "give them as objects"
    )
  parts = any(isinstance(m["content"], list) for talk in talks for m in talk)
  if parts and joined:
    yield "parts of text joined, which the chat template does not read"
  changed = {
    message["role"]
    for talk, text in zip(talks, texts, strict=True)
    for message in talk
    if not all(said.strip() in text for said in fields.texts(message))
  }
  for role in sorted(changed):
    if role in fields.RARE_ROLES and not reads(
      lambda talk, role=role: [m for m in talk if m["role"] != role]
    ):
      raise fields.BadRecord(
        "template",
        f"the chat template leaves out turns of the {role!r}; call it by a "
        "role that it writes",
      )
    yield f"turn of the {role} that the chat template does not write as it is"


def _texts_of_calls(talk):
  """Yields the arguments of the calls in some messages that are texts."""
  for message in talk:
    for call in message.get("tool_calls", ()):
      function = call.get("function")
      call = function if isinstance(function, dict) else call
      if isinstance(call.get("arguments"), str):
        yield call["arguments"]


def _written(talk, speak, **more):
  """The text of some messages; None if the template refuses them."""
  try:
    return speak(talk, False, **more)
  except fields.BadRecord:
    return None


def _without(keys, message):
  return {key: value for key, value in message.items() if key not in keys}
