"""Examples as flat arrays, in memory or mapped from files.

A sequence of comparisons.Example, views that are made when they are asked for:
a million of them are a few arrays, not a hundred million Python objects. Of N
examples:

    tokens      u16|i32[…]    prompt, completion 1, 2, … of each, end to end
    lengths     i32[pieces]   tokens of each prompt and completion
    sizes       i32[pairs]    completions that a comparison names
    members     i32[…]        which those are, indices into the completions
    weights     f64[pairs]    of the comparisons
    labels, scores, ranking, ended   what examples have of these, end to end
    has         bool[N, 4]    whether an example has them
    ends        i64[N + 1, 8] where each ends in the arrays of COUNTED
    example_id  i64[N]
    source      i32[N]

`origin` is not kept, it is for messages while records are read.
"""

import functools
import hashlib
import io
import itertools
import zlib
from typing import NamedTuple

import numpy as np

from dpo_jax import store
from dpo_jax.data.tokens import comparisons

OPTIONAL = ("labels", "scores", "ranking", "ended")
COUNTED = ("tokens", "lengths", "sizes", "members", *OPTIONAL)
_TOKENS, _PIECES, _PAIRS = 0, 1, 2  # columns of `ends`
DTYPES = {
  **dict.fromkeys(("lengths", "sizes", "members", "ranking", "source"), "<i4"),
  **dict.fromkeys(("weights", "labels", "scores"), "<f8"),
  **dict.fromkeys(("example_id", "ends"), "<i8"),
  **dict.fromkeys(("ended", "has"), "|b1"),
}
NAMES = ("tokens", *DTYPES)
PER_CHUNK = 512  # records or examples that are handled at once
_PER_STEP = 1 << 16  # examples: bounds the memory that columns pass through


class Chunk(NamedTuple):
  """Some examples on their way into an `Examples`.

  Attributes:
    arrays: as in the module docstring; `ends` without its first row of zeros.
    tokens, compared: bytes that the two fingerprints are of.
  """

  arrays: dict
  tokens: bytes
  compared: bytes


class Columns(NamedTuple):
  """What batches are planned by, i32[N] each.

  Attributes:
    prompt, scored: tokens of the prompt; of all completions together.
    longest: tokens of the longest completion.
    completions, pairs: how many.
    compared: completions that the largest comparison names; 2 without any.
  """

  prompt: np.ndarray
  scored: np.ndarray
  longest: np.ndarray
  completions: np.ndarray
  pairs: np.ndarray
  compared: np.ndarray


