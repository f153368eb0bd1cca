"""Messages to text, by the tokenizer's own chat template.

The text of a completion is what the template adds to the prompt. It ends in the
template's own end of turn ("<|im_end|>"), without the white space that follows
it there; that token is scored and no EOS is put behind it, be it the EOS or
not. Where a template writes no end of turn, one EOS is the end.
"""

import datetime
import functools
import re
from typing import NamedTuple

from dpo_jax.data.read import fields, records


class Rendered(NamedTuple):
  """A record whose messages are text.

  Attributes:
    record: records.Record of str.
    ended: whether completions end in the template's own end of turn.
  """

  record: records.Record
  ended: bool


# Where templates write the date. Llama 3's own writes this without a clock.
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = datetime.date(2024, 7, 26)
_ASKED = [{"role": "user", "content": "question"}]  # of a probe


def template(hf):
  """Function (messages, add_generation_prompt=…) -> str of a tokenizer's own.

  The date that it writes is always the same, or tokens would differ from day to
  day and with them all that is kept of them.
  """
  text = None  # of several templates transformers chooses
  if isinstance(hf.chat_template, str):
    text = _NOW.sub(
      lambda found: repr(_DAY.strftime(found[2])), hf.chat_template
    )
  return functools.partial(
    hf.apply_chat_template, tokenize=False, chat_template=text
  )


def render_record(record, apply_template):
  """The Rendered of a record, whether it holds messages or text.

  Args: records.Record, and tokenize.Tokenizer.apply_template.
  Raises: ValueError if a template is needed and missing; BadRecord for messages
    that it refuses.
  """
  if isinstance(record.prompt, str):
    return Rendered(record, False)
  _need_template(record, apply_template)
  end = end_of_turn(apply_template)
  prompt, completions, ended = None, [], bool(end.strip())
  for messages in record.completions:
    prompt, text = render(record.prompt, messages, apply_template)
    if text.endswith(end):
      text = text.removesuffix(end) + end.rstrip()
    else:
      ended = False
    completions.append(text)
  made = record._replace(prompt=prompt, completions=tuple(completions))
  return Rendered(made, ended)


def prompt_text(record, apply_template):
  """The prompt of a record as text, with the head of a reply after messages.

  Args, Raises: see `render_record`.
  """
  if isinstance(record.prompt, str):
    return record.prompt
  _need_template(record, apply_template)
  return _apply(apply_template, list(record.prompt), True)


def _need_template(record, apply_template):
  if apply_template is None:
    raise ValueError(
      f"{record.origin}: messages need a tokenizer with a chat template, which "
      "this one has not; name the tokenizer of a chat model, or give text"
    )


def render(prompt_messages, completion_messages, apply_template):
  """(prompt text, completion text) of messages.

      prompt      = template(prompt messages, with the head of a reply)
      completion  = template(all messages) − prompt

  Raises: BadRecord where the template refuses the messages, or writes the
    prompt in another way once a reply follows.
  """
  prompt_messages = list(prompt_messages)
  both = prompt_messages + list(completion_messages)
  prompt = _apply(apply_template, prompt_messages, True)
  whole = _apply(apply_template, both, False)
  if not whole.startswith(prompt):
    raise fields.BadRecord(
      "template",
      "the chat template writes the prompt in another way once a reply "
      f"follows: {prompt[-40:]!r} is not the beginning of the reply",
    )
  if whole == prompt:
    raise fields.BadRecord(
      "template", "the chat template writes nothing for the reply"
    )
  return prompt, whole[len(prompt) :]


@functools.lru_cache(maxsize=8)
def end_of_turn(apply_template):
  """What a template writes after a reply, white space included."""
  probe = "probe of the end"
  replied = [{"role": "assistant", "content": probe}]
  _, text = render(_ASKED, replied, apply_template)
  return text.rpartition(probe)[2]


def end_ids(apply_template, encode, specials):
  """The token that ends a turn of a template, in a tuple; () if none does.

  It is the only one, or a special one that others follow, as in Phi-3's
  "<|end|>\n<|endoftext|>": no text goes on behind it.
  """
  if apply_template is None:
    return ()
  try:
    end = end_of_turn(apply_template).strip()
  except (fields.BadRecord, ValueError):  # it refuses the probe
    return ()
  ids = encode([end])[0] if end else []
  return tuple(ids[:1]) if len(ids) == 1 or {*ids[:1]} & set(specials) else ()


def marks_turns(bos, apply_template):
  """Whether a chat template begins every turn with the "BOS".

  Such a token ("<|im_start|>" of some models) begins no text.
  """
  if bos is None or apply_template is None:
    return False
  messages = [*_ASKED, {"role": "assistant", "content": "reply"}]
  try:
    return _apply(apply_template, messages, False).count(bos) > 1
  except (fields.BadRecord, ValueError):  # it refuses the probe
    return False


def _apply(apply_template, messages, add_generation_prompt):
  try:
    return apply_template(messages, add_generation_prompt=add_generation_prompt)
  except ImportError as error:
    raise ValueError(
      "chat templates need jinja2: pip install jinja2"
    ) from error
  except Exception as error:  # a template raises anything
    raise fields.BadRecord(
      "template", f"the chat template refuses the messages: {error}"
    ) from error
