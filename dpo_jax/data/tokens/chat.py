"""Messages to text, by the tokenizer's own chat template.

The template gets messages and tools whole. The text of a completion is what it
adds to the prompt. It ends in the template's own end of turn ("<|im_end|>"),
without what follows it there; that token is scored and no EOS is put behind it,
be it the EOS or not. Where a template writes no end, one EOS is the end.
"""

import datetime
import functools
import itertools
import json
import re
from typing import NamedTuple

from dpo_jax.data.read import fields, records
from dpo_jax.data.tokens import limit, unread


class Rendered(NamedTuple):
  """A record whose messages are text.

  Attributes:
    record: records.Record of str; its remarks say what the template left out.
    ended: whether each completion ends in the template's own end of turn.
    templated: whether a template wrote it, so that no BOS is put in front.
  """

  record: records.Record
  ended: tuple[bool, ...]
  templated: bool


class Prompt(NamedTuple):
  """A prompt as text.

  Attributes:
    text: the prompt, with the head of a reply behind messages.
    templated: see Rendered.
  """

  text: str
  templated: bool


# Where templates write the date. Llama 3's own writes this without a clock.
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = datetime.date(2024, 7, 26)
_SECONDS = 10.0  # that a template may take; milliseconds are usual
_ASKED = [{"role": "user", "content": "question"}]  # of a probe


def template(hf):
  """Function (messages, add_generation_prompt=…, tools=…) -> str of `hf`.

  Of several templates transformers chooses, by whether there are tools. The
  date that it writes is always the same, or tokens would differ from day to day
  and with them all that is kept of them.
  """

  @functools.cache
  def source(has_tools):
    text = hf.get_chat_template(None, [] if has_tools else None)
    return _NOW.sub(lambda found: repr(_DAY.strftime(found[2])), text)

  def apply(messages, add_generation_prompt, tools=None):
    return limit.within(
      _SECONDS,
      f"the chat template of {hf.name_or_path} is not done after "
      f"{_SECONDS:.0f} seconds: does it loop for ever? Mend 'chat_template' in "
      "the tokenizer's folder, or give prompt and completions as text",
      lambda: hf.apply_chat_template(
        messages,
        tools=tools,
        tokenize=False,
        chat_template=source(tools is not None),
        add_generation_prompt=add_generation_prompt,
      ),
    )

  return apply


def render_record(record, tokenizer):
  """The Rendered of a record, whether it holds messages or text.

  Args: records.Record, and tokenize.Tokenizer.
  Raises: ValueError if a template is needed and missing; BadRecord for messages
    that it refuses.
  """
  if isinstance(record.prompt, str):
    ended = (False,) * len(record.completions)
    return Rendered(record, ended, templated=not record.bos)
  apply = tokenizer.apply_template
  speak = _speaker(record, apply)
  prompt, completions, left_out = render(
    record.prompt, record.completions, speak, tokenizer.encode
  )
  end = end_of_turn(apply)
  specials = tuple(tokenizer.specials.values())
  ends = [_cut_behind_end(text, end, specials) for text in completions]
  for text, (reply,) in zip(completions, record.completions, strict=True):
    if not any(fields.texts(reply)):
      unread.check_reply(prompt + text, record.prompt, reply, speak)
  whole = [prompt + text for text in completions]
  joined = not _reads_parts(apply)
  remarks = [*record.remarks, *unread.remarks(record, whole, speak, joined)]
  if left_out:
    remarks.append(
      f"trained without {left_out!r}, which the chat template puts before a "
      "sampled reply only"
    )
  made = record._replace(
    prompt=prompt,
    completions=tuple(text for text, _ in ends),
    remarks=tuple(remarks),
  )
  return Rendered(made, tuple(ended for _, ended in ends), True)


def prompt(record, apply_template):
  """The Prompt of a record.

  Args: records.Record, and tokenize.Tokenizer.apply_template.
  Raises: see `render_record`.
  """
  if isinstance(record.prompt, str):
    return Prompt(record.prompt, templated=not record.bos)
  speak = _speaker(record, apply_template)
  return Prompt(speak(record.prompt, True), True)


def _speaker(record, apply_template):
  """Function (messages, head, tools=…) -> the text of a template, checked."""
  if apply_template is None:
    raise ValueError(
      f"{record.origin}: messages need a tokenizer with a chat template, which "
      "this one has not; name the tokenizer of a chat model, or give text"
    )
  tools = None if record.tools is None else list(record.tools)
  return functools.partial(_apply, apply_template, tools=tools)


def render(prompt, replies, speak, encode=None):
  """Messages as text: (prompt, [completions], what of the prompt is left out).

      prompt      = what template(prompt messages, with the head of a reply) and
                    all template(all messages) begin with
      completion  = template(all messages) − prompt

  The two differ where the head of a sampled reply is not that of a given one:
  "<think>" in front of what is to be thought.

  Args:
    prompt: list of messages.
    replies: list of lists of one message.
    speak: function (messages, head of a reply or not) -> str.
    encode: of the tokenizer; the prompt then ends where a token does.
  Raises: BadRecord where the template refuses the messages, or writes the
    prompt in another way once a reply follows.
  """
  whole = speak(prompt, True)
  texts = [speak([*prompt, *reply], False) for reply in replies]
  head = whole
  if not all(text.startswith(whole) for text in texts):
    head = _common(whole, texts, prompt, speak, encode)
  if head in texts:
    raise fields.BadRecord(
      "template", "the chat template writes nothing for the reply"
    )
  return head, [text[len(head) :] for text in texts], whole[len(head) :]