class Examples:
  """A sequence of comparisons.Example over flat arrays."""

  def __init__(self, arrays, digests, remember=None):
    """Args:
    arrays: by name, see the module docstring; `ends` and `has` may be flat.
    digests: of the tokens, and of all that is compared: hexadecimal.
    remember: function (name, make) -> str, what `make` returned the first time;
      None makes it anew.
    """
    self._arrays = {
      **arrays,
      "ends": arrays["ends"].reshape(-1, len(COUNTED)),
      "has": arrays["has"].reshape(-1, len(OPTIONAL)),
    }
    self._digests = digests
    self._remember = remember or (lambda name, make: make())

  def __len__(self):
    return len(self._arrays["source"])

  def __getitem__(self, index):
    if not -len(self) <= index < len(self):
      raise IndexError(index)
    index, arrays = int(index) % len(self), self._arrays
    starts, stops = arrays["ends"][index : index + 2].tolist()
    spans = zip(COUNTED, starts, stops, strict=True)
    parts = {name: arrays[name][start:stop] for name, start, stop in spans}
    ids = parts["tokens"]
    ends = list(itertools.accumulate(parts["lengths"].tolist()))
    members = iter(parts["members"].tolist())
    weights = arrays["weights"][starts[_PAIRS] : stops[_PAIRS]].tolist()
    compared = zip(parts["sizes"].tolist(), weights, strict=True)
    has = arrays["has"][index].tolist()
    return comparisons.Example(
      example_id=int(arrays["example_id"][index]),
      source=int(arrays["source"][index]),
      prompt=ids[: ends[0]],
      completions=tuple(ids[a:b] for a, b in itertools.pairwise(ends)),
      pairs=tuple((*itertools.islice(members, n), w) for n, w in compared),
      **{
        name: tuple(parts[name].tolist()) if has_it else None
        for name, has_it in zip(OPTIONAL, has, strict=True)
      },
    )

  def lengths(self, index):
    """Tokens of the prompt and of each completion of an example, i32[1 + C]."""
    start, stop = self._arrays["ends"][index : index + 2, _PIECES]
    return self._arrays["lengths"][start:stop]

  @property
  def source(self):
    """i32[N]: which data set of a mixture."""
    return self._arrays["source"]

  @functools.cached_property
  def extras(self):
    """{"labels", "scores": store.Parts} as far as all examples have them."""
    every = dict(zip(OPTIONAL, self._arrays["has"].all(axis=0), strict=True))
    ends = dict(zip(COUNTED, self._arrays["ends"].T, strict=True))
    return {
      name: store.Parts([self._arrays[name]], ends[name])
      for name in ("labels", "scores")
      if every[name]
    }

  @functools.cached_property
  def columns(self):
    """The Columns, computed by steps and kept: 24 bytes an example."""
    starts = range(0, len(self), _PER_STEP)
    parts = [self._columns(start, start + _PER_STEP) for start in starts]
    return Columns(*map(np.concatenate, zip(*parts, strict=True)))

  def _columns(self, start, stop):
    ends = self._arrays["ends"][start : stop + 1]
    pieces, pairs = ends[:, _PIECES], ends[:, _PAIRS]
    lengths = self._arrays["lengths"][pieces[0] : pieces[-1]]
    sizes = self._arrays["sizes"][pairs[0] : pairs[-1]]
    first, pairs = pieces[:-1] - pieces[0], pairs - pairs[0]
    prompt, behind = lengths[first], lengths.copy()
    behind[first] = 0
    compared = np.full(len(first), 2)
    some = np.diff(pairs) > 0  # `reduceat` knows no empty sums
    if some.any():
      compared[some] = np.maximum.reduceat(sizes, pairs[:-1][some])
    columns = Columns(
      prompt=prompt,
      scored=np.diff(ends[:, _TOKENS]) - prompt,
      longest=np.maximum.reduceat(behind, first),
      completions=np.diff(pieces) - 1,
      pairs=np.diff(pairs),
      compared=compared,
    )
    return tuple(column.astype(np.int32) for column in columns)

  @property
  def token_fingerprint(self):
    """ "960 examples, 1f0e…", of the tokens alone, whatever is compared."""
    return f"{len(self)} examples, {self._digests[0]}"

  def fingerprint(self, parts=None):
    """The same of all that training reads.

    Args:
      parts: of a weighted mixture, see order.mixture; None is every example
        once. A pass over all examples, unless it was made before.
    """
    digest = self._digests[1]
    if parts is not None:
      more = repr(parts).encode()

      def make():
        whole = _digest()
        for example in self:
          whole.update(_described(example)[1])
        whole.update(more)
        return whole.hexdigest()

      name = hashlib.blake2b(more, digest_size=8).hexdigest()
      digest = self._remember(f"mixture-{name}", make)
    return f"{len(self)} examples, {digest}"


class Builder:
  """Puts chunks of examples one behind the other into open files."""

  def __init__(self, files):
    """`files`: binary file to write to, by name, of all NAMES."""
    self._files, self._digests = files, (_digest(), _digest())
    self.checksums = dict.fromkeys(files, (0, 0))  # (bytes, CRC-32), by name
    self._ends = np.zeros((1, len(COUNTED)), DTYPES["ends"])
    self.token_dtype = None  # that of the first chunk
    self._write("ends", self._ends)

  def add(self, chunk):
    """Appends a chunk; its token ids have the type of those before."""
    ends = chunk.arrays["ends"] + self._ends
    for name in NAMES:
      self._write(name, ends if name == "ends" else chunk.arrays[name])
    self._ends = ends[-1:] if len(ends) else self._ends
    dtype = chunk.arrays["tokens"].dtype.str
    assert self.token_dtype in (None, dtype), "one type of ids"
    self.token_dtype = dtype
    for digest, text in zip(self._digests, chunk[1:], strict=True):
      digest.update(text)

  def _write(self, name, values):
    content, (size, checksum) = values.tobytes(), self.checksums[name]
    self._files[name].write(content)
    self.checksums[name] = size + len(content), zlib.crc32(content, checksum)

  @property
  def digests(self):
    return [digest.hexdigest() for digest in self._digests]


