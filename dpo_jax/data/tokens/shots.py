"""Prompts behind examples and in a template: what a base model is asked.

Of text, with k examples ("shots") of prompt and completion:

    HEAD  BEFORE prompt BETWEEN completion BEHIND  …  BEFORE prompt BETWEEN

A template spells this as HEAD{shots}BEFORE{prompt}BETWEEN{completion}BEHIND.
{shots} and {completion} may be left out: then there is nothing in front of the
examples, or nothing behind their completions. Spaces at the end of BETWEEN
stand before the completions of examples only: a model writes its own.

Of messages, examples are earlier turns of the conversation, behind its system
turn, and the tokenizer's chat template is the only template.
"""

from typing import NamedTuple

import numpy as np

from dpo_jax.data.read import fields

_LEADS = ("system", "developer")


class Template(NamedTuple):
  """The texts around prompts and completions, see the module docstring.

  Attributes:
    head, before, between, behind: as there.
    end: what stands behind the prompt that is asked: `between`, without its
      last spaces where a completion follows.
  """

  head: str = ""
  before: str = ""
  between: str = ""
  behind: str = ""
  end: str = ""


def template(text, field):
  """The Template of a text.

  Args:
    text: with {prompt} once, and perhaps {shots} before and {completion} after.
    field: that it is of, for messages.
  Raises: ValueError for marks that are missing, there twice or out of order.
  """
  marks = ("{shots}", "{prompt}", "{completion}")
  places = [text.find(mark) for mark in marks if mark in text]
  if (
    "{prompt}" not in text
    or any(text.count(mark) > 1 for mark in marks)
    or places != sorted(places)
  ):
    raise ValueError(
      f"{field} = {text!r:.60} must have {{prompt}} once; {{shots}}, where "
      "examples go, may stand once before it, {completion} once after it"
    )
  head, shots, form = text.partition("{shots}")
  if not shots:
    head, form = "", text
  before, _, rest = form.partition("{prompt}")
  between, completion, behind = rest.partition("{completion}")
  end = between.rstrip(" ") if completion else between
  return Template(head, before, between, behind, end)


def pool(records, seed):
  """Records that may be examples, in the order in which they are drawn.

  Args:
    records: list of records.Record with a completion each.
    seed: of the order; prompts are there once, with their first completion.
  Raises: ValueError for a record that cannot stand before another prompt.
  """
  distinct = {}
  for record in records:
    if not record.prompt:
      raise ValueError(
        f"{record.origin}: an example needs a prompt beside its completion; "
        "give {'prompt', 'completion'} to sample.shots_from"
      )
    if not isinstance(record.prompt, str) and (
      record.tools is not None
      or any(message["role"] in _LEADS for message in record.prompt)
    ):
      raise ValueError(
        f"{record.origin}: a conversation with a system turn or tools of its "
        "own cannot be an earlier part of another; take them out of "
        "sample.shots_from"
      )
    distinct.setdefault(repr(_key(record.prompt)), record)
  everyone = list(distinct.values())
  # Not the order of the prompts, which may be of the same source.
  order = np.random.default_rng([seed, 1]).permutation(len(everyone))
  return [everyone[i] for i in order]


def chosen(pool, prompt, count):
  """The first `count` of a pool that do not give a prompt's answer away.

  That would be one of the same prompt, or one that goes on from it: a later
  turn of the same dialogue, the text of which it is the beginning.

  Args:
    pool: list of records.Record.
    prompt: text, or tuple of messages.
    count: of examples.
  Returns: list of records.Record; the same for all other prompts.
  Raises: ValueError if there are too few, or text is mixed with messages.
  """
  out, own = [], _key(prompt)
  for record in pool:
    if isinstance(record.prompt, str) != isinstance(prompt, str):
      raise ValueError(
        f"{record.origin}: examples of text stand before prompts of text only, "
        "messages before messages: give sample.shots_from and sample.prompts "
        "the same form"
      )
    if len(out) == count:
      break
    whole = _key(record.prompt + record.completions[0])
    if own not in (_key(record.prompt), whole[: len(own)]):
      out.append(record)
  if len(out) < count:
    raise ValueError(
      f"sample.shots = {count}: sample.shots_from has {len(out)} examples that "
      f"are not of the prompt {prompt!r:.40}; lower it, or give more"
    )
  return out


def _key(prompt):
  """What prompts are compared by: text, or what messages say."""
  if isinstance(prompt, str):
    return prompt.strip()
  return fields.essence(prompt)


def text(form, prompt, examples):
  """A prompt of text in a Template, behind examples."""
  parts = [form.head]
  for record in examples:
    parts += [form.before, record.prompt, form.between]
    parts += [record.completions[0], form.behind]
  return "".join([*parts, form.before, prompt, form.end])


def conversation(record, examples):
  """A records.Record of messages behind those of examples."""
  count = 0
  while count < len(record.prompt) and record.prompt[count]["role"] in _LEADS:
    count += 1
  turns = [
    message
    for example in examples
    for message in (*example.prompt, *example.completions[0])
  ]
  whole = (*record.prompt[:count], *turns, *record.prompt[count:])
  return record._replace(prompt=whole)