def _common(whole, texts, prompt, speak, encode):
  """What all texts begin with, if the messages of the prompt are in it."""
  same = (
    len(set(letters)) == 1 for letters in zip(whole, *texts, strict=False)
  )
  size = sum(1 for _ in itertools.takewhile(bool, same))
  least, said = speak(prompt, False).rstrip(), fields.texts(prompt[-1])[-1]
  if whole.startswith(least):
    least = len(least)
  elif said.strip() and said.strip() in whole:
    least = whole.rfind(said.strip()) + len(said.strip())
  else:
    least = len(whole)
  while encode is not None and size >= least:
    ids, *more = encode([whole[:size], *texts])
    if all(other[: len(ids)] == ids for other in more):
      break
    size -= 1  # a token straddles the end
  if size < least:
    raise fields.BadRecord(
      "template",
      "the chat template writes the prompt in another way once a reply "
      f"follows: {whole[size:][:40]!r} is not there then; mend 'chat_template' "
      "in the tokenizer's folder, or give prompt and completions as text",
    )
  return whole[:size]


def _cut_behind_end(text, end, specials):
  """(completion without what follows its end, whether it has one).

  The first special token ends a turn: behind Phi-3's "<|end|>" is an EOS that
  no sample reaches. Calls of tools may end in another token than answers do.
  """
  if end.strip() and text.endswith(end):
    words = [(end.index(x), -len(x)) for x in specials if x and x in end]
    start, size = min(words, default=(len(end), 0))
    return text.removesuffix(end) + end[: start - size].rstrip(), True
  if text.rstrip().endswith(specials):
    return text.rstrip(), True
  return text.removesuffix(end), False


@functools.lru_cache(maxsize=8)
def end_of_turn(apply_template):
  """What a template writes after a reply, white space included."""
  probe = "probe of the end"
  replied = [*_ASKED, {"role": "assistant", "content": probe}]
  try:
    text = _apply(apply_template, replied, False)
  except fields.BadRecord:  # it wants other messages
    return ""
  _, found, end = text.rpartition(probe)
  return end if found else ""  # else it writes a reply in other words


@functools.lru_cache(maxsize=8)
def forms(apply_template):
  """A question, its answer, and one behind a rule, as a template writes them.

  None stands for what it refuses. Templates that agree in these are the same.
  """
  replied = [*_ASKED, {"role": "assistant", "content": "answer"}]
  ruled = [{"role": "system", "content": "rule"}, *_ASKED]
  out = []
  for messages, head in ((_ASKED, True), (replied, False), (ruled, True)):
    try:
      out.append(_apply(apply_template, messages, head))
    except fields.BadRecord:
      out.append(None)
  return tuple(out)


def wrote(apply_template, prompt):
  """Whether a text is a prompt of a template: it ends as a question does."""
  asked = forms(apply_template)[0] or ""
  tail = asked.rpartition(_ASKED[0]["content"])[2]
  return bool(tail.strip()) and prompt.endswith(tail)


def end_ids(apply_template, encode, added):
  """The token that ends a turn of a template, in a tuple; () if none does.

  It is one of the added tokens, which no text holds, with or without others
  behind it, as in Phi-3's "<|end|>\n<|endoftext|>".

  Args:
    apply_template, encode: see tokenize.Tokenizer.
    added: ids that were added to the vocabulary of text.
  """
  if apply_template is None:
    return ()
  try:
    end = end_of_turn(apply_template).strip()
  except limit.TooLong:
    raise
  except (fields.BadRecord, ValueError):  # it refuses the probe
    return ()
  ids = encode([end])[0] if end else []
  return tuple(i for i in ids[:1] if i in added)


def marks_turns(bos, apply_template):
  """Whether a chat template begins every turn with the "BOS".

  Such a token ("<|im_start|>" of some models) begins no text.
  """
  if bos is None or apply_template is None:
    return False
  messages = [*_ASKED, {"role": "assistant", "content": "reply"}]
  try:
    return _apply(apply_template, messages, False).count(bos) > 1
  except limit.TooLong:
    raise
  except (fields.BadRecord, ValueError):  # it refuses the probe
    return False


@functools.lru_cache(maxsize=8)
def _reads_parts(apply_template):
  """Whether a template writes the texts of a content that is a list."""
  parts = [{"type": "text", "text": f"probe {word}"} for word in ("one", "two")]
  try:
    text = apply_template(
      [{"role": "user", "content": parts}], add_generation_prompt=False
    )
  except limit.TooLong:
    raise
  except Exception:  # a template raises anything
    return False
  written = all(part["text"] in text for part in parts)
  return written and not any(x in text for x in (str(parts), json.dumps(parts)))


def _apply(apply_template, messages, add_generation_prompt, tools=None):
  messages = list(messages)
  for k, message in enumerate(messages):
    if isinstance(message["content"], list) and not _reads_parts(
      apply_template
    ):
      joined = "".join(fields.texts(message))
      messages[k] = {**message, "content": joined}
  more = {} if tools is None else {"tools": tools}
  try:
    text = apply_template(
      messages, add_generation_prompt=add_generation_prompt, **more
    )
  except ImportError as error:
    raise ValueError(
      "chat templates need jinja2: pip install jinja2"
    ) from error
  except limit.TooLong:  # of no one record: how long depends on the machine
    raise
  except Exception as error:  # a template raises anything
    raise fields.BadRecord(
      "template", f"the chat template refuses the messages: {error}"
    ) from error
  fields.check_text(text, "what the chat template writes")
  return text
