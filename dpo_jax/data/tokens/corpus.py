"""A source of records as the examples of a loss: tokenised once, then mapped.

Small data sets are tokenised at every start, and held in memory. What takes
longer is tokenised by all cores, and large data sets are kept in a cache on
disk (data/tokens/cache.py), addressed by all that decides about the examples.
"""

import collections
import contextlib
import functools
import itertools
import os
import time
import warnings
from typing import Any, NamedTuple

from etils import epath

from dpo_jax import progress
from dpo_jax.data.read import records, sources
from dpo_jax.data.tokens import (
  cache,
  comparisons,
  encoding,
  pool,
  tokenize,
)
from dpo_jax.data.tokens import examples as examples_lib

_SMALL = 1 << 14  # records: more are kept; fewer if data.token_cache is set
_PATIENCE = 5.0  # seconds of one process, before others are started
# What takes less than two seconds says nothing.
_shown = functools.partial(progress.over, unit="records", quiet=2.0)


class Loaded(NamedTuple):
  """The examples of a source.

  Attributes:
    examples: examples.Examples.
    changed: {what was changed on the way: how often}.
    folder: of the cache that they are mapped from, or None.
  """

  examples: examples_lib.Examples
  changed: dict[str, int]
  folder: epath.Path | None


class _Job(NamedTuple):
  """What `load` was asked for.

  Attributes:
    spec, field, tokenizer, options, policy, loud: as `load` has them.
    task: encoding.Task.
    known: list of sources.Identity, one a part of the mixture, or None.
    rows: about how many, or None.
  """

  spec: str
  field: str
  tokenizer: tokenize.Tokenizer
  options: Any
  policy: sources.Policy
  loud: bool
  task: encoding.Task
  known: list
  rows: int | None


def load(spec, field, kind, with_scores, tokenizer, options, policy, *, loud):
  """The Loaded of a source.

  Args:
    spec: see data/read/sources.py.
    field: the config field that it came from, for messages.
    kind, with_scores: what the loss compares, see comparisons.arrange.
    tokenizer: tokenize.Tokenizer.
    options: config.data; reads the limits of lengths, bad_records, token_cache.
    policy: sources.Policy; counts the records that are skipped, those of a
      cache too.
    loud: whether to show the progress of what takes long.
  Raises: ValueError for what the user can mend.
  """
  task = encoding.Task(
    tokenizer=tokenizer.name,
    vocab_size=tokenizer.vocab_size,
    other_ends=tokenizer.other_ends,
    max_prompt_length=options.max_prompt_length,
    max_completion_length=options.max_completion_length,
    long_prompt=options.long_prompt,
    kind=kind,
    with_scores=with_scores,
  )
  known = [sources.identity(source) for _, source in sources.parse(spec, field)]
  rows = [part and part.rows for part in known]
  rows = None if None in rows else sum(rows)
  asked = spec, field, tokenizer, options, policy, loud
  return _load(_Job(*asked, task, known, rows))


def _load(job):
  """`load`, once the content of the source is known."""
  entry = _entry(job)
  kept = entry and cache.read(entry)
  if kept is not None:
    examples, notes = kept
    job.policy.skipped.update(notes["skipped"])
    job.policy.first = notes["first"] | job.policy.first
    return Loaded(examples, notes["changed"], entry.path)
  changed = collections.Counter()
  made = _mismatched if job.task.kind == "mismatched" else _encoded
  with contextlib.closing(made(job, changed)) as chunks:
    entry, chunks = _worth_keeping(job, entry, chunks)
    if entry is None:
      return Loaded(examples_lib.in_memory(chunks), dict(changed), None)
    notes = functools.partial(_notes, job, changed)
    examples, notes = cache.write(entry, chunks, notes)
  return Loaded(examples, notes["changed"], entry.path)


