"""A few records made into examples: the work that processes share."""

import collections
from typing import NamedTuple

from dpo_jax.data.read import fields
from dpo_jax.data.tokens import comparisons, tokenize
from dpo_jax.data.tokens import examples as examples_lib


class Task(NamedTuple):
  """How records become examples; plain values, which another process gets.

  Attributes:
    tokenizer: its name.
    vocab_size: tokens that it may give; the model may have fewer rows.
    max_prompt_length, max_completion_length, long_prompt: as in config.data.
    kind, with_scores: see comparisons.arrange.
    other_ends: as in tokenize.Tokenizer; the model may name more.
  """

  tokenizer: str | None
  vocab_size: int
  max_prompt_length: int
  max_completion_length: int
  long_prompt: str
  kind: str
  with_scores: bool
  other_ends: tuple[int, ...] = ()


class Made(NamedTuple):
  """What became of some records.

  Attributes:
    chunk: examples.Chunk of those that can be used.
    changed: Counter of what was changed on the way.
    errors: of each record the fields.BadRecord why it cannot be used, or None.
  """

  chunk: examples_lib.Chunk
  changed: collections.Counter
  errors: list[fields.BadRecord | None]


def make(task, tokenizer, first, records):
  """The Made of a list of records.Record, which are numbered from `first`.

  Raises: ValueError for what no record can mend.
  """
  good, changed, errors = [], collections.Counter(), []
  for encoded in tokenize.encode_each(records, tokenizer, task, first):
    changed.update(encoded.changed)
    example, error = encoded.example, encoded.error
    if error is None:
      try:
        good.append(comparisons.arrange(example, task.kind, task.with_scores))
      except fields.BadRecord as refused:
        error = refused
    errors.append(error)
  dtype = examples_lib.token_dtype(tokenizer.vocab_size)
  return Made(examples_lib.flatten(good, dtype), changed, errors)