def of(examples):
  """The Examples of a list of comparisons.Example; of Examples, they."""
  if isinstance(examples, Examples):
    return examples
  return in_memory(chunks(examples, "<i4"))


def in_memory(chunks):
  """The Examples of some chunks, at least one, whose arrays are in memory."""
  files = {name: io.BytesIO() for name in NAMES}
  builder = Builder(files)
  for chunk in chunks:
    builder.add(chunk)
  dtypes = {**DTYPES, "tokens": builder.token_dtype}
  arrays = {
    name: np.frombuffer(file.getbuffer(), dtypes[name])
    for name, file in files.items()
  }
  return Examples(arrays, builder.digests)


def chunks(examples, token_dtype):
  """Yields an iterable of comparisons.Example as Chunks; one if it is empty."""
  examples = iter(examples)
  part = list(itertools.islice(examples, PER_CHUNK))
  while True:
    yield flatten(part, token_dtype)
    part = list(itertools.islice(examples, PER_CHUNK))
    if not part:
      return


def token_dtype(vocab_size):
  """The type of ids below `vocab_size`, as numpy writes it."""
  return "<u2" if vocab_size <= 1 << 16 else "<i4"


def flatten(examples, token_dtype):
  """The Chunk of a list of comparisons.Example."""
  pieces = [ids for e in examples for ids in (e.prompt, *e.completions)]
  pairs = [pair for e in examples for pair in e.pairs]
  values = {
    "lengths": [len(ids) for ids in pieces],
    "sizes": [len(pair) - 1 for pair in pairs],
    "members": [k for pair in pairs for k in pair[:-1]],
    "weights": [pair[-1] for pair in pairs],
    "example_id": [e.example_id for e in examples],
    "source": [e.source for e in examples],
    "has": [[getattr(e, n) is not None for n in OPTIONAL] for e in examples],
  }
  for name in OPTIONAL:
    values[name] = [x for e in examples for x in getattr(e, name) or ()]
  counts = [
    [
      len(e.prompt) + sum(map(len, e.completions)),
      1 + len(e.completions),
      len(e.pairs),
      sum(map(len, e.pairs)) - len(e.pairs),
      *(len(getattr(e, name) or ()) for name in OPTIONAL),
    ]
    for e in examples
  ]
  counts = np.asarray(counts, DTYPES["ends"]).reshape(-1, len(COUNTED))
  arrays = {
    **{name: np.asarray(x, DTYPES[name]) for name, x in values.items()},
    "tokens": np.fromiter(itertools.chain.from_iterable(pieces), token_dtype),
    "ends": np.cumsum(counts, axis=0),
  }
  texts = [_described(example) for example in examples]
  return Chunk(arrays, *(b"".join(text[k] for text in texts) for k in (0, 1)))


def _described(example):
  """Bytes that stand for the tokens of an example, and for all compared.

  Run folders and reference stores hold digests of these: to write them in
  another way is to refuse what was made before.
  """
  prompt, *completions = map(_plain, (example.prompt, *example.completions))
  tokens = repr((prompt, tuple(completions)))
  compared = f"{tokens[:-1]}, {example.pairs!r})"
  for more in (example.labels, example.scores):
    compared += "" if more is None else repr(more)
  return tokens.encode(), compared.encode()


def _plain(ids):
  return ids if isinstance(ids, list) else ids.tolist()


def _digest():
  return hashlib.blake2b(digest_size=8)
