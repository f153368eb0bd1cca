"""Files that grow line by line, also where nothing can be appended to.

On a disk such a file is one file. An object of a store (gs://…) is whole or
absent, so that what grows is a folder of parts beside its name, PATH.parts,
until it is joined:

    PATH                          whole: what was joined
    PATH.parts/00001-000012       part 12 of what was begun anew once

Of PATH and parts PATH holds, of parts the last beginning; whatever order things
stop in, no line is lost or read twice.
"""

import io

from etils import epath

from dpo_jax import store

_FULL = 2**18  # bytes of a part, from which on another is begun


def exists(path):
  """Whether a file of lines was begun."""
  return path.exists() or bool(_parts(path))


def read(path):
  """The bytes of all lines; b"" if there are none.

  Raises: OSError.
  """
  for tries_left in (2, 1, 0):
    try:
      with store.as_oserror(path):
        if path.exists():
          return path.read_bytes()
        return b"".join(part.read_bytes() for part in _parts(path))
    except FileNotFoundError:  # joined, or begun anew, by another meanwhile
      if not tries_left:
        raise
  return b""


def opened(path):
  """The lines as a binary file to read."""
  path = epath.Path(path)
  if store.is_local(path) or path.exists():
    return path.open("rb")
  if not exists(path):
    raise FileNotFoundError(2, "No such file or object", str(path))
  return io.BytesIO(read(path))


def replace(path, content):
  """Has the file hold `content`; that before, or this, at any moment."""
  if store.is_local(path):
    store.write(path, content)
    return
  with store.as_oserror(path):
    old = _parts(path)
    begun = 1 + max((int(part.name[:5]) for part in old), default=0)
    _part(path, begun, 0).write_bytes(content)
    for whole in (path, *old):
      whole.unlink(missing_ok=True)


def join(path):
  """Makes one object of what was appended."""
  if store.is_local(path):
    return
  with store.as_oserror(path):
    parts = _all_parts(path)
    if parts and not path.exists():
      path.write_bytes(read(path))
    for part in parts:
      part.unlink(missing_ok=True)


class Writer:
  """Appends to a file of lines; each append is there when it returns.

  One that raises may have left a part of its line: the next begins a line of
  its own.
  """

  def __init__(self, path):
    self._path, self._part = path, None
    self._whole = False  # whether the file is known to end with a line
    self._content = b""  # of the part, where there are parts

  def append(self, text):
    """Appends whole lines.

    Raises: OSError if they cannot be written.
    """
    if not store.is_local(self._path):
      with store.as_oserror(self._path):
        self._append_part(text.encode())
      return
    begin = "" if self._whole or _ends_whole(self._path) else "\n"
    self._whole = False
    with self._path.open("a") as file:
      file.write(begin + text)
    self._whole = True

  def _append_part(self, text):
    if self._part is None:
      if self._path.exists():  # joined before
        replace(self._path, self._path.read_bytes())
      parts = _parts(self._path)
      begun, last = parts[-1].name.split("-") if parts else ("1", "-1")
      self._part = int(begun), int(last) + 1
    elif len(self._content) >= _FULL:
      self._part = self._part[0], self._part[1] + 1
      self._content = b""
    content = self._content + text
    _part(self._path, *self._part).write_bytes(content)
    self._content = content


def _ends_whole(path):
  """Whether a file is empty, absent, or ends with a whole line."""
  if not path.exists():
    return True
  with path.open("rb") as file:
    size = file.seek(0, 2)
    file.seek(max(0, size - 1))
    return file.read() in (b"", b"\n")


def _part(path, begun, number):
  return path.parent / f"{path.name}.parts" / f"{begun:05}-{number:06}"


def _all_parts(path):
  folder = path.parent / f"{path.name}.parts"
  if store.is_local(path) or not folder.exists():
    return []
  return sorted(folder.iterdir())


def _parts(path):
  """Those of the last beginning, in their order."""
  parts = _all_parts(path)
  return [p for p in parts if p.name[:5] == parts[-1].name[:5]]
