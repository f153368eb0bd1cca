"""Reference log-probs on disk: computed once, for every run that shares them.

An entry of the store is addressed by the token ids, the weights of the
reference and dtypes. It holds one f32 a scored token, in the order of the
examples, cut into blocks of whole examples.

    KEY/entry.json           what the key was made of, and the counts
    KEY/00012-1a2b3c4d.f32   block 12 as little-endian f32, and its checksum

A block gets its name when it is complete: what an interrupted run leaves is
good.
"""

import json
import re
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from dpo_jax import store

_VERSION = 3  # raise it when the same tokens and weights give other log-probs

EXAMPLES_PER_BLOCK = 1024  # at least: what an interruption costs, at most
_MOST_BLOCKS = 64  # a mapped file stays open, and those are limited
_F32 = np.dtype("<f4")
_NAME = re.compile(r"(\d{5})-([0-9a-f]{8})\.f32")


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
    store.address(folder, {"version": _VERSION, **parts}),
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
  path, differ = entry.path / "entry.json", []
  try:
    written = store.described(entry.path)
  except FileNotFoundError:
    return False
  except ValueError:
    warnings.warn(f"{path} is damaged; writing it again", stacklevel=2)
    return False
  written, wanted = (
    traverse_util.flatten_dict(about, keep_empty_nodes=True, sep=".")
    for about in (written, entry.about)
  )
  for name in sorted(written.keys() | wanted.keys()):
    theirs, ours = (x.get(name, "missing") for x in (written, wanted))
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


def find(entry):
  """The blocks that are there and intact.

  Removes damaged ones, with a warning, and what killed runs left unfinished.

  Returns: {number of the block: checksum}.
  """
  intact = {}
  if not entry.path.exists():
    return intact
  store.remove_abandoned(entry.path)
  for path in sorted(entry.path.iterdir()):
    name = _NAME.fullmatch(path.name)
    if not name or int(name[1]) >= len(entry.blocks):
      continue
    number, checksum = int(name[1]), int(name[2], 16)
    if number in intact:
      continue  # of two runs at once; one is as good as the other
    try:
      _read(entry, number, checksum)
      intact[number] = checksum
    except (FileNotFoundError, ValueError):
      text = f"{path}: cached reference log-probs are damaged; computing "
      warnings.warn(f"{text}these examples again", stacklevel=2)
      store.remove(path)
  return intact


def write(entry, number, values):
  """Writes a block; complete or absent, also when interrupted.

  Args:
    values: f32[counts[i]] of each of its examples, in order.
  Returns: its checksum.
  """
  flat = np.concatenate(values).astype(_F32)
  assert len(flat) == entry.size(number), "one value a scored token"
  checksum = zlib.crc32(flat, _start(entry, number))
  store.write(entry.file(number, checksum), flat.tobytes())
  return checksum


def load(entry, checksums):
  """The log-probs of each example, of an entry that is whole.

  Args:
    checksums: {number: checksum} of all its blocks.
  Returns: store.Parts, f32[counts[i]] each.
  Raises: ValueError if a block is not there, or damaged.
  """
  blocks = []
  for number in range(len(entry.blocks)):
    try:
      blocks.append(_read(entry, number, checksums[number]))
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(
        f"{entry.file(number, checksums[number])} was there and is gone or "
        "damaged now; leave the store alone while it is used, and run this "
        "again: it goes on with the blocks that are intact"
      ) from error
  ends = np.concatenate([[0], np.cumsum(entry.counts)])
  return store.Parts(blocks, ends, len(entry.blocks[0]))


def _read(entry, number, checksum):
  """f32[size] of a block; see store.read."""
  size, start = entry.size(number) * _F32.itemsize, _start(entry, number)
  return store.read(entry.file(number, checksum), _F32, size, checksum, start)


def _start(entry, number):
  """What a checksum begins with: no block passes for that of another place."""
  return zlib.crc32(f"{entry.path.name}/{number}".encode())
