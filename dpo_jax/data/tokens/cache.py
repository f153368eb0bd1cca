"""Tokenised data on disk: made once, mapped into memory by every later run.

An entry of the store is addressed by what the source holds, the tokenizer and
the limits.

    KEY/entry.json    what the key was made of; types, sizes, checksums
    KEY/tokens.bin    an array of data/tokens/examples.py, and so on for each
    KEY/mixture-….txt the fingerprint of a weighted mixture

A folder gets its name when it is complete, so two runs may make the same entry
at once: the first one stays.
"""

import contextlib
import functools
import json
import shutil
import warnings
import zlib
from typing import NamedTuple

from etils import epath

from dpo_jax import store
from dpo_jax.data.tokens import examples

_VERSION = 6  # raise it when the same records give other examples


class Entry(NamedTuple):
  """One entry of a cache, whether or not it is there.

  Attributes:
    path: its folder.
    made_of: plain values that determine the content.
  """

  path: epath.Path
  made_of: dict


def entry(folder, made_of):
  """The Entry of a content; touches no file, the folder need not exist.

  Raises: ValueError for a folder that is not local.
  """
  if "://" in str(folder):
    raise ValueError(
      f"data.token_cache = {str(folder)!r}: tokens are mapped into memory, "
      "which needs a folder of this machine; name one, such as /tmp/tokens"
    )
  made_of = {"version": _VERSION, **made_of}
  text = json.dumps(made_of, sort_keys=True)
  return Entry(store.address(folder, made_of), json.loads(text))


def read(entry):
  """(Examples mapped from an entry, its notes); None if it is not there.

  Every file is read once for its checksum. An entry that is damaged is removed,
  with a warning.

  Raises: ValueError if it is there and cannot be read.
  """
  if not entry.path.exists():
    return None
  try:
    about = store.described(entry.path)
    if about.pop("checksum") != _checksum(about):
      raise ValueError("the checksum of entry.json does not match")
    dtypes = {**examples.DTYPES, "tokens": about["token_dtype"]}
    arrays = {
      name: store.read(
        entry.path / f"{name}.bin", dtypes[name], *about["checksums"][name]
      )
      for name in examples.NAMES
    }
    remember = functools.partial(_remembered, entry.path)
    mapped = examples.Examples(arrays, about["digests"], remember)
    return mapped, about["notes"]
  except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
    text = (
      f"{entry.path}: these tokens are damaged ({error}); making them again"
    )
    warnings.warn(text, stacklevel=2)
    shutil.rmtree(entry.path, ignore_errors=True)
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
  partial, folder = store.partial(entry.path), entry.path.parent
  writing = functools.partial(
    store.explained,
    f"data.token_cache: {folder} cannot be written to",
    "set it to a folder that can, with room",
  )
  with contextlib.ExitStack() as stack:
    with writing():
      partial.mkdir(parents=True)
      stack.callback(store.remove, partial)
      store.remove_abandoned(folder)
      paths = {name: partial / f"{name}.bin" for name in examples.NAMES}
      files = {n: stack.enter_context(x.open("wb")) for n, x in paths.items()}
    builder = examples.Builder(files)
    for chunk in chunks:  # what reading the records raises is not renamed
      with writing():
        builder.add(chunk)
    about = {
      "made_of": entry.made_of,
      "notes": notes(),
      "token_dtype": builder.token_dtype,
      "digests": builder.digests,
      "checksums": builder.checksums,
    }
    about["checksum"] = _checksum(about)
    with writing():
      for file in files.values():
        file.close()
      store.describe(partial, about)
      store.publish(partial, entry.path)
  written = read(entry)
  if written is None:
    raise ValueError(f"{entry.path}: what was just written is damaged")
  return written


def _checksum(values):
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _remembered(folder, name, make):
  """What `make` returned when it was first asked for a name."""
  path = folder / f"{name}.txt"
  if path.exists():
    return path.read_text()
  text = make()
  with contextlib.suppress(OSError):  # it can be made again
    store.write(path, text.encode())
  return text
