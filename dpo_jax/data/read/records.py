"""A row of a data set, checked and made into a Record.

The forms of a row are listed in sources.py. Wherever a form has text, it may
have messages instead, {"role", "content"}; what is trained on is then one
message of the assistant, and all before it is the prompt.
"""

import itertools
from typing import Any, NamedTuple

from dpo_jax import lookup
from dpo_jax.data.read import fields, several, shapes, wording

_WANTED = {
  "preference": '{"prompt", "chosen", "rejected"}',
  "feedback": '{"prompt", "completion", "label"} or one for preferences',
  "sft": '{"prompt", "completion"}, {"messages"} or {"text"}',
  "label": '{"prompt", "completion", "label"} or {"text", "label"}',
  "prompt": '{"prompt"}',
  "completions": '{"prompt", "completion"} or {"prompt", "completions"}',
}


class Record(NamedTuple):
  """A prompt with completions, as read.

  Attributes:
    prompt: text before every completion, may be empty; or a tuple of messages,
      dicts of "role", "content" and whatever else a template may read
      (data/tokens/chat.py makes them text).
    completions: the texts; or, if the prompt is messages, tuples of one message
      of the assistant.
    pairs: (winner, loser) indices into `completions`; empty but for
      preferences.
    origin: "file:line" for messages to the user.
    labels: one per completion in the form "label", else None.
    source: which part of a mixture.
    tokens: ids of each completion as a policy drew it, or None.
    scores: a number for each completion, or None.
    probabilities: for each of `pairs`, that the winner is the better one; None
      where it is certain.
    ranking: indices into `completions`, best first, or None.
    tools: for the chat template, beside messages only; or None.
    bos: whether a prompt of text gets a BOS; False for what a chat template
      wrote without one, such as prompts that were sampled from.
    remarks: how the row was read, where that is not plain, and what of it was
      not; counted where records become examples.
  """

  prompt: str | tuple[dict, ...]
  completions: tuple[Any, ...]
  pairs: tuple[tuple[int, int], ...]
  origin: str
  labels: tuple[float, ...] | None = None
  source: int = 0
  tokens: tuple[list[int], ...] | None = None
  scores: tuple[float, ...] | None = None
  probabilities: tuple[float, ...] | None = None
  ranking: tuple[int, ...] | None = None
  tools: tuple[dict, ...] | None = None
  bos: bool = True
  remarks: tuple[str, ...] = ()


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
    row, remarks = shapes.standard(_there(row))
    row = fields.Row(row)
    try:
      record = make_form(row, origin)
    except fields.BadRecord as error:
      if error.reason != "missing field":
        raise
      raise fields.BadRecord(
        error.reason, f"{error}; a row is {_WANTED[form]}"
      ) from error
    if not isinstance(record.prompt, str) and "tools" in row:
      record = record._replace(tools=_tools(row))
    if isinstance(record.prompt, str) and "bos" in row:
      record = record._replace(bos=fields.field(row, "bos", bool))
    remarks += [*_odd(record), *_not_read(row)]
    return record._replace(remarks=tuple(remarks))


def _there(row):
  """The fields of a row that are there: a null is not, nor a list of them."""
  return {
    k: v
    for k, v in row.items()
    if v is not None
    and not (isinstance(v, list) and v and all(x is None for x in v))
  }


def _not_read(row):
  """Remarks on the fields of a fields.Row that hold what nothing looked at."""
  for name, value in row.items():
    if name not in row.read and not fields.is_empty(value):
      yield f"column {name!r} is not read"


def _odd(record):
  """Remarks on what is read as it is, and may be meant in another way."""
  out, prompt = [], record.prompt
  if not isinstance(prompt, str):
    if prompt[-1]["role"] == "assistant":
      out.append("prompt that ends in a turn of the assistant, not continued")
  elif prompt.strip() and _repeated(prompt, record.completions):
    out.append("prompt that every completion repeats at its beginning")
  for completion in record.completions:
    texts = [completion]
    if not isinstance(completion, str):
      texts = [t for message in completion for t in fields.texts(message)]
    if any(texts) and not "".join(texts).strip():
      out.append("completion of white space only")
  if record.probabilities is not None:
    out.append("comparison with a soft label, the probability that it is right")
  pairs = set(record.pairs)
  if len(record.pairs) > 1:
    both = sum(pair[::-1] in pairs for pair in pairs) // 2
    out += ["comparison given both ways round"] * both
    out += ["comparison given twice"] * (len(record.pairs) - len(pairs))
  return out


def _repeated(prompt, texts):
  return bool(texts) and all(text.startswith(prompt) for text in texts)


def _tools(row):
  """The tools of a row: a list, or the JSON of one; None if it is empty.

  As with messages, the text may be Python's repr too.
  """

  def read(text):
    if text.strip() in ("", "null", "None"):
      return []
    made = wording.parsed(text)
    if made is None:
      raise fields.BadRecord(
        "bad tools", f"field 'tools' is a text that is not JSON: {text!r:.40}"
      )
    return made

  tools = row["tools"]
  tools = read(tools) if isinstance(tools, str) else tools
  if isinstance(tools, list):
    tools = [read(t) if isinstance(t, str) else t for t in tools]
  if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
    raise fields.BadRecord(
      "bad tools",
      "field 'tools' must be a list of tools (objects), or the JSON of one, "
      f"not {tools!r:.40}",
    )
  return tuple(tools) or None


