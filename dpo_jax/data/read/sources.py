"""Records of text from files, data sets and generators, checked as read.

A record is a prompt with one or more completions, and the comparisons between
them or their labels. A spec names where they come from:

    my.jsonl        one JSON object a line
    my.csv          the first line names the columns; an empty cell is a missing
                    field; "completions", "pairs", "messages", "tokens",
                    "ranking", "label", scores and probabilities hold JSON, or
                    Python's repr
    my.parquet      one row a record
    hf:NAME_OR_FOLDER[@CONFIG][:SPLIT]
                    a Hugging Face data set, of the hub or saved in a folder;
                    SPLIT is train unless named: hf:stanfordnlp/imdb:test
    one_turn:…      of such a set the dialogues (of text, as Anthropic/hh-rlhf
                    has them) in which the human speaks once
    toy, toy:COUNT  generated film remarks: kind ones chosen, unkind rejected
    reviews:SPLIT, plots:SPLIT
                    sentences of film reviews with labels, and plots; SPLIT is
                    train, validation or test (see data/read/reviews.py)
    0.5*A + 2*B     a mixture of specs, spaces around the "+". An epoch has
                    every record of B twice and half of those of A, another
                    half each epoch. A weight not written is 1.

A notebook adds its own: SOURCES["mine"] = lambda: rows, where rows are dicts or
a datasets.Dataset; a function of one argument gets what follows "mine:".

The forms of a row. A null is a missing field, as is a list of nulls. Fields
that no form names are not read; training and the audit name each, and say how
many rows have it.

    preference      {"prompt", "chosen", "rejected"}
                    {"prompt", "completions": [...],
                     "pairs": [[winner, loser], …]}, and perhaps "tokens": the
                    ids of each completion as it was drawn, EOS included if it
                    came; without it the text is encoded
                    {"prompt", "completions", "ranking": [best, …, worst]}
                    Both may have "scores", a number for each completion; the
                    first form "score_chosen" and "score_rejected"; and
                    "bos", false where no BOS is put in front of the text.
                    "probability", P from 0 to 1 that chosen is the better one,
                    is a soft label, P · loss(chosen ≻ rejected) + (1 − P) ·
                    loss(rejected ≻ chosen); beside "pairs" these are
                    "probabilities", one for each
    feedback        label or preference
    SFT             {"prompt", "completion"}, {"text"}, {"messages"}; or one for
                    preferences, of which it takes the best completion
    prompt          {"prompt"} of any of these
    completions     SFT or preference, of which it takes every completion; and
                    "tokens", the ids of "completion" as it was drawn
    label           {"text", "label"}, {"prompt", "completion", "label"},
                    {"messages", "label"}; the label is a finite number, a bool,
                    or the text of one

Messages may stand for text: "prompt" is a list of them and each completion a
list of one, of the assistant. Without a "prompt" (or with a text there that
repeats what the user said), "chosen" and "rejected" are whole conversations,
equal but for the last message; so is "messages". They need a tokenizer with a
chat template (see data/tokens/chat.py), which gets them whole: {"role",
"content"} and "tool_calls", "reasoning_content" or whatever else it may read;
a null is a missing key. Beside tool calls or reasoning the content may be
missing; it may be a list of parts of text. "tools", a list or its JSON, go with
them.

"system" (or "system_prompt") becomes the first turn, and stands in front of a
prompt of text. Other shapes that public data sets have (dialogues of the HH and
SHP data, "conversations" of "from" and "value", messages as JSON in a text, …)
are read where they have one meaning, and it is said how: data/read/shapes.py
has the table.
"""

import collections
import inspect
import math
import random
import re
from typing import NamedTuple

from etils import epath

from dpo_jax import lookup
from dpo_jax.data.read import fields, files, hub, records, reviews

Record = records.Record
BadRecord = fields.BadRecord


class _Nothing(Exception):
  """Stands where a part of a mixture ends that has no usable record."""


class Policy:
  """What happens to bad records: raise at the first, or count and go on.

  Attributes:
    skipped: Counter of reasons.
    first: {reason: message} of the first record skipped for it.
  """

  def __init__(self, on_bad):
    lookup.lookup(("error", "skip"), on_bad, "data.bad_records")
    self._skip = on_bad == "skip"
    self.skipped, self.first = collections.Counter(), {}

  def bad(self, error):
    """Raises `error`, or counts its reason if it is of one record."""
    if isinstance(error, _Nothing):
      raise ValueError(f"{error}: no usable record (skipped: {self.skipped})")
    if not isinstance(error, BadRecord):
      raise error
    if not self._skip:
      raise ValueError(
        f"{error} (or set data.bad_records='skip' to leave such records out)"
      ) from error
    self.skipped[error.reason] += 1
    self.first.setdefault(error.reason, str(error))

  def usable(self, items):
    """Yields the records of what `read` yields; the errors go to `bad`."""
    for item in items:
      if isinstance(item, Record):
        yield item
      else:
        self.bad(item)


def parse(spec, field="data.train"):
  """The parts of a spec: [(weight, source)], one unless it is a mixture.

  Args:
    spec: see the module docstring.
    field: the config field it came from, for messages.
  Raises: ValueError for a weight that is not a finite number above 0, and if
    the spec is None.
  """
  if spec is None:
    raise ValueError(
      f"{field} is not set; give a file of preference pairs, for example "
      f"--config.{field}=my.jsonl, or the generated source 'toy'"
    )
  out = []
  for part in re.split(r"\s+\+\s+", spec.strip()):
    head, star, source = part.partition("*")
    if not star or "/" in head or ":" in head:  # no weight, perhaps a path
      out.append((1.0, part))
      continue
    try:
      weight = float(head)
    except ValueError:
      weight = math.nan
    if not (0 < weight < math.inf):
      raise ValueError(
        f"{field}: the weight {head!r} of {source!r} must be a finite number "
        "above 0"
      )
    out.append((weight, source.strip()))
  return out


