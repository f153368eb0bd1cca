"""Text to token ids: one BOS, one scored EOS, a boundary that never merges.

The prompt is encoded alone, so every completion shares its ids. Prompt and
completion are also encoded as one text; where that begins with the prompt's
ids, the rest is the completion, else the two would merge (as a rule because a
token straddles the boundary) and the completion is encoded alone, counted as
"boundary merge". Messages are what their chat template writes: they keep its
BOS and its end, and get none.
Completions that bring their tokens keep them: what a policy drew is often not
how the tokenizer would spell it, and its log-prob is that of what was drawn.
"""

import collections
import functools
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dpo_jax import lookup
from dpo_jax.data.read import fields
from dpo_jax.data.tokens import chat, comparisons, vocabulary


class Tokenizer(NamedTuple):
  """What the project needs of a tokenizer.

  Attributes:
    encode: list[str] -> list[list[int]], without special tokens.
    decode: list[int] -> str, special tokens left out.
    vocab_size: ids are below this.
    bos_id: put at position 0 of text, or None.
    eos_id: ends every completion that was not cut, but for messages whose
      template ends them otherwise.
    other_ends: what else ends a text: the end of turn of the template, and what
      the model says that it generates up to.
    apply_template: (messages, add_generation_prompt=…, tools=…) -> str, the
      tokenizer's chat template; None if it has none.
    specials: {id: how it is written} of the tokens that `decode` leaves out.
    name: by which `load` makes it again in another process, or None.
    identity: function () -> str that two tokenizers share only if they encode
      alike, or None if nothing says; without it no tokens are kept on disk.
  """

  encode: Callable
  decode: Callable
  vocab_size: int
  bos_id: int | None
  eos_id: int
  other_ends: tuple[int, ...] = ()
  apply_template: Callable | None = None
  specials: Mapping[int, str] = types.MappingProxyType({})
  name: str | None = None
  identity: Callable | None = None

  @property
  def end_ids(self):
    """All that ends a text, the EOS first; each once."""
    return tuple(dict.fromkeys((self.eos_id, *self.other_ends)))


def load(name):
  """The Tokenizer of `config.tokenizer`, see data/tokens/vocabulary.py.

  Raises: ValueError saying what was tried.
  """
  if name == "bytes":
    return Tokenizer(
      encode=lambda texts: [list(text.encode("utf-8")) for text in texts],
      decode=lambda ids: bytes(i for i in ids if i < 256).decode(
        "utf-8", errors="replace"
      ),
      vocab_size=257,
      bos_id=None,
      eos_id=256,
      specials={256: "<eos>"},
      name=name,
      identity=lambda: name,
    )
  hf = vocabulary.load(name)
  if hf.eos_token_id is None:
    raise ValueError(
      f"tokenizer = {name!r} names no eos_token; add it to the folder's "
      "tokenizer_config.json"
    )
  template = None if hf.chat_template is None else chat.template(hf)
  marks_turns = chat.marks_turns(hf.bos_token, template)
  added = hf.added_tokens_decoder
  specials = {i: token.content for i, token in added.items() if token.special}

  def encode(texts):
    return hf(texts, add_special_tokens=False)["input_ids"] if texts else []

  return Tokenizer(
    encode=encode,
    decode=lambda ids: hf.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    ),
    vocab_size=max([len(hf), *(i + 1 for i in added)]),  # ids have gaps
    bos_id=None if marks_turns else hf.bos_token_id,
    eos_id=hf.eos_token_id,
    other_ends=chat.end_ids(template, encode, added),
    apply_template=template,
    specials=specials,
    name=name,
    identity=functools.partial(vocabulary.identity, hf),
  )


def encode_alone(tokenizer, text):
  """Ids of a text that continues another: no prefix space is invented.

  Encodes it behind an anchor that does not merge with it.
  """
  for anchor in ("\n", "a", ".", "0"):
    head, both = tokenizer.encode([anchor, anchor + text])
    if both[: len(head)] == head:
      return both[len(head) :]
  return tokenizer.encode([text])[0]


