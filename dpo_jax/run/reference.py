"""Reference log-probs on disk: computed once, for every run that shares them.

An entry is addressed by what determines its content (token ids, the weights of
the reference, dtypes), so it is never stale. It holds one f32 a scored token,
in the order of the examples, cut into blocks of whole examples.

    KEY/entry.json           what the key was made of, and the counts
    KEY/00012-1a2b3c4d.f32   block 12 as little-endian f32, and its checksum

A file gets its name when it is complete and is never written to again: what an
interrupted run leaves is good, and what is mapped stays as it is.
"""

import hashlib
import json
import re
import time
import uuid
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from etils import epath

_VERSION = 3  # raise it when the same tokens and weights give other log-probs

EXAMPLES_PER_BLOCK = 1024  # at least: what an interruption costs, at most
_MOST_BLOCKS = 64  # a mapped file stays open, and those are limited
_F32 = np.dtype("<f4")
_NAME = re.compile(r"(\d{5})-([0-9a-f]{8})\.f32")
_ABANDONED = 3600.0  # seconds after which nobody goes on writing a .part


class Entry(NamedTuple):
  """One entry of a store, whether or not it is there.

  Attributes:
    path: its folder.
    about: the content of its entry.json.
    counts: scored tokens of each example, i64[N].
    blocks: range of the examples of each block.
  """

  path: epath.Path
  about: dict
  counts: np.ndarray
  blocks: list[range]

  def size(self, number):
    """Scored tokens of a block."""
    span = self.blocks[number]
    return int(self.counts[span.start : span.stop].sum())

  def file(self, number, checksum):
    """The path of a block."""
    return self.path / f"{number:05}-{checksum:08x}.f32"


