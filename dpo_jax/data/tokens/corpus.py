"""A source of records as the examples of a loss: tokenised once, then mapped.

Small data sets are tokenised at every start, and held in memory. What takes
longer is tokenised by all cores, and large data sets are kept in a cache on
disk (data/tokens/cache.py), addressed by all that decides about the examples.
"""

import collections
import contextlib
import itertools
import os
import time
import warnings
from typing import NamedTuple

from etils import epath

from dpo_jax import progress
from dpo_jax.data.read import fields, records, sources
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
_QUIET = 2.0  # seconds: what takes less says nothing


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
    spec, field: of the source.
    task: encoding.Task.
    tokenizer: tokenize.Tokenizer.
    bad_records, token_cache: as in config.data.
    loud: whether to show the progress.
  """

  spec: str
  field: str
  task: encoding.Task
  tokenizer: tokenize.Tokenizer
  bad_records: str
  token_cache: str | None
  loud: bool


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
    max_prompt_length=options.max_prompt_length,
    max_completion_length=options.max_completion_length,
    long_prompt=options.long_prompt,
    kind=kind,
    with_scores=with_scores,
  )
  job = _Job(
    *(spec, field, task, tokenizer),
    *(options.bad_records, options.token_cache, loud),
  )
  known = [sources.identity(source) for _, source in sources.parse(spec, field)]
  rows = [None if part is None else part.rows for part in known]
  rows = None if None in rows else sum(rows)
  return _load(job, known, rows, policy)


def _load(job, known, rows, policy):
  """`load`, once the content of the source is known.

  Args:
    job: _Job.
    known: list of sources.Identity, one a part of the mixture, or None.
    rows: about how many, or None.
    policy: sources.Policy.
  """
  entry = _entry(job, known, rows)
  kept = entry and cache.read(entry)
  if kept is None:
    if job.task.kind == "mismatched":
      changed, parts = _mismatched(job, known, rows, policy)
    else:
      changed = collections.Counter()
      parts = _encoded(job, rows, policy, changed)
    with contextlib.closing(parts):
      entry, parts = _worth_keeping(job, entry, parts)
      if entry is None:
        return Loaded(examples_lib.in_memory(parts), dict(changed), None)

      def notes():
        _check_unchanged(job, known)
        skipped = {"skipped": policy.skipped, "first": policy.first}
        return {"changed": dict(changed), **skipped}

      kept = cache.write(entry, parts, notes)
  else:
    _, notes = kept
    policy.skipped.update(notes["skipped"])
    policy.first = notes["first"] | policy.first
  examples, notes = kept
  return Loaded(examples, notes["changed"], entry.path)


def _entry(job, known, rows):
  """The cache.Entry of what is asked for; None where it is not to be kept."""
  if job.token_cache is None and rows is not None and rows <= _SMALL:
    return None
  identity = job.tokenizer.identity and job.tokenizer.identity()
  if identity is None or None in known:
    if job.token_cache is not None:
      what = "the tokenizer" if identity is None else "a source"
      warnings.warn(
        f"data.token_cache: the tokens of {job.spec} are not kept: nothing "
        f"tells {what} from another one of the same name",
        stacklevel=2,
      )
    return None
  task = job.task._asdict()
  task["scored"] = task.pop("with_scores")  # as addresses have it
  made_of = {
    **task,
    "tokenizer": identity,
    "sources": [part.value for part in known],
    "bad_records": job.bad_records,
  }
  return cache.entry(_folder(job), made_of)


def _folder(job):
  if job.token_cache is not None:
    return epath.Path(job.token_cache).expanduser()
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return epath.Path(home).expanduser() / "dpo_jax/tokens"


def _worth_keeping(job, entry, chunks):
  """(entry, or None for chunks that are held in memory; the chunks)."""
  if entry is None or job.token_cache is not None:
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


def _check_unchanged(job, known):
  """Or the entry would say that it is of what the file held before."""
  parts = sources.parse(job.spec, job.field)
  for before, (_, source) in zip(known, parts, strict=True):
    if sources.identity(source).value != before.value:
      raise ValueError(f"{source} changed while it was read; run this again")


def _mismatched(job, known, rows, policy):
  """(what was changed, chunks) for KTO: of labelled examples, kept or made."""
  labels = job._replace(task=job.task._replace(kind="labels"))
  labelled = _load(labels, known, rows, policy)
  dtype = examples_lib.token_dtype(job.tokenizer.vocab_size)

  def chunks():
    pairs = comparisons.mismatched(labelled.examples, job.spec)
    yield from _shown(
      job,
      examples_lib.chunks(pairs, dtype),
      *(len(labelled.examples), "mismatched"),
      size=lambda chunk: len(chunk.arrays["source"]),
    )

  return labelled.changed, chunks()


def _encoded(job, rows, policy, changed):
  """Yields the examples.Chunk of all records, in order.

  Args:
    job: _Job.
    rows: about how many, or None.
    policy: sources.Policy; gets bad records in their order.
    changed: Counter that gets what is changed.
  """
  usable = 0
  with contextlib.closing(_made(job)) as parts:
    for items, part in _shown(
      job,
      parts,
      *(rows, f"{job.spec}: tokenised"),
      size=lambda one: len(one[0]),
    ):
      _report(items, part.bad, policy)
      changed.update(part.changed)
      usable += len(part.chunk.arrays["source"])
      yield part.chunk
  if not usable:
    raise ValueError(f"no usable record is left (skipped: {policy.skipped})")


def _shown(job, parts, total, what, *, size):
  """Yields parts, with the progress of what takes long."""
  return progress.over(
    *(parts, total, what),
    unit="records",
    size=size,
    quiet=_QUIET,
    loud=job.loud,
  )


def _report(items, bad, policy):
  """Hands bad records to the policy, and raises other errors, in their order.

  Args:
    items: of `_items`.
    bad: of encoding.Made, by the place among the records.
    policy: sources.Policy.
  """
  place = itertools.count()
  for item in items:
    if isinstance(item, records.Record):
      error = bad.get(next(place))
      if error is not None:
        policy.bad(fields.BadRecord(*error))
    elif isinstance(item, fields.BadRecord):
      policy.bad(item)
    elif isinstance(item, _Empty):
      raise ValueError(
        f"{item.source}: no usable record (skipped: {policy.skipped})"
      )
    else:
      raise item


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
  items, number = _items(job), 0
  while chunk := list(itertools.islice(items, examples_lib.PER_CHUNK)):
    some = [item for item in chunk if isinstance(item, records.Record)]
    yield chunk, number, some
    number += len(some)


class _Empty(NamedTuple):
  """Stands where a part of a mixture ends that has no usable record."""

  source: str


class _Aside:
  """A sources.Policy that keeps bad records until it is their turn."""

  def __init__(self):
    self._errors = []

  def bad(self, error):
    self._errors.append(error)

  def take(self):
    errors, self._errors = self._errors, []
    return errors


def _items(job):
  """Yields the records of a source, and in their places what is wrong.

  Reading runs ahead of encoding; errors must not.

  Yields: records.Record, fields.BadRecord, _Empty, or an error to be raised,
    which is the last.
  """
  form, aside = comparisons.FORMS[job.task.kind], _Aside()
  try:
    parts = sources.parse(job.spec, job.field)
    for number, (_, source) in enumerate(parts):
      usable = False
      for record in sources.read(source, form, aside, job.field):
        yield from aside.take()
        usable = True
        yield record._replace(source=number)
      yield from aside.take()
      if not usable:
        yield _Empty(source)
  except Exception as error:
    yield from aside.take()
    yield error
