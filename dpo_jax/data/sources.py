"""Records of text from files and generators, checked as they are read.

A record is a prompt with one or more completions and the comparisons between
them. A spec is the path of a file whose suffix is known, or the name of a
generated source:

    my.jsonl    one JSON object a line, in any of the forms
                {"prompt", "chosen", "rejected"}
                {"prompt", "completions": [...], "pairs": [[winner, loser], …]}
                (SFT takes the first: put the preferred completion there)
                {"prompt", "completion"}  or  {"text"}    (SFT only)
    toy         generated film remarks: kind ones chosen, unkind ones rejected
"""

import collections
import json
import random
from typing import NamedTuple

from etils import epath

from dpo_jax import lookup


class Record(NamedTuple):
  """Text as read.

  Attributes:
    prompt: text before every completion, may be empty.
    completions: the texts.
    pairs: (winner, loser) indices into `completions`; empty for SFT.
    origin: "file:line" for messages.
  """

  prompt: str
  completions: tuple[str, ...]
  pairs: tuple[tuple[int, int], ...]
  origin: str


class BadRecord(ValueError):
  """A record that cannot be used; the message says where and what to do."""

  def __init__(self, reason, message):
    super().__init__(message)
    self.reason = reason


class Policy:
  """What happens to bad records: raise at the first, or count and go on."""

  def __init__(self, on_bad):
    lookup.lookup(("error", "skip"), on_bad, "data.bad_records")
    self._skip = on_bad == "skip"
    self.skipped = collections.Counter()

  def bad(self, error):
    """Raises `error`, or counts its reason."""
    if not self._skip:
      raise ValueError(
        f"{error} (or set data.bad_records='skip' to leave such records out)"
      ) from error
    self.skipped[error.reason] += 1


def load(spec, form, policy, field="data.train"):
  """Reads all records of a source.

  Args:
    spec: path or name, see the module docstring.
    form: "preference" or "sft"; SFT takes the first (chosen) completion.
    policy: Policy for bad records; counts what it skips.
    field: the config field that names the source, for messages.
  Returns: list of Record, never empty.
  Raises: ValueError naming file, line and field.
  """
  if spec is None:
    raise ValueError(
      f"{field} is not set; give a file of preference pairs, for example "
      f"--config.{field}=my.jsonl, or the generated source 'toy'"
    )
  suffix = epath.Path(spec).suffix
  if suffix:
    reader = lookup.lookup(FILES, suffix, f"the suffix of {field}")
    rows = reader(spec, policy)
  else:
    rows = lookup.lookup(GENERATED, spec, field)()
  records = []
  for origin, row in rows:
    try:
      records.append(_record(row, form, origin))
    except BadRecord as error:
      policy.bad(error)
  if not records:
    raise ValueError(f"{spec}: no usable record (skipped: {policy.skipped})")
  return records


def _jsonl(path, policy):
  path = epath.Path(path)
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    raise ValueError(
      f"{path}: cannot be read ({error.strerror or error}); data.train and "
      "data.eval are paths relative to the current folder"
    ) from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    origin = f"{path}:{number}"
    try:
      yield origin, json.loads(line)
    except UnicodeDecodeError as error:
      policy.bad(BadRecord("invalid UTF-8", f"{origin}: not UTF-8: {error}"))
    except (ValueError, RecursionError) as error:
      hint = "; the last line is cut short" if number == len(lines) else ""
      policy.bad(
        BadRecord("invalid JSON", f"{origin}: not JSON: {error}{hint}")
      )


def _toy():
  """960 comparisons of film remarks: a task any small model can learn."""
  rng = random.Random(0)
  things = ("plot", "cast", "script", "music", "ending", "pace")
  verbs = ("is", "was", "seems", "felt")
  kind = ("warm", "clever", "moving", "funny", "lovely", "bright")
  unkind = ("dull", "clumsy", "empty", "slow", "ugly", "grim")
  for number in range(960):
    prompt = f"The {rng.choice(things)} {rng.choice(verbs)}"
    good, bad = rng.sample(kind, 2), rng.sample(unkind, 2)
    row = {
      "prompt": prompt,
      "chosen": f" {good[0]} and {good[1]}.",
      "rejected": f" {bad[0]} and {bad[1]}.",
    }
    yield f"toy:{number}", row


FILES = {".jsonl": _jsonl}
GENERATED = {"toy": _toy}


def _field(row, name, kind, origin):
  if name not in row:
    have = ", ".join(map(repr, row)) or "nothing"
    raise BadRecord(
      "missing field",
      f"{origin}: field {name!r} is missing{lookup.nearest(name, row)} "
      f"(the record has {have})",
    )
  if not isinstance(row[name], kind):
    raise BadRecord(
      "wrong type",
      f"{origin}: field {name!r} must be {kind.__name__}, not "
      f"{type(row[name]).__name__}",
    )
  if kind is str:
    _check_text(row[name], f"{origin}: field {name!r}")
  return row[name]


def _check_text(text, where):
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadRecord("invalid UTF-8", f"{where} is not text: {error}") from error


def _record(row, form, origin):
  if not isinstance(row, dict):
    raise BadRecord(
      "wrong type", f"{origin}: a record must be an object, not {row!r:.40}"
    )
  if form == "sft" and "text" in row:
    prompt, names, pairs = "", ("text",), ()
  elif form == "sft" and "completion" in row:
    prompt = _field(row, "prompt", str, origin)
    names, pairs = ("completion",), ()
  elif "completions" in row:
    return _ranked(row, form, origin)
  else:
    prompt = _field(row, "prompt", str, origin)
    names = ("chosen",) if form == "sft" else ("chosen", "rejected")
    pairs = () if form == "sft" else ((0, 1),)
  texts = tuple(_field(row, name, str, origin) for name in names)
  for name, text in zip(names, texts, strict=True):
    if not text:
      raise BadRecord("empty", f"{origin}: field {name!r} is empty")
  if len(texts) == 2 and texts[0] == texts[1]:
    raise BadRecord(
      "identical pair", f"{origin}: 'chosen' and 'rejected' are the same text"
    )
  return Record(prompt, texts, pairs, origin)


def _ranked(row, form, origin):
  """The K-completion form."""
  prompt = _field(row, "prompt", str, origin)
  texts = _field(row, "completions", list, origin)
  for k, text in enumerate(texts):
    where = f"{origin}: 'completions'[{k}]"
    if not isinstance(text, str) or not text:
      raise BadRecord(
        "empty" if text == "" else "wrong type",
        f"{where} must be a non-empty string, not {text!r:.40}",
      )
    _check_text(text, where)
  pairs = [] if form == "sft" else _field(row, "pairs", list, origin)
  if not texts or (form != "sft" and not pairs):
    raise BadRecord("empty", f"{origin}: 'completions' or 'pairs' is empty")
  for pair in pairs:
    good = isinstance(pair, list) and len(pair) == 2
    good = good and all(type(k) is int and 0 <= k < len(texts) for k in pair)
    if not good or pair[0] == pair[1]:
      raise BadRecord(
        "bad pair",
        f"{origin}: 'pairs' holds {pair!r}; each must be [winner, loser], two "
        f"different indices below {len(texts)}",
      )
    if texts[pair[0]] == texts[pair[1]]:
      raise BadRecord(
        "identical pair", f"{origin}: completions of {pair} are the same text"
      )
  if form == "sft":
    texts = texts[:1]
  return Record(prompt, tuple(texts), tuple(map(tuple, pairs)), origin)
