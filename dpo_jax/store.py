"""Arrays on disk, addressed by what they are made of.

    KEY/entry.json   what the key was made of, and what else is known of them
    KEY/…            files of one array each

What determines an array determines its address, so it is never stale. A file or
a folder gets its name when it is complete and is not written to again: what an
interrupted run leaves is good, or has a name in .part, and what is mapped stays
as it is.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
import zlib

import numpy as np
from etils import epath

_ABANDONED = 3600.0  # seconds after which nobody goes on writing a .part


def address(folder, made_of):
  """The path of an entry; touches no file.

  Args:
    folder: of the store; need not exist.
    made_of: plain values that determine the content.
  """
  text = json.dumps(made_of, sort_keys=True)
  key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
  return epath.Path(folder) / key


@contextlib.contextmanager
def explained(problem, hint):
  """Makes of an OSError a ValueError: the problem, its reason, a way out."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f"{problem} ({reason}); {hint}") from error


def is_local(path):
  """Whether a path is of a disk, and not of an object store (gs://…)."""
  return "://" not in str(path)


@contextlib.contextmanager
def as_oserror(path):
  """Makes of what a client of an object store raises an OSError."""
  try:
    yield
  except OSError:
    raise
  except Exception as error:  # each client has its own
    raise OSError(f"{path}: {error}") from error


def partial(path):
  """Where to write a file or a folder until it is complete.

  A name of its own, since two runs may be writing the same.
  """
  return path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.part"


def publish(partial, path):
  """Gives what is complete its name.

  Of two runs at once the first one stays of a folder, the last one of a file:
  one is as good as the other.
  """
  try:
    partial.replace(path)
  except OSError:
    if not path.is_dir():
      raise


def move_folder(path, target):
  """Gives a folder another name; of objects, each gets one in turn."""
  if is_local(path):
    path.rename(target)
    return
  for part in path.iterdir():
    if part.is_dir():
      move_folder(part, target / part.name)
    else:
      part.copy(target / part.name, overwrite=True)
      part.unlink()


def read_json(path):
  """The object in a JSON file.

  Raises: ValueError naming the file, if it is damaged.
  """
  try:
    content = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} is damaged: it holds no JSON object")
  return content


def inside(folder, name, where):
  """The path of what a file says is in a folder.

  Args:
    folder: epath.Path.
    name: what the file says.
    where: the file, for the message.
  Raises: ValueError for a name that leads out of the folder, or is none.
  """
  parts = pathlib.PurePosixPath(name).parts if isinstance(name, str) else ()
  if not parts or {"/", "//", ".."} & set(parts) or "\0" in name:
    raise ValueError(
      f"{where} names the folder {name!r}, which is none inside {folder}; put "
      "the name of the point's folder there"
    )
  return folder / name


def write(path, content):
  """Writes the bytes of a file; complete or absent, also when interrupted.

  On a local disk they are there when this returns, also if the power fails.
  """
  if not is_local(path):  # an object is whole; it cannot be renamed
    with as_oserror(path):
      path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  written = partial(path)
  try:
    written.write_bytes(content)
    _sync(written)
    publish(written, path)
    _sync(path.parent)
  finally:
    remove(written)


def _sync(path):
  """Has a local disk keep a file's content, or the names in a folder.

  What is mounted as a disk, such as a bucket, may not know of that.
  """
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(number)


def read(path, dtype, size, checksum, start=0):
  """The array of a file, mapped where it is local; read once to be checked.

  Args:
    path: of the file.
    dtype: of its values.
    size: in bytes.
    checksum: of them.
    start: what the checksum began with.
  Raises: ValueError for another size or checksum; OSError.
  """
  if not is_local(path):
    values = np.frombuffer(path.read_bytes(), dtype)
  elif path.stat().length:
    # Plain views: slices of the memmap type cost more and do no more.
    values = np.asarray(np.memmap(path, dtype, "r"))
  else:  # nothing to map
    values = np.zeros(0, dtype)
  if (values.nbytes, zlib.crc32(values, start)) != (size, checksum):
    raise ValueError(f"the checksum of {path.name} does not match")
  return values


class Parts:
  """A sequence of views of arrays that hold so many parts each."""

  def __init__(self, arrays, ends, per_array=None):
    """Args:
    arrays: the parts, end to end.
    ends: of the parts, i64[parts + 1], from 0.
    per_array: parts in each but the last of them; None if there is one array.
    """
    self._arrays, self._ends = arrays, ends
    self._per_array = per_array or len(self)

  def __len__(self):
    return len(self._ends) - 1

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)
    number = index // self._per_array
    first = self._ends[number * self._per_array]
    start, stop = self._ends[index : index + 2] - first
    return self._arrays[number][start:stop]


def describe(folder, about):
  """Writes the entry.json of an entry."""
  content = json.dumps(about, indent=2) + "\n"
  write(folder / "entry.json", content.encode())


def described(folder):
  """The content of an entry.json.

  Raises: ValueError if it holds something else than a dict; OSError.
  """
  about = json.loads((folder / "entry.json").read_text())
  if not isinstance(about, dict):
    raise ValueError("entry.json does not hold a dict")
  return about


def remove_abandoned(folder):
  """Removes what killed runs left unfinished in a folder."""
  for path in folder.glob("*.part"):
    try:
      inside = path.iterdir() if path.is_dir() else ()
      last = max(x.stat().mtime for x in (path, *inside))
    except OSError:
      continue  # just finished by another run
    if time.time() - last > _ABANDONED:
      remove(path)


def remove(path):
  """Removes a file or a folder, as far as it is there."""
  if not path.is_dir():
    path.unlink(missing_ok=True)
  elif is_local(path):
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.rmtree(missing_ok=True)
