"""Tokenised data on disk: made once, mapped into memory by every later run.

An entry is addressed by what determines its content (what the source holds, the
tokenizer, the limits), so it is never stale.

    KEY/entry.json    what the key was made of; types, sizes, checksums
    KEY/tokens.bin    an array of data/tokens/examples.py, and so on for each
    KEY/mixture-….txt the fingerprint of a weighted mixture

A folder gets its name when it is complete and is not written to again, so two
runs may make the same entry at once: the first one stays.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import time
import uuid
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax.data.tokens import examples

_VERSION = 2  # raise it when the same records give other examples
_ABANDONED = 3600.0  # seconds after which nobody goes on writing a .part
_BLOCK = 1 << 20  # bytes


class Entry(NamedTuple):
  """One entry of a cache, whether or not it is there.

  Attributes:
    path: its folder.
    made_of: plain values that determine the content.
  """

  path: epath.Path
  made_of: dict


def entry(folder, made_of):
  """The Entry of a content; touches no file.

  Args:
    folder: of the cache; need not exist.
    made_of: plain values.
  Raises: ValueError for a folder that is not local.
  """
  if "://" in str(folder):
    raise ValueError(
      f"data.token_cache = {str(folder)!r}: tokens are mapped into memory, "
      "which needs a folder of this machine; name one, such as /tmp/tokens"
    )
  made_of = {"version": _VERSION, **made_of}
  text = json.dumps(made_of, sort_keys=True)
  key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
  return Entry(epath.Path(folder) / key, json.loads(text))


def read(entry):
  """(Examples mapped from an entry, its notes); None if it is not there.

  Every file is read once for its checksum, without being kept. An entry that is
  damaged is removed, with a warning.

  Raises: ValueError if it is there and cannot be read.
  """
  if not entry.path.exists():
    return None
  try:
    about = json.loads((entry.path / "entry.json").read_text())
    if about.pop("checksum") != _json_checksum(about):
      raise ValueError("the checksum of entry.json does not match")
    dtypes = {**examples.DTYPES, "tokens": about["token_dtype"]}
    files = {name: entry.path / f"{name}.bin" for name in examples.NAMES}
    for name, path in files.items():
      if _checksum(path) != tuple(about["checksums"][name]):
        raise ValueError(f"the checksum of {name}.bin does not match")
    arrays = {name: _mapped(path, dtypes[name]) for name, path in files.items()}
    remember = functools.partial(_remembered, entry.path)
    made = examples.Examples(arrays, about["digests"], remember)
    return made, about["notes"]
  except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
    text = (
      f"{entry.path}: these tokens are damaged ({error}); making them again"
    )
    warnings.warn(text, stacklevel=2)
    _remove(entry.path)
    return None
  except OSError as error:  # of another user, or of the disk: it may be good
    raise ValueError(
      f"data.token_cache: {entry.path} cannot be read "
      f"({error.strerror or error}); set it to another folder, or try again"
    ) from error


def write(entry, chunks, notes):
  """Makes an entry; complete or absent, also when interrupted.

  Args:
    entry: Entry.
    chunks: iterable of examples.Chunk, at least one.
    notes: function () -> plain values to keep; called after the last chunk.
  Returns: as `read`.
  Raises: ValueError if the folder cannot be written to.
  """
  folder = entry.path.parent
  partial = folder / f"{entry.path.name}.{uuid.uuid4().hex[:8]}.part"
  with _named(folder):
    partial.mkdir(parents=True)
    _remove_abandoned(folder)
  try:
    builder, checksums = _write_arrays(partial, chunks)
    about = {
      "made_of": entry.made_of,
      "notes": notes(),
      "token_dtype": builder.token_dtype,
      "digests": builder.digests,
      "checksums": checksums,
    }
    about["checksum"] = _json_checksum(about)
    with _named(folder):
      text = json.dumps(about, indent=2) + "\n"
      (partial / "entry.json").write_text(text)
      _publish(partial, entry.path)
  finally:
    _remove(partial)
  found = read(entry)
  if found is None:
    raise ValueError(f"{entry.path}: what was just written is damaged")
  return found


def _write_arrays(folder, chunks):
  """(examples.Builder, {name: (size, checksum)}) of all chunks in a folder."""
  with contextlib.ExitStack() as stack:
    files = {
      name: stack.enter_context(_Summed(folder / f"{name}.bin"))
      for name in examples.NAMES
    }
    builder = examples.Builder(files)
    for chunk in chunks:  # what reading the records raises is not renamed
      builder.add(chunk)
  return builder, {name: file.checksum for name, file in files.items()}


class _Summed:
  """A file that is written, and summed up on the way."""

  def __init__(self, path):
    self._folder = path.parent.parent
    with _named(self._folder):
      self._file = path.open("wb")
    self._size, self._sum = 0, 0

  def write(self, content):
    self._size += len(content)
    self._sum = zlib.crc32(content, self._sum)
    with _named(self._folder):
      self._file.write(content)

  @property
  def checksum(self):
    return self._size, self._sum

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with _named(self._folder):
      self._file.close()


def _checksum(path):
  """(bytes, checksum) of a file."""
  size = total = 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      size += len(block)
      total = zlib.crc32(block, total)
  return size, total


def _json_checksum(values):
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _mapped(path, dtype):
  if not path.stat().length:  # nothing to map
    return np.zeros(0, dtype)
  # Plain views: slices of the memmap type cost more and do no more.
  return np.asarray(np.memmap(path, dtype, "r"))


def _publish(partial, path):
  try:
    partial.rename(path)
  except OSError:
    if not path.exists():  # else another run was faster
      raise


def _remembered(folder, name, make):
  """What `make` returned when it was first asked for a name."""
  path = folder / f"{name}.txt"
  if path.exists():
    return path.read_text()
  text = make()
  partial = folder / f"{name}.{uuid.uuid4().hex[:8]}.part"
  with contextlib.suppress(OSError):  # it can be made again
    partial.write_text(text)
    partial.replace(path)
  return text


def _remove(path):
  shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(folder):
  for path in folder.glob("*.part"):
    try:
      times = [x.stat().mtime for x in (path, *path.iterdir())]
    except OSError:
      continue  # just finished by another run
    if time.time() - max(times) > _ABANDONED:
      _remove(path)


@contextlib.contextmanager
def _named(folder):
  """Makes of an OSError a ValueError that says which field is to be set."""
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"data.token_cache: {folder} cannot be written to "
      f"({error.strerror or error}); set it to a folder that can, with room"
    ) from error