class Encoded(NamedTuple):
  """What became of a record.

  Attributes:
    example: comparisons.Example; None if the record cannot be used.
    changed: Counter of what was changed on the way.
    error: fields.BadRecord, why there is no example; else None.
  """

  example: comparisons.Example | None
  changed: collections.Counter
  error: fields.BadRecord | None


def encode(records, tokenizer, options, policy):
  """Encodes records, dropping or refusing what cannot be used.

  Args:
    records, tokenizer, options: see `encode_each`.
    policy: sources.Policy for bad records.
  Returns: (list of comparisons.Example, Counter of what was changed).
  """
  examples, changed = [], collections.Counter()
  for encoded in encode_each(records, tokenizer, options):
    if encoded.error is not None:
      policy.bad(encoded.error)
      continue
    examples.append(encoded.example)
    changed.update(encoded.changed)
  if not examples:
    raise ValueError(f"no usable record is left (skipped: {policy.skipped})")
  return examples, changed


def encode_each(records, tokenizer, options, first=0):
  """Yields the Encoded of each record.

  Args:
    records: list of sources.Record.
    tokenizer: Tokenizer.
    options: config.data; reads max_prompt_length, max_completion_length (both
      in tokens, BOS and EOS counted) and long_prompt.
    first: number of the first record.
  """
  lookup.lookup(
    ("error", "keep_end", "keep_start"), options.long_prompt, "data.long_prompt"
  )
  texts = [_text(record, tokenizer) for record in records]
  good = [text.record for text in texts if isinstance(text, chat.Rendered)]
  prompts = iter(tokenizer.encode([r.prompt for r in good]))
  joined = iter(
    tokenizer.encode([r.prompt + c for r in good for c in r.completions])
  )
  for number, text in enumerate(texts, first):
    if isinstance(text, fields.BadRecord):
      yield Encoded(None, collections.Counter(), text)
      continue
    changed = collections.Counter(text.record.remarks)
    ids = next(prompts), [next(joined) for _ in text.record.completions]
    example, bad = None, None
    try:
      with fields.at(text.record.origin):
        example = _example(number, text, *ids, tokenizer, options, changed)
    except fields.BadRecord as error:
      bad = error
    yield Encoded(example, changed, bad)


def _text(record, tokenizer):
  """The chat.Rendered of a record, or the BadRecord that says why not."""
  try:
    with fields.at(record.origin):
      return chat.render_record(record, tokenizer)
  except fields.BadRecord as error:
    return error


def _example(number, text, prompt, joined, tokenizer, options, changed):
  """The Example of a chat.Rendered whose texts have the ids given."""
  record = text.record
  if record.tokens is None:
    behind = _behind(prompt, joined, record, tokenizer, changed)
    completions = [
      _end(ids, tokenizer, ended, changed)
      for ids, ended in zip(behind, text.ended, strict=True)
    ]
  else:
    completions = _drawn(record, prompt, tokenizer)
  limit = options.max_completion_length
  changed.update("completion cut" for ids in completions if len(ids) > limit)
  # What a policy drew up to a limit of its own has no end either.
  whole = [
    len(ids) <= limit and (ended or ids[-1] in tokenizer.end_ids)
    for ids, ended in zip(completions, text.ended, strict=True)
  ]
  completions = [ids[:limit] for ids in completions]
  prompt = _begin(prompt, text.templated, tokenizer, options, changed)
  # A whole text may hold turns; what follows a prompt is one of them.
  ends = tokenizer.end_ids if record.prompt else (tokenizer.eos_id,)
  _check(prompt, completions, record.pairs, ends, tokenizer)
  return comparisons.Example(
    number,
    record.source,
    prompt,
    tuple(completions),
    comparisons.weighted(record.pairs, record.probabilities),
    labels=record.labels,
    scores=record.scores,
    ranking=record.ranking,
    ended=tuple(whole),
    origin=record.origin,
  )


