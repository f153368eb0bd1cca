"""Rows of .jsonl, .csv and .parquet files, each with where it stands.

A reader is a function path that yields (origin, row). What is wrong with one
row is a BadRecord in its place; what is wrong with the file is an error.
"""

import ast
import csv
import hashlib
import io
import itertools

from etils import epath

from dpo_jax import lines, store
from dpo_jax.data.read import fields, wording

# Columns of a .csv whose cells are JSON, as they hold no text.
_JSON_COLUMNS = {
  *("bos", "completions", "label", "messages", "pairs", "ranking", "tokens"),
  *("scores", "score_chosen", "score_rejected"),
  *("probability", "probabilities"),
}

_ROWS = 256  # of a Parquet file that are in memory at once, at most,
_BATCH = 2**30  # and bytes of them, if no value is larger than its row group
_GROUP = 2**32  # bytes, decompressed, that one of its row groups may have


def content(path):
  """What a file holds, wherever it is; reads it once, block by block.

  Returns: (digest of its bytes, hexadecimal; about how many rows, or None if
    that is not known before they are read).
  """
  path = epath.Path(path)
  digest, lines = hashlib.blake2b(digest_size=16), 0
  with _readable(path), path.open("rb") as file:
    while block := file.read(1 << 20):
      digest.update(block)
      lines += block.count(b"\n")
  rows = _parquet_rows(path) if path.suffix == ".parquet" else lines
  return digest.hexdigest(), rows


def _readable(path):
  """Makes of an OSError a ValueError that names the file."""
  return store.explained(
    f"{path}: cannot be read",
    "data.train and data.eval are paths relative to the current folder",
  )


def _read_bytes(path):
  """The content of a file, or a ValueError that names it."""
  with _readable(path):
    return epath.Path(path).read_bytes()


def jsonl(path):
  """One JSON object a line; blank lines are passed over."""
  with _readable(path), lines.opened(path) as file:
    for number, line in enumerate(file, 1):
      if number == 1 and line.strip() == b"[":
        raise ValueError(
          f"{path}: is one JSON list; write one object a line (with jq: "
          "jq -c '.[]' list.json > rows.jsonl)"
        )
      if line.strip():
        yield f"{path}:{number}", _json_row(line)


def _json_row(line):
  """The row of a line, or the BadRecord that it is."""
  try:
    return fields.from_json(line.rstrip(b"\n"))
  except UnicodeDecodeError as error:
    return fields.BadRecord("invalid UTF-8", f"not UTF-8: {error}")
  except fields.BadRecord as error:
    return error
  except (ValueError, RecursionError) as error:
    hint = "" if line.endswith(b"\n") else "; the last line is cut short"
    return fields.BadRecord("invalid JSON", f"not JSON: {error}{hint}")


def csv_rows(path):
  """Rows below a line of column names; an empty cell is a missing field."""
  # What is not UTF-8 becomes lone surrogates, which the record is checked for.
  text = _read_bytes(path).decode("utf-8-sig", errors="surrogateescape")
  (_, names), *rows = _csv_lines(path, text) or [(1, [])]
  if not names:
    raise ValueError(f"{path}: is empty; its first line must name the columns")
  _check_names(f"{path}:1", names)
  for line, cells in rows:
    yield f"{path}:{line}", _csv_row(names, cells)


def _check_names(where, names):
  """Raises ValueError if two columns have one name: one would be lost."""
  if len(set(names)) < len(names):
    raise ValueError(f"{where}: two columns have one name: {names}")


def _csv_lines(path, text):
  """[(number of the first line, cells)] of the rows that are not blank."""
  limit = csv.field_size_limit(max(len(text), 1))  # the default: 128 KiB
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  out, line = [], 1
  try:
    for cells in reader:
      if cells:
        out.append((line, cells))
      line = reader.line_num + 1
  except csv.Error as error:
    raise ValueError(
      f"{path}:{line}: not CSV: {error} (a quote that is never closed, or a "
      "file that was cut short?)"
    ) from error
  finally:
    csv.field_size_limit(limit)
  return out


def _csv_row(names, cells):
  """The row of a line, or the BadRecord that it is."""
  if len(cells) != len(names):
    return fields.BadRecord(
      "wrong columns",
      f"{len(cells)} cells, where the first line names {len(names)}",
    )
  row = {k: v for k, v in zip(names, cells, strict=True) if v}
  for name in row.keys() & _JSON_COLUMNS:
    try:
      row[name] = fields.from_json(row[name])
    except fields.BadRecord as error:
      return error
    except (ValueError, RecursionError) as error:
      # A class by its name, which SFT does not look at, or True; messages may
      # be Python's repr of them (shapes.py). So do libraries write lists.
      if name in ("label", "messages", "probability"):
        continue
      row[name] = wording.parsed(row[name], ast.literal_eval)
      if row[name] is None:
        return fields.BadRecord(
          "invalid JSON", f"field {name!r} is not JSON: {error}"
        )
  return row


def _parquet_rows(path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    return pq.read_metadata(str(path)).num_rows
  except (pa.ArrowException, OSError):  # said when it is read, or not local
    return None


def parquet(path):
  """Rows of a table, numbered from 1, without the nulls that fill it up.

  It is read some rows at a time: a value that every row has stands in the file
  once, and 100 KB may be gigabytes of rows.
  """
  # A map is an object, not a list of its items.
  parts = (b.to_pylist(maps_as_pydicts="strict") for b in _batches(path))
  try:
    for number, row in enumerate(itertools.chain.from_iterable(parts), 1):
      yield f"{path}:{number}", fields.without_nulls(row)
  except KeyError as error:
    raise ValueError(f"{path}: a map has a key twice: {error}") from error


def _batches(path):
  """The record batches of a Parquet file, each checked."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    file = pq.ParquetFile(pa.BufferReader(_read_bytes(path)))
    _check_names(path, file.schema_arrow.names)
    _check_groups(path, file.metadata)
    for batch in file.iter_batches(_rows_at_once(file.metadata)):
      batch.validate(full=True)
      yield batch
  except (pa.ArrowException, OSError) as error:
    raise ValueError(
      f"{path}: not a whole Parquet file: {' '.join(str(error).split())}"
    ) from error


def _rows_at_once(about):
  """Rows that fit, whatever value of a row group each of them has."""
  groups = range(about.num_row_groups)
  sizes = [about.row_group(number).total_byte_size for number in groups]
  return max(1, min(_ROWS, _BATCH // max(1, *sizes, 1)))


def _check_groups(path, about):
  """Refuses a row group that is too large to be decoded, by its own account."""
  for number in range(about.num_row_groups):
    size = about.row_group(number).total_byte_size
    if size > _GROUP:
      raise ValueError(
        f"{path}: row group {number} has {size / 2**30:.1f} GiB when it is "
        f"decompressed, more than {_GROUP / 2**30:.0f} GiB; write it in "
        "smaller ones (pyarrow: row_group_size=10_000)"
      )