def _entry(job):
  """The cache.Entry of what is asked for; None where it is not to be kept."""
  folder = job.options.token_cache
  if folder is None and job.rows is not None and job.rows <= _SMALL:
    return None
  identity = job.tokenizer.identity and job.tokenizer.identity()
  if identity is None or None in job.known:
    if folder is not None:
      what = "the tokenizer" if identity is None else "a source"
      warnings.warn(
        f"data.token_cache: the tokens of {job.spec} are not kept: nothing "
        f"tells {what} from another one of the same name",
        stacklevel=2,
      )
    return None
  task = job.task._asdict()
  task["scored"] = task.pop("with_scores")  # as addresses have it
  if not task["other_ends"]:
    del task["other_ends"]  # as addresses had it before
  made_of = {
    **task,
    "tokenizer": identity,
    "sources": [part.value for part in job.known],
    "bad_records": job.options.bad_records,
  }
  if folder is None:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = f"{home}/dpo_jax/tokens"
  return cache.entry(epath.Path(folder).expanduser(), made_of)


def _worth_keeping(job, entry, chunks):
  """(entry, or None for chunks that are held in memory; the chunks)."""
  if entry is None or job.options.token_cache is not None:
    return entry, chunks
  few = list(itertools.islice(chunks, _SMALL // examples_lib.PER_CHUNK))
  more = next(chunks, None)
  if more is None:
    return None, few
  try:
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    writable = os.access(entry.path.parent, os.W_OK)
  except OSError:
    writable = False
  if not writable:
    warnings.warn(
      f"{entry.path.parent} cannot be written to: the tokens of {job.spec} are "
      "held in memory, and made again next time; set data.token_cache",
      stacklevel=2,
    )
    entry = None
  return entry, itertools.chain(few, [more], chunks)


def _notes(job, changed):
  """What is kept beside the examples, once all records are read."""
  # Or the entry would say that it is of what the file held before.
  parts = sources.parse(job.spec, job.field)
  for before, (_, source) in zip(job.known, parts, strict=True):
    if sources.identity(source).value != before.value:
      raise ValueError(f"{source} changed while it was read; run this again")
  skipped = {"skipped": job.policy.skipped, "first": job.policy.first}
  return {"changed": dict(changed), **skipped}


def _mismatched(job, changed):
  """`_encoded` for KTO, of labelled examples that are kept or made first."""
  labelled = _load(job._replace(task=job.task._replace(kind="labels")))
  changed.update(labelled.changed)
  dtype = examples_lib.token_dtype(job.tokenizer.vocab_size)
  pairs = comparisons.mismatched(labelled.examples, job.spec)
  return _shown(
    examples_lib.chunks(pairs, dtype),
    *(len(labelled.examples), "mismatched"),
    size=lambda chunk: len(chunk.arrays["source"]),
    loud=job.loud,
  )


def _encoded(job, changed):
  """Yields the examples.Chunk of all records; counts what is changed."""
  usable = 0
  with contextlib.closing(_made(job)) as parts:
    for items, made in _shown(
      parts,
      *(job.rows, f"{job.spec}: tokenised"),
      size=lambda part: len(part[0]),
      loud=job.loud,
    ):
      errors = iter(made.errors)
      for item in items:  # their errors in their order, wherever found
        error = next(errors) if isinstance(item, records.Record) else item
        if error is not None:
          job.policy.bad(error)
      changed.update(made.changed)
      usable += len(made.chunk.arrays["source"])
      yield made.chunk
  if not usable:
    raise ValueError(
      f"no usable record is left (skipped: {job.policy.skipped})"
    )


def _made(job):
  """Yields (items, encoding.Made), by other processes where it takes long."""
  parts = _parts(job)
  alone = job.tokenizer.name is None or pool.processes() < 2
  begin = time.monotonic()
  for items, first, some in parts:
    yield items, encoding.make(job.task, job.tokenizer, first, some)
    if not alone and time.monotonic() - begin > _PATIENCE:
      break
  more = next(parts, None)
  if more is not None:
    parts = itertools.chain([more], parts)
    yield from pool.run(job.task, parts, pool.processes())


def _parts(job):
  """Yields (items, number of the first record, the records among them)."""
  form, number = comparisons.FORMS[job.task.kind], 0
  items = sources.read(job.spec, form, job.field)
  while part := list(itertools.islice(items, examples_lib.PER_CHUNK)):
    some = [item for item in part if isinstance(item, records.Record)]
    yield part, number, some
    number += len(some)
