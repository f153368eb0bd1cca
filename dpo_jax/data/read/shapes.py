"""Rows in the shapes of others, made into the forms of sources.py.

Each entry of SHAPES is a shape that people's data has and what is counted where
a row has it; it makes of the row one that is nearer to a form. The entries are
tried in turn, so a row may pass through several. What cannot be told for sure
(which of two answers is the better one) has no entry.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from dpo_jax.data.read import fields, public, wording

_TRUTH = {"true": True, "false": False}
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


class Shape(NamedTuple):
  """A shape of rows.

  Attributes:
    remark: what is counted for each row that has it.
    read: function (row) -> the row nearer to a form, or None if it has another
      shape; what it is given stays as it was.
    columns: of which the row has one; None if it has messages somewhere.
  """

  remark: str
  read: Callable
  columns: tuple[str, ...] | None = None


def standard(row):
  """(row in a form of sources.py, remarks how it was read).

  Raises: BadRecord for what is certainly not meant as it is.
  """
  remarks, talks = [], wording.may_talk(row)
  for shape in SHAPES:
    if shape.columns is None and not talks:
      continue
    if shape.columns is not None and row.keys().isdisjoint(shape.columns):
      continue
    made = shape.read(row)
    if made is not None:
      row = made
      remarks.append(shape.remark)
  return row, remarks


def _label_of_text(row):
  label = row.get("label")
  text = label.strip().lower() if isinstance(label, str) else ""
  if text in _TRUTH:
    return {**row, "label": _TRUTH[text]}
  return {**row, "label": float(text)} if _NUMBER.fullmatch(text) else None


def _label_of_words(row):
  """A text that is a number or true or false is a label; others are replies."""
  label = row.get("label")
  if not isinstance(label, str) or _is_label(label):
    return None
  if not isinstance(row.get("prompt"), str) or wording.replies(row):
    return None
  return None if "text" in row else _renamed(row, label="completion")


def _is_label(text):
  text = text.strip()
  return text.lower() in _TRUTH or bool(_NUMBER.fullmatch(text))


def _tagged(row):
  if "label" not in row and "kto_tag" in row:
    return _renamed(row, kto_tag="label")
  return None


def _renamed(row, **names):
  return {names.get(name, name): value for name, value in row.items()}


def _one_of(names, ours, row):
  """A row whose field has another name; two of them are not told apart."""
  there = [name for name in names if isinstance(row.get(name), str)]
  if ours in row or len(there) != 1 or _complete(row):
    return None
  return _renamed(row, **{there[0]: ours})


def _complete(row):
  """Whether a row needs no prompt, by what stands in it."""
  if any(name in row for name in ("text", "messages")):
    return not wording.replies(row)
  return any(wording.is_talk(x) and len(x) > 1 for x in wording.replies(row))


def _instruction(row):
  """An instruction and, perhaps, its input."""
  task, given = row.get("instruction"), row.get("input", "")
  if "prompt" in row or _complete(row):
    return None
  if not isinstance(task, str) or not isinstance(given, str):
    return None
  made = {k: v for k, v in row.items() if k not in ("instruction", "input")}
  return {**made, "prompt": f"{task}\n\n{given}" if given else task}


def _answer(row):
  if "prompt" not in row or "completions" in row or "chosen" in row:
    return None
  return _one_of(_ANSWERED, "completion", row)


def _both_answers(theirs, row):
  if "chosen" in row or "rejected" in row or "completions" in row:
    return None
  if not all(isinstance(row.get(name), str) for name in theirs):
    return None
  return _renamed(row, **dict(zip(theirs, ("chosen", "rejected"), strict=True)))


def _rejected_beside_messages(row):
  """A conversation with the better reply, and a worse one: text, or whole."""
  talk, worse = row.get("messages"), row.get("rejected_response")
  if not wording.is_talk(talk) or wording.replies(row):
    return None
  other = row.get("rejected_messages")
  if isinstance(worse, str):
    other = [*talk[:-1], {"role": "assistant", "content": worse}]
  if not wording.is_talk(other):
    return None
  used = ("messages", "rejected_response", "rejected_messages")
  made = {k: v for k, v in row.items() if k not in used}
  return {**made, "chosen": talk, "rejected": other}


def _messages_before(row):
  """The prompt in "messages", beside replies of one message or text."""
  talk, replies = row.get("messages"), wording.replies(row)
  if "prompt" in row or not replies or not wording.is_talk(talk):
    return None
  if talk[-1]["role"] == "assistant" or not all(
    isinstance(x, str) or (wording.is_talk(x) and len(x) == 1) for x in replies
  ):
    return None
  return _renamed(row, messages="prompt")


def _whole_behind_prompt(row):
  """Replies that are whole conversations, and begin with the prompt."""
  prompt, replies = row.get("prompt"), wording.replies(row)
  if not wording.is_talk(prompt) or not replies:
    return None
  size, said = len(prompt), _said(prompt)
  if not all(
    wording.is_talk(x) and len(x) > size and _said(x[:size]) == said
    for x in replies
  ):
    return None
  return wording.changed(row, wording.REPLIES, lambda value: value[size:])


def _said(talk):
  return [(m["role"], _joined(m.get("content"))) for m in talk]


def _joined(content):
  """The text of a content, be it one or parts of text."""
  if not fields.holds_messages(content):
    return content
  return "".join(str(dict(part).get("text")) for part in content)


def _text_behind_messages(row):
  if not wording.is_talk(row.get("prompt")):
    return None

  def read(value):
    if isinstance(value, str) and value:
      return [{"role": "assistant", "content": value}]
    return value

  return wording.changed(row, wording.REPLIES, read)


def _message_behind_text(row):
  prompt, replies = row.get("prompt"), wording.replies(row)
  if not isinstance(prompt, str) or not prompt or not replies:
    return None
  if not all(wording.is_talk(x) and len(x) == 1 for x in replies):
    return None
  return {**row, "prompt": [{"role": "user", "content": prompt}]}


def _system(row):
  """(name, text) of the column for the system turn; None if it says nothing."""
  for name in _SYSTEM:
    if name not in row:
      continue
    turns = wording.talk(row[name]) or ()
    text = row[name]
    if [turn.get("role") for turn in turns] == ["system"]:
      text = turns[0].get("content")
    if fields.field({name: text}, name, str).strip():
      return name, text
  return None


def _system_in_text(row):
  prompt = row.get("prompt")
  if not isinstance(prompt, str) or _complete(row):
    return None
  system = _system(row)
  if system is None:
    return None
  name, text = system
  gap = "" if text[-1].isspace() or not prompt else "\n\n"
  made = {k: v for k, v in row.items() if k != name}
  return {**made, "prompt": text + gap + prompt}


def _system_turn(row):
  """The system column as the first turn of the lists that begin a dialogue."""
  begins = ["prompt"]
  if not wording.is_talk(row.get("prompt")):
    begins = [n for n in wording.REPLIES if wording.is_talk(row.get(n))]
    begins = [n for n in begins if len(row[n]) > 1] or ["messages"]
  system = _system(row) if wording.is_talk(row.get(begins[0])) else None
  if system is None:
    return None
  name, text = system
  made = {k: v for k, v in row.items() if k != name}
  for n in begins:
    first = row[n][0]
    if first["role"] != "system":
      made[n] = [{"role": "system", "content": text}, *row[n]]
    elif first.get("content") != text:
      raise fields.BadRecord(
        "two systems",
        f"field {name!r} is {text!r:.40}, and {n!r} begins with another system "
        f"turn, {first.get('content')!r:.40}; take one of them out",
      )
  return made


_SYSTEM = ("system", "system_prompt")
_J_AND_K = ("response_j", "response_k")
_RESPONSES = ("chosen_response", "rejected_response")
_ASKED = ("question", "query", "input")
_ANSWERED = ("output", "response", "answer")
SHAPES = (
  Shape("messages read from JSON in a text", wording.from_json),
  Shape("messages read from Python's repr in a text", wording.from_repr),
  Shape("messages read from lists of their parts", wording.from_columns),
  Shape("'conversations' read as 'messages'", wording.from_conversations),
  Shape(
    "from, value, human and gpt read as role, content, user and assistant",
    wording.from_other_words,
  ),
  Shape("one message read as a list of one", wording.from_one),
  Shape("'kto_tag' read as 'label'", _tagged, ("kto_tag",)),
  Shape("'label' of words read as 'completion'", _label_of_words, ("label",)),
  Shape("label read from a text", _label_of_text, ("label",)),
  Shape(
    "'history' and 'human_ref_…' read as a dialogue of Human and Assistant",
    *(public.preferences, ("history",)),
  ),
  Shape(
    "dialogue cut behind its last 'Assistant:'",
    *(public.dialogues, ("chosen",)),
  ),
  Shape(
    "space put between 'TL;DR:' and the summary",
    *(public.summary, ("completion",)),
  ),
  Shape(
    "'TL;DR:' before both replies read as the end of the prompt",
    *(public.summaries, ("chosen",)),
  ),
  Shape(
    "'response_j' and '…_k' read as 'chosen' and 'rejected'",
    *(functools.partial(_both_answers, _J_AND_K), _J_AND_K),
  ),
  Shape(
    "'chosen_response' and 'rejected_…' read as 'chosen' and 'rejected'",
    *(functools.partial(_both_answers, _RESPONSES), _RESPONSES),
  ),
  Shape(
    "'instruction' (and 'input' behind it) read as 'prompt'",
    *(_instruction, ("instruction",)),
  ),
  Shape(
    "'question', 'query' or 'input' read as 'prompt'",
    *(functools.partial(_one_of, _ASKED, "prompt"), _ASKED),
  ),
  Shape(
    "'output', 'response' or 'answer' read as 'completion'",
    *(_answer, _ANSWERED),
  ),
  Shape(
    "'messages' read as 'chosen', 'rejected_…' as another end of it",
    _rejected_beside_messages,
  ),
  Shape("'messages' read as 'prompt'", _messages_before),
  Shape("prompt taken off replies that begin with it", _whole_behind_prompt),
  Shape("replies of text read as messages", _text_behind_messages),
  Shape("prompt of text read as a message of the user", _message_behind_text),
  Shape("system text put in front of the prompt", _system_in_text, _SYSTEM),
  Shape("system text put in front as the first turn", _system_turn, _SYSTEM),
)
