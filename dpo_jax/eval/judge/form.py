"""A form for people: pairs without names, in random order and on random sides.

    form.csv, form.jsonl   a row a pair: "number", "prompt", "A", "B" and
                           "preferred", in which a person writes A, B or tie
    form.key.json          which side is whose; it is not for who fills it in

The same command writes the form where there is none, and reads it where there
is one. Copies that several people fill in are read with judge.form_key, which
names the key that was written with the form.
"""

import csv
import hashlib
import io
import json

import numpy as np
from etils import epath

from dpo_jax import lookup, store
from dpo_jax.data.read import fields, files
from dpo_jax.eval.judge import verdicts

_COLUMNS = ("number", "prompt", "A", "B", "preferred")
_TIES = ("tie", "both", "neither", "can't tell")
# A cell that begins with one of these is a formula to a spreadsheet.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def judge(path, pairs, options):
  """Verdicts of a filled form; writes the form if there is none.

  Args:
    path: of the form, .csv or .jsonl.
    pairs: list of matched.Pair.
    options: the fields of config.judge.
  Returns: as endpoint.judge; where the form was written, None for the verdicts.
  Raises: ValueError for a form, or a key, of other pairs.
  """
  path = epath.Path(path)
  lookup.lookup(_WRITE, path.suffix, "the suffix of the form")
  key = path.with_suffix(".key.json")
  key = key if options.form_key is None else epath.Path(options.form_key)
  if path.exists():
    return _read(path, key, pairs)
  if options.form_key is not None:
    raise ValueError(
      f"{path}: no such form, and judge.form_key = {options.form_key!r} is of "
      "one that is there; set it to None to write a form"
    )
  if key.exists():
    raise ValueError(
      f"{path}: no such form, and {key} is of one that may be with people: "
      "read their copy, or name another form"
    )
  rows, sides = _blinded(pairs, options.seed)
  store.write(key, (json.dumps({"sides": sides}, indent=2) + "\n").encode())
  store.write(path, _WRITE[path.suffix](rows).encode())
  told = [
    f"{len(rows):,} pairs to judge in {path}: A, B or tie in the column "
    f"'preferred'; then the same command reads it. {key} says which side is "
    "whose, and is not for the people who judge"
  ]
  return None, {}, told


def _digest(pair):
  """What tells a pair from others in a key."""
  text = json.dumps([pair.prompt, pair.ours, pair.theirs])
  return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _different(pairs):
  """{digest: pair} of the pairs that anybody has to be asked about."""
  return {_digest(pair): pair for pair in pairs if pair.ours != pair.theirs}


def _blinded(pairs, seed):
  """(rows of the form, {number: [digest of the pair, the side of ours]})."""
  every = list(_different(pairs).items())
  rng = np.random.default_rng(seed)
  rows, sides = [], {}
  for number, index in enumerate(rng.permutation(len(every)), 1):
    digest, pair = every[index]
    side = "AB"[rng.integers(2)]
    texts = [pair.ours, pair.theirs][:: 1 if side == "A" else -1]
    rows.append([str(number), pair.prompt, *texts, ""])
    sides[str(number)] = [digest, side]
  return rows, sides


def _csv(rows):
  """Text of a .csv; no cell of it is a formula."""
  out = io.StringIO(newline="")
  writer = csv.writer(out)
  writer.writerow(_COLUMNS)
  for row in rows:
    writer.writerow(
      [f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in row]
    )
  return "\ufeff" + out.getvalue()  # without it a spreadsheet guesses ANSI


def _jsonl(rows):
  lines = [json.dumps(dict(zip(_COLUMNS, r, strict=True))) for r in rows]
  return "".join(f"{line}\n" for line in lines)


_WRITE = {".csv": _csv, ".jsonl": _jsonl}
_ROWS = {".csv": files.csv_rows, ".jsonl": files.jsonl}


def _read(path, key, pairs):
  """What `judge` returns, of a form that is there."""
  if not key.exists():
    raise ValueError(
      f"{path} needs the key that was written with its form, and {key} is not "
      "there: name it by judge.form_key"
    )
  sides, given, numbers = store.read_json(key).get("sides", {}), {}, set()
  for origin, row in _ROWS[path.suffix](path):
    with fields.at(origin):
      if isinstance(row, fields.BadRecord):
        raise row
      number = str(fields.field(row, "number", str | int, "a number"))
    if number in numbers:
      raise ValueError(f"{origin}: the number {number} stands there twice")
    if number not in sides:
      raise ValueError(f"{origin}: {key} knows no number {number}")
    numbers.add(number)
    digest, side = sides[number]
    given[digest] = _verdict(str(row.get("preferred") or ""), side)
  if set(_different(pairs)) - {digest for digest, _ in sides.values()}:
    raise ValueError(
      f"{key} is not of these pairs: a form is read with the judge.samples, "
      "judge.against and judge.count by which it was written"
    )
  nobody = verdicts.Verdict(None, "not asked", {})
  out = [
    verdicts.identical(pair)
    if pair.ours == pair.theirs
    else given.get(_digest(pair), nobody)
    for pair in pairs
  ]
  count = sum(v.value is not None for v in given.values())
  return (
    out,
    {"form": str(path)},
    [f"{count:,} of {len(sides):,} pairs are filled in"],
  )


def _verdict(cell, side):
  """The Verdict of a cell of "preferred"."""
  said = cell.strip()
  about = {"preferred": said, "side_of_ours": side}
  if not said:
    return verdicts.Verdict(None, "not asked", {})
  if said.upper() in ("A", "B"):
    return verdicts.Verdict(float(said.upper() == side), "decided", about)
  if said.lower() in _TIES:
    return verdicts.Verdict(0.5, "equal", about)
  about["reasons"] = [f"{said!r:.40} is not A, B or tie"]
  return verdicts.Verdict(None, "malformed", about)
