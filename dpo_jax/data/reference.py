"""Reference log-probs on disk: computed once, for every run that shares them.

An entry is addressed by what determines its content (token ids, the weights of
the reference, dtypes), so it is never stale; it holds one f32 a scored token,
in the order of the examples.

    KEY.npy    f32[scored tokens of all examples]
    KEY.json   what the key was made of, and a checksum; written last
"""

import hashlib
import io
import json
import warnings
import zlib

import numpy as np
from etils import epath

_VERSION = 1  # raise it when the same tokens and weights give other log-probs


def key(parts):
  """The address of an entry: a hash of the plain values in `parts`."""
  text = json.dumps({"version": _VERSION, **parts}, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def load(folder, parts, counts):
  """The entry as a list of f32 arrays, one an example, or None.

  Args:
    folder: of the store; need not exist.
    parts: plain values that determine the content.
    counts: scored tokens of each example.
  Returns: list of f32[counts[i]], or None where there is no entry or a damaged
    one (which is a warning).
  """
  name = key(parts)
  meta = epath.Path(folder) / f"{name}.json"
  if not meta.exists():
    return None
  try:
    checksum = json.loads(meta.read_text())["checksum"]
    content = (epath.Path(folder) / f"{name}.npy").read_bytes()
    # Of the whole file: a header with a flipped bit may still be one.
    values = None
    if zlib.crc32(content) == checksum:
      values = np.load(io.BytesIO(content))
  except (OSError, ValueError, KeyError, TypeError):
    values = None
  if values is None or values.shape != (sum(counts),):
    text = f"{meta}: the cached reference is damaged; computing it again"
    warnings.warn(text, stacklevel=2)
    return None
  return np.split(values, np.cumsum(counts)[:-1])


def save(folder, parts, values):
  """Writes an entry; complete or absent, also when interrupted."""
  folder, name = epath.Path(folder), key(parts)
  folder.mkdir(parents=True, exist_ok=True)
  flat = np.concatenate(values).astype(np.float32)
  content = io.BytesIO()
  np.save(content, flat)
  partial = folder / f"{name}.npy.part"
  partial.write_bytes(content.getvalue())
  partial.replace(folder / f"{name}.npy")
  meta = {**parts, "checksum": zlib.crc32(content.getvalue())}
  partial = folder / f"{name}.json.part"
  partial.write_text(json.dumps(meta, indent=2))
  partial.replace(folder / f"{name}.json")
