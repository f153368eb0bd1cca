"""What a model is asked: a prompt, its template, its examples, its stop texts.

A base model answers a prompt as the text before it suggests (`sample.template`,
`sample.shots`), and then writes on, as a rule the next example: `sample.stop`
names the texts that end an answer.
"""

import bisect
from typing import NamedTuple

from etils import epath

from dpo_jax import store
from dpo_jax.data.read import fields, sources
from dpo_jax.data.tokens import chat, shots, tokenize

_FIELD = "sample.template"


def template(spec):
  """The shots.Template of `sample.template`; None: prompts as they are.

  Args:
    spec: a text with {prompt} in it, or else the file of one, without the line
      break at its end.
  Raises: ValueError for a file that is not there, or marks out of place.
  """
  if spec is None or "{prompt}" in spec:
    return shots.template("{prompt}" if spec is None else spec, _FIELD)
  hint = f"{_FIELD} is a text with {{prompt}} in it, or the file of one"
  with store.explained(f"{_FIELD} = {spec!r:.60}: cannot be read", hint):
    text = epath.Path(spec).read_text(encoding="utf-8")
  return shots.template(text.removesuffix("\n"), f"{_FIELD} ({spec})")


class _Around(NamedTuple):
  """What stands around the prompts of a config.

  Attributes:
    form: shots.Template.
    pool: records.Record that may be examples.
    count: of examples.
    own: whether there is a template of the user's own.
  """

  form: shots.Template
  pool: list
  count: int
  own: bool


def _around(options, policy):
  """The _Around of config.sample; None if prompts stand alone."""
  if options.template is None and options.shots == 0:
    return None
  pool = []
  if options.shots > 0:
    field = "sample.shots_from"
    if any(w != 1 for w, _ in sources.parse(options.shots_from, field)):
      raise ValueError(f"{field}: weights have no effect; leave them out")
    records = sources.load(options.shots_from, "sft", policy, field)
    pool = shots.pool(records, options.seed)
  form, own = template(options.template), options.template is not None
  return _Around(form, pool, options.shots, own)


def _asked(around, prompt, record, tokenizer):
  """The chat.Prompt that a model is given for another, bare one."""
  if isinstance(record.prompt, str):
    examples = shots.chosen(around.pool, prompt.text, around.count)
    text = shots.text(around.form, prompt.text, examples)
    return prompt._replace(text=text)
  if around.own:
    raise ValueError(
      f"{record.origin}: sample.template is of prompts of text; messages have "
      "the tokenizer's chat template: set sample.template to None"
    )
  examples = shots.chosen(around.pool, record.prompt, around.count)
  whole = shots.conversation(record, examples)
  return chat.prompt(whole, tokenizer.apply_template)


class _Told(NamedTuple):
  """A sources.Policy whose errors say what a long prompt is made of."""

  policy: sources.Policy
  more: str

  def bad(self, error):
    self.policy.bad(fields.BadRecord(error.reason, f"{error}{self.more}"))


def encoded(setup, prompts, policy):
  """Prompts to be continued: list of (bare text, ids of what is asked).

  Args:
    setup: base.Setup.
    prompts: list of (chat.Prompt, its records.Record).
    policy: sources.Policy for bad records.
  Raises: ValueError for templates and examples that cannot be used.
  """
  options, data, tokenizer = setup.sample, setup.data, setup.tokenizer
  around = _around(options, policy)
  if around is None:
    alone = [prompt for prompt, _ in prompts]
    return tokenize.prompts(alone, tokenizer, data, policy)
  asked, bare = [], {}
  for prompt, record in prompts:
    try:
      with fields.at(record.origin):
        asked.append(_asked(around, prompt, record, tokenizer))
        bare[asked[-1].text] = prompt.text
    except fields.BadRecord as error:
      policy.bad(error)
  more = (
    f" (sample.shots = {options.shots} examples and {_FIELD} count as part of "
    "it)"
  )
  if data.long_prompt == "keep_start":
    # It would keep the examples, and cut what is asked.
    data = data._replace(long_prompt="error")
    more = f"{more[:-1]}; keep_start would cut what is asked behind them)"
  out = tokenize.prompts(asked, tokenizer, data, _Told(policy, more))
  return [(bare[text], ids) for text, ids in out]


def endings(tokenizer, stop):
  """The ids that end a draw as it is drawn: those of each text of sample.stop.

  Nothing that `cut` keeps is lost: what ends in them holds the text. A draw
  that writes it in other tokens goes on to its limit, and is cut as well.

  Returns: tuple of tuples.
  """
  each = [tuple(tokenize.encode_alone(tokenizer, word)) for word in stop]
  return tuple(
    ids
    for word, ids in zip(stop, each, strict=True)
    if word in tokenizer.decode(ids)
  )


def stopped(setup, batch):
  """Draws that end before a text of sample.stop, see `cut`."""
  tokenizer, stop = setup.tokenizer, setup.sample.stop
  return [cut(draw, tokenizer, stop)[0] for draw in batch]


def cut(draw, tokenizer, stop):
  """A draw that ends before the first of some texts, if one is in it.

  It counts as finished: the EOS takes the place of the stop text. A token that
  holds the stop text's beginning too is replaced by those of what is before it.

  Args:
    draw: generate.Draw.
    tokenizer: tokenize.Tokenizer.
    stop: texts; the first to be whole, token by token, ends the draw.
  Returns: (Draw, ids that were drawn until a stop text was whole).
  """

  def spelled(count):
    ids = draw.ids[:count]
    return tokenize.continuation(tokenizer, draw.prompt_ids, ids)

  if not any(word in draw.completion for word in stop):
    return draw, draw.ids
  counts = range(len(draw.ids) + 1)
  through = bisect.bisect_left(
    counts, True, key=lambda n: any(word in spelled(n) for word in stop)
  )
  text = spelled(through)
  text = text[: min(text.find(word) for word in stop if word in text)]
  kept = bisect.bisect_right(
    counts[:through], len(text), key=lambda n: len(spelled(n))
  )
  kept -= 1
  while not text.startswith(spelled(kept)):
    kept -= 1  # it ends inside a character; of no ids there is no text
  ids, rest = draw.ids[:kept], text[len(spelled(kept)) :]
  ids += tokenize.encode_alone(tokenizer, rest) if rest else []
  ids += [tokenizer.eos_id]
  ended = draw._replace(completion=text, ids=ids, finished=True)
  return ended, draw.ids[:through]