def key(parts):
  """The address of an entry: a hash of the plain values in `parts`."""
  text = json.dumps({"version": _VERSION, **parts}, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def entry(folder, parts, counts):
  """The Entry of a content; touches no file.

  Args:
    folder: of the store; need not exist.
    parts: plain values that determine the content.
    counts: scored tokens of each example, integers[N].
  """
  counts = np.asarray(counts, np.int64)
  step = max(EXAMPLES_PER_BLOCK, -(-len(counts) // _MOST_BLOCKS))
  about = {
    "version": _VERSION,
    "made_of": parts,
    "examples": len(counts),
    "scored_tokens": int(counts.sum()),
    "examples_per_block": step,
  }
  return Entry(
    epath.Path(folder) / key(parts),
    json.loads(json.dumps(about)),  # as it is read: tuples are lists
    counts,
    [
      range(start, min(start + step, len(counts)))
      for start in range(0, len(counts), step)
    ],
  )


def check(entry):
  """Whether the folder of an entry says that it holds just that.

  Returns: False where nothing says so: there is no entry.json, or a damaged
    one (which is a warning; the blocks prove themselves).
  Raises: ValueError if it says that it holds something else.
  """
  path = entry.path / "entry.json"
  if not path.exists():
    return False
  try:
    there = json.loads(path.read_text())
  except ValueError:
    there = None
  if not isinstance(there, dict):
    warnings.warn(f"{path} is damaged; writing it again", stacklevel=2)
    return False
  there, here, differ = _flat(there), _flat(entry.about), []
  for name in sorted(there.keys() | here.keys()):
    theirs, ours = (x.get(name, "missing") for x in (there, here))
    if theirs != ours:
      differ.append(f"{name} is {theirs} there, {ours} here")
  if differ:
    more = f" (and {len(differ) - 3} more)" if differ[3:] else ""
    raise ValueError(
      f"{path} is of another reference: {'; '.join(differ[:3])}{more}; delete "
      f"the folder {entry.path} to compute it again, or set ref_store to "
      "another folder"
    )
  return True


def describe(entry):
  """Writes entry.json."""
  content = json.dumps(entry.about, indent=2) + "\n"
  _write(entry.path / "entry.json", content.encode())


def find(entry):
  """The blocks that are there and intact.

  Removes damaged ones, with a warning, and what killed runs left unfinished.

  Returns: {number of the block: checksum}.
  """
  found = {}
  if not entry.path.exists():
    return found
  for path in sorted(entry.path.iterdir()):
    name = _NAME.fullmatch(path.name)
    if path.name.endswith(".part"):
      _remove_abandoned(path)
    elif name and int(name[1]) < len(entry.blocks):
      number, checksum = int(name[1]), int(name[2], 16)
      if number in found:
        continue  # of two runs at once; one is as good as the other
      if _read(entry, number, checksum) is None:
        text = f"{path}: cached reference log-probs are damaged; computing "
        warnings.warn(f"{text}these examples again", stacklevel=2)
        path.unlink(missing_ok=True)
      else:
        found[number] = checksum
  return found


def write(entry, number, values):
  """Writes a block; complete or absent, also when interrupted.

  Args:
    entry: Entry.
    number: of the block.
    values: f32[counts[i]] of each of its examples, in order.
  Returns: its checksum.
  """
  flat = np.concatenate(values).astype(_F32)
  assert len(flat) == entry.size(number), "one value a scored token"
  checksum = _checksum(entry, number, flat)
  _write(entry.file(number, checksum), flat.tobytes())
  return checksum


class Stored:
  """A sequence of f32[counts[i]], one an example: views of the blocks."""

  def __init__(self, entry, blocks):
    """Args:
    entry: Entry.
    blocks: f32[size] of each of its blocks.
    """
    self._blocks, self._step = blocks, len(entry.blocks[0])
    self._ends = np.concatenate([[0], np.cumsum(entry.counts)])

  def __len__(self):
    return len(self._ends) - 1

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)
    number = index // self._step
    first = self._ends[number * self._step]
    start, stop = self._ends[index : index + 2] - first
    return self._blocks[number][start:stop]


def load(entry, checksums):
  """The Stored of an entry that is whole.

  Args:
    entry: Entry.
    checksums: {number: checksum} of all its blocks.
  Raises: ValueError if a block is not there, or damaged.
  """
  blocks = []
  for number in range(len(entry.blocks)):
    block = _read(entry, number, checksums[number])
    if block is None:
      raise ValueError(
        f"{entry.file(number, checksums[number])} was there and is gone or "
        "damaged now; leave the store alone while it is used, and run this "
        "again: it goes on with the blocks that are intact"
      )
    blocks.append(block)
  return Stored(entry, blocks)


def _read(entry, number, checksum):
  """f32[size] of an intact block, mapped where it is local; or None."""
  path = entry.file(number, checksum)
  try:
    if "://" in str(path):
      values = np.frombuffer(path.read_bytes(), _F32)
    else:
      # Plain views: slices of the memmap type cost more and do no more.
      values = np.asarray(np.memmap(path, _F32, "r"))
  except (FileNotFoundError, ValueError):  # ValueError: no whole f32, or empty
    return None
  if len(values) != entry.size(number):
    return None
  return values if _checksum(entry, number, values) == checksum else None


def _checksum(entry, number, values):
  """Of the values in their place: no block passes for another one."""
  place = f"{entry.path.name}/{number}"
  return zlib.crc32(values, zlib.crc32(place.encode()))


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  # A name of its own, since two runs may be writing the same file.
  partial = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.part"
  partial.write_bytes(content)
  partial.replace(path)


def _remove_abandoned(path):
  try:
    if time.time() - path.stat().mtime > _ABANDONED:
      path.unlink(missing_ok=True)
  except FileNotFoundError:
    pass  # just finished by another run


def _flat(value, prefix=""):
  """{dotted path: leaf} of nested dicts."""
  if not isinstance(value, dict) or not value:
    return {prefix: value}
  out = {}
  for name, inner in value.items():
    out |= _flat(inner, f"{prefix}.{name}" if prefix else name)
  return out