def _preference(row, origin):
  if "completions" in row:
    prompt, completions = several.completions(row)
    tokens = several.tokens(row, completions) if "tokens" in row else None
    ranking = several.ranking(row, completions) if "ranking" in row else None
    probabilities = None
    if ranking is None:
      pairs = several.pairs(row, completions)
      probabilities = several.probabilities(row, pairs)
    else:
      pairs = tuple(itertools.combinations(ranking, 2))
      several.check_different(pairs, completions)
    return Record(
      prompt,
      completions,
      pairs,
      origin,
      tokens=tokens,
      scores=several.scores(row, completions) if "scores" in row else None,
      probabilities=probabilities,
      ranking=ranking,
    )
  if "label" in row and "chosen" not in row:
    raise fields.BadRecord(
      "label",
      "the record has a label, and this loss compares completions; choose one "
      "of labels (kto, bco_unpaired), or give 'chosen' and 'rejected'",
    )
  prompt, sides = _sides(row, ("chosen", "rejected"))
  if fields.essence(sides[0]) == fields.essence(sides[1]):
    raise fields.BadRecord(
      "identical pair", "'chosen' and 'rejected' are the same text"
    )
  names = ("score_chosen", "score_rejected")
  scores = None
  if any(name in row for name in names):
    scores = tuple(fields.number(row, name) for name in names)
  soft = (fields.share(row, "probability"),) if "probability" in row else None
  compared = prompt, sides, ((0, 1),), origin
  return Record(*compared, scores=scores, probabilities=soft)


def _feedback(row, origin):
  compared = "chosen" in row or (
    "label" not in row and any(n in row for n in ("rejected", "completions"))
  )
  return (_preference if compared else _label)(row, origin)


def _sft(row, origin):
  if "messages" in row:
    return _messages(row, origin)
  if "text" in row:
    return Record("", (fields.text(row, "text"),), (), origin)
  if "completion" in row:
    prompt, sides = _sides(row, ("completion",))
  elif "completions" in row:
    prompt, sides = several.completions(row)
    sides = sides[several.best(row, sides) :]
  else:
    prompt, sides = _sides(row, ("chosen",))
  return Record(prompt, sides[:1], (), origin)


def _completions(row, origin):
  """All completions of a row, whatever it says of which is better."""
  if "completions" in row:
    prompt, sides = several.completions(row)
    tokens = several.tokens(row, sides) if "tokens" in row else None
    return Record(prompt, sides, (), origin, tokens=tokens)
  if "chosen" in row:
    record = _preference(row, origin)
    return record._replace(pairs=(), scores=None, probabilities=None)
  record = _sft(row, origin)
  if "tokens" not in row:
    return record
  each = fields.Row({"tokens": [fields.field(row, "tokens", list)]})
  return record._replace(tokens=several.tokens(each, record.completions))


def _messages(row, origin):
  """The record of one conversation, whose last message is the completion."""
  messages = fields.messages(row, "messages")
  prompt, reply = fields.split(messages, "field 'messages'")
  return Record(prompt, (reply,), (), origin)


def _prompt_only(row, origin):
  if "prompt" in row and not fields.holds_messages(row.get("chosen")):
    return Record(fields.prompt(row), (), (), origin)
  if "messages" in row:
    messages = fields.messages(row, "messages")
    if messages[-1]["role"] != "assistant":
      return Record(messages, (), (), origin)
  prompt = _sft(row, origin).prompt
  if not prompt:
    raise fields.BadRecord(
      "missing field",
      "the record has no prompt; set sample.prefix, for example (2, 8), to "
      "take the beginnings of texts",
    )
  return Record(prompt, (), (), origin)


def _label(row, origin):
  if "text" in row or not ("completion" in row or "messages" in row):
    record = Record("", (fields.text(row, "text"),), (), origin)
  elif "completion" in row:
    record = Record(*_sides(row, ("completion",)), (), origin)
  else:
    record = _messages(row, origin)
  return record._replace(labels=(fields.number(row, "label"),))


FORMS = {
  "preference": _preference,
  "feedback": _feedback,
  "sft": _sft,
  "label": _label,
  "prompt": _prompt_only,
  "completions": _completions,
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
  said = fields.essence(prompt)
  if any(fields.essence(part[0]) != said for part in parts):
    raise fields.BadRecord(
      "different prompts",
      f"{' and '.join(map(repr, names))} differ before their last message; a "
      "comparison is of two replies to one prompt",
    )
  if row.get("prompt"):  # some data sets repeat what the user said, as text
    said = fields.field(row, "prompt", str).strip()
    if said not in ["".join(fields.texts(m)).strip() for m in prompt]:
      raise fields.BadRecord(
        "different prompts",
        f"field 'prompt' is none of the messages of {names[0]!r}",
      )
  return prompt, tuple(reply for _, reply in parts)
