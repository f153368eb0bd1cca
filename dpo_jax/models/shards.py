"""The safetensors files of a checkpoint's folder, one or several."""

import re
import warnings

import safetensors

from dpo_jax import store
from dpo_jax.config import origin


def files(folder):
  """The safetensors files of a checkpoint, as local paths.

  One file goes before an index of several, as with transformers.
  """
  index = folder / "model.safetensors.index.json"
  single = folder / "model.safetensors"
  if single.exists():
    if index.exists():
      warnings.warn(
        f"{folder}: model.safetensors is read, as transformers does; the files "
        f"of {index.name} beside it are left alone. Delete one or the other",
        stacklevel=3,
      )
    return [single]
  if index.exists():
    return [folder / name for name in _indexed(folder, index)]
  if list(folder.glob("*.bin")):
    raise ValueError(origin.CONVERT.format(folder))
  raise ValueError(
    f"{folder} holds no model.safetensors and no index of several"
  )


def _indexed(folder, index):
  """The names in an index; each is a file of the folder itself."""
  names = store.read_json(index).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{index} is damaged: it has no weight_map")
  # A set would not hold what JSON may have in place of a name.
  outside = [
    name
    for name in names.values()
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\:]+", name)
  ]
  if outside or {".", ".."} & set(names.values()):
    raise ValueError(
      f"{index}: weight_map names {(outside or ['..'])[0]!r}, which is no file "
      "of this folder; names with folders are refused, as they may lead "
      "anywhere"
    )
  names = sorted(set(names.values()))
  missing = [name for name in names if not (folder / name).is_file()]
  if missing:
    raise ValueError(
      f"{folder}: files of model.safetensors.index.json are missing: {missing}"
    )
  return names


def header(file):
  """{name: (shape, type)} of a safetensors file."""
  try:
    with safetensors.safe_open(file, "np") as tensors:
      parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
      return {
        name: (tuple(part.get_shape()), part.get_dtype())
        for name, part in parts.items()
      }
  except Exception as error:  # the library raises its own kinds
    raise ValueError(f"{file} is damaged or cut short: {error}") from error