def load(spec, form, policy, field="data.train"):
  """Reads all records of a source, or of all parts of a mixture in order.

  Args:
    spec: see the module docstring; weights are for the loader.
    form: of records.FORMS.
    policy: Policy for bad records; counts what it skips.
    field: the config field that names the source, for messages.
  Returns: list of Record, of every part at least one.
  Raises: ValueError naming file, line and field.
  """
  return list(policy.usable(read(spec, form, field)))


def read(spec, form, field):
  """Yields the records of a source, and in their places what is wrong.

  Reading may run ahead of what is done with the records; errors must not.

  Args: as `load`.
  Yields: Record, or an error for Policy.bad; one that is not of a single record
    is the last.
  """
  try:
    for number, (_, source) in enumerate(parse(spec, field)):
      usable = False
      for item in read_part(source, form, field):
        if isinstance(item, Record):
          usable, item = True, item._replace(source=number)
        yield item
      if not usable:
        yield _Nothing(source)
        return
  except Exception as error:
    yield error


class Identity(NamedTuple):
  """What tells the content of a source from any other.

  Attributes:
    value: plain values; equal ones have the same rows.
    rows: about how many, or None.
  """

  value: dict
  rows: int | None


def identity(source):
  """The Identity of a spec that is no mixture; None if only its rows tell.

  A file is what it holds, wherever it is. A function that a notebook puts into
  SOURCES may return other rows under the same name.

  Raises: ValueError for a file or data set that cannot be read.
  """
  name, *arguments = source.split(":", 1)
  if name == "hf" and arguments:
    found = hub.load(*arguments)
    return Identity({"data set": found._fingerprint}, len(found))
  if name in SOURCES:
    built_in = SOURCES[name] is _BUILT_IN.get(name)
    return Identity({"generated": source}, None) if built_in else None
  if epath.Path(source).suffix not in FILES:
    return None  # `read` says what is wrong
  digest, rows = files.content(source)
  return Identity({"file": digest}, rows)


def is_here(source):
  """Whether a spec that is no mixture can be read without the network."""
  name, _, argument = source.partition(":")
  if name not in SOURCES:
    return epath.Path(source).exists()
  hub_name = argument.partition(":")[0].partition("@")[0]
  return name not in ("hf", "one_turn") or epath.Path(hub_name).exists()


def read_part(source, form, field):
  """Yields a Record or BadRecord for each row of a spec that is no mixture.

  Args, Raises: see `load`.
  """
  for origin, row in _rows(source, field):
    try:
      yield records.make(row, form, origin)
    except BadRecord as error:
      yield error


def refuse_messages(records, field):
  """Raises ValueError for records whose prompt is messages, not text."""
  for record in records:
    if not isinstance(record.prompt, str):
      raise ValueError(f"{record.origin}: {field} needs text, not messages")


def _rows(source, field):
  """(origin, row) of a source that is no mixture, as files.py has it."""
  name, *arguments = source.split(":", 1)
  suffix = epath.Path(source).suffix
  if name in SOURCES:
    try:
      inspect.signature(SOURCES[name]).bind(*arguments)
    except TypeError as error:
      wants = "takes nothing" if arguments else "needs an argument"
      raise ValueError(
        f"{field} = {source!r}: the source {name!r} {wants} after its name "
        "(see data/read/sources.py)"
      ) from error
    made = hub.rows(SOURCES[name](*arguments), source)
    return ((f"{source}:{number}", row) for number, row in enumerate(made))
  if suffix:
    reader = lookup.lookup(FILES, suffix, f"the suffix of {field}")
    return reader(source)
  if source and epath.Path(source).is_dir():
    raise ValueError(
      f"{field} = {source!r} is a folder; a data set saved there is "
      f"{'hf:' + source!r}"
    )
  return lookup.lookup(SOURCES, name, field)  # raises


def _toy(count="960"):
  """Comparisons of film remarks: a task any small model can learn."""
  if not count.isdigit():
    raise ValueError(f"the source 'toy:{count}' must be toy:COUNT")
  rng = random.Random(0)
  things = ("plot", "cast", "script", "music", "ending", "pace")
  verbs = ("is", "was", "seems", "felt")
  kind = ("warm", "clever", "moving", "funny", "lovely", "bright")
  unkind = ("dull", "clumsy", "empty", "slow", "ugly", "grim")
  for _ in range(int(count)):
    prompt = f"The {rng.choice(things)} {rng.choice(verbs)}"
    good, bad = rng.sample(kind, 2), rng.sample(unkind, 2)
    yield {
      "prompt": prompt,
      "chosen": f" {good[0]} and {good[1]}.",
      "rejected": f" {bad[0]} and {bad[1]}.",
      "score_chosen": 1.0,
      "score_rejected": 0.0,
    }


FILES = {
  ".jsonl": files.jsonl,
  ".csv": files.csv_rows,
  ".parquet": files.parquet,
}
_BUILT_IN = {"toy": _toy, "reviews": reviews.reviews, "plots": reviews.plots}
SOURCES = {**_BUILT_IN, "hf": hub.load, "one_turn": hub.one_turn}