def prompts(prompts, tokenizer, options, policy):
  """Prompts to be continued: list of (text, ids as training has them).

  Args: as `encode`, with chat.Prompt for records.
  """
  out = []
  encoded = tokenizer.encode([prompt.text for prompt in prompts])
  for (text, templated), ids in zip(prompts, encoded, strict=True):
    try:
      with fields.at(f"prompt {text!r:.40}"):
        counted = collections.Counter()
        ids = _begin(ids, templated, tokenizer, options, counted)
        out.append((text, ids))
    except fields.BadRecord as error:
      policy.bad(error)
  return out


def _begin(prompt, templated, tokenizer, options, changed):
  """The prompt with one BOS, within data.max_prompt_length.

  Messages have the BOS that their template writes, or none.
  """
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  if bos and prompt[:1] == bos:  # it brought its own
    prompt = prompt[1:]
  elif templated:
    bos = []
  room = options.max_prompt_length - len(bos)
  if len(prompt) > room:
    if options.long_prompt == "error":
      raise fields.BadRecord(
        "long prompt",
        f"field 'prompt' has {len(prompt) + len(bos)} tokens, more than "
        f"data.max_prompt_length = {options.max_prompt_length}; raise it, or "
        "set data.long_prompt to 'keep_end' or 'keep_start'",
      )
    changed["prompt cut"] += 1
    end = options.long_prompt == "keep_end"
    prompt = prompt[len(prompt) - room :] if end else prompt[:room]
  return bos + prompt or [tokenizer.eos_id]


def _behind(prompt, whole, record, tokenizer, changed):
  """Yields the ids of each completion, whose joined texts are `whole`."""
  for ids, text in zip(whole, record.completions, strict=True):
    if ids[: len(prompt)] == prompt:
      yield ids[len(prompt) :]
    else:
      changed["boundary merge"] += 1
      yield encode_alone(tokenizer, text)


def continuation(tokenizer, prompt, ids):
  """The text that `ids` add to a prompt's.

  Not what they spell alone: some tokenizers leave out a first space.
  """
  head, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
  if whole.startswith(head):
    return whole[len(head) :]
  return tokenizer.decode(ids)  # they end a character that the prompt began


def _drawn(record, prompt, tokenizer):
  """The tokens that a record brings, if they are this tokenizer's."""
  for ids, text in zip(record.tokens, record.completions, strict=True):
    known = max(ids) < tokenizer.vocab_size
    if not known or continuation(tokenizer, prompt, ids) != text:
      raise fields.BadRecord(
        "bad tokens",
        f"'tokens' do not spell {text!r:.40} with this tokenizer; use the one "
        "they were drawn with, or take 'tokens' out",
      )
  return list(record.tokens)


def _end(ids, tokenizer, ended, changed):
  """The completion with one end: a template's that it brings, or the EOS."""
  if ended:
    if ids[-1] not in tokenizer.end_ids:
      changed["end of turn at which no sample stops"] += 1
    return ids
  last = tokenizer.eos_id
  while ids and ids[-1] in tokenizer.end_ids:
    last, ids = ids[-1], ids[:-1]
  return [*ids, last]


def _check(prompt, completions, pairs, ends, tokenizer):
  """Raises BadRecord for tokens that cannot be trained on."""
  for ids in (prompt, *completions):
    if max(ids, default=0) >= tokenizer.vocab_size:
      raise fields.BadRecord(
        "unknown token",
        f"token {max(ids)} is of another use (an image), the model has the "
        f"first {tokenizer.vocab_size} only; take it out of the text",
      )
  for k, ids in enumerate(completions):
    for end in set(ends).intersection(ids[:-1]):
      known = {**tokenizer.specials, tokenizer.eos_id: "EOS"}
      raise fields.BadRecord(
        "EOS inside",
        f"the text of completion {k} contains the {known.get(end, end)} token; "
        "take it out, a completion gets exactly one end, behind its text",
      )
  for winner, loser in pairs:
    if completions[winner] == completions[loser]:
      raise fields.BadRecord(
        "identical pair",
        f"completions {winner} and {loser} have the same tokens once "
        "cut to data.max_completion_length or written by the chat template; "
        "raise it, or take the pair out",
      )
