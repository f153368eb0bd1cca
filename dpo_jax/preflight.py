"""What is refused before jax is imported: a mistake costs half a second."""

import os
import pathlib
import re

from etils import epath

from dpo_jax import host, lookup, store
from dpo_jax.config import origin, saved
from dpo_jax.data.read import sources
from dpo_jax.eval import prompting
from dpo_jax.ops import losses
from dpo_jax.run import checks

_KINDS = "models", "datasets"
_ON_HUB = re.compile(r"(?:hf|one_turn|classifier|probability|model):([^\s:@]+)")


def folder(workdir):
  """Refuses a run folder that cannot be written to."""
  path = pathlib.Path(workdir)
  if "://" in str(workdir):
    return
  while not path.exists():
    path = path.parent
  if not path.is_dir():
    raise ValueError(f"--workdir {workdir}: {path} is a file; name a folder")
  if not os.access(path, os.W_OK | os.X_OK):
    raise ValueError(
      f"--workdir {workdir}: {path} cannot be written to; name another folder, "
      "or copy the run into one"
    )


def config(config, reads):
  """Refuses numbers out of range, fields without effect, files not there.

  Args:
    config: ConfigDict; one of no policy (stages, a tokenizer) is not looked at.
    reads: fields that name the sources which are read.
  """
  if "optim" not in config:
    return
  if "study" in config and reads:
    raise ValueError(
      "the config is of a study: `dpo-jax sweep` does it, by the same --config"
    )
  checks.values(config)
  loss = config.to_dict()["loss"]
  terms = {name: v for name, v in loss.items() if isinstance(v, dict)}
  for name, fields in (terms or {loss["name"]: loss}).items():
    losses.check_ranges(name, fields, f"{name}." if terms else "")
  flat = saved.flatten(config.to_dict())
  for field in reads:
    if flat[field] is not None or field == "data.train":
      for _, source in sources.parse(flat[field], field):
        _source(source, field)
  if "sample.prompts" in reads:
    prompting.template(flat["sample.template"])


def start(config):
  """Refuses to start from the folder of a run that is none."""
  name = config.get("init_from")
  if name is not None and origin.parse(name)[0] is None:
    try:
      saved.saved_config(name)
    except ValueError as error:
      raise ValueError(f"init_from = {name!r}: {error}") from error


def _source(source, field):
  """Refuses a file that is not there, and a name that is none."""
  path, name = epath.Path(source), source.partition(":")[0]
  if name in sources.SOURCES or "://" in source:
    return
  if path.suffix:
    lookup.lookup(sources.FILES, path.suffix, f"the suffix of {field}")
    near, parent = "", pathlib.Path(path.parent)
    if parent.is_dir():
      near = lookup.nearest(path.name, [p.name for p in parent.iterdir()])
    hint = f"{field} is a path relative to the current folder{near}"
    with store.explained(f"{path}: cannot be read", hint):
      path.open("rb").close()
  elif not path.is_dir():
    lookup.lookup(sources.SOURCES, name, field)


def on_hub(config):
  """Names in a config that are of the Hugging Face hub, as far as they tell."""
  texts, names = [], []
  for value in saved.flatten(config.to_dict()).values():
    texts += value if isinstance(value, tuple) else [value]
  # A model's name at an endpoint may have colons, and is not of the hub.
  texts = [text for text in texts if not str(text).startswith("openai:")]
  for text in texts:
    names += _ON_HUB.findall(text) if isinstance(text, str) else []
  return [
    name for name in dict.fromkeys(names) if not epath.Path(name).exists()
  ]


def cached(names, reason):
  """Refuses names of the hub of which nothing is kept here.

  Args:
    names: of `on_hub`.
    reason: why the hub is out of reach.
  """
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  home = os.environ.get("HF_HOME") or pathlib.Path(home, "huggingface")
  hub = os.environ.get("HF_HUB_CACHE") or pathlib.Path(home, "hub")
  sets = os.environ.get("HF_DATASETS_CACHE") or pathlib.Path(home, "datasets")
  for name in names:
    dashed = name.replace("/", "--")
    kept = [pathlib.Path(hub, f"{kind}--{dashed}") for kind in _KINDS]
    kept.append(pathlib.Path(sets, name.replace("/", "___")))
    if not any(path.exists() for path in kept):
      raise ValueError(
        f"{name} is no folder here, {reason}, and nothing of it is kept from "
        f"before in {hub}; name a local folder, or connect once"
      )


def reach(configs):
  """Fails at once where the hub is out of reach and its cache has not all."""
  kept(*far(configs))


def far(configs):
  """(names of the hub in configs, why it is out of reach or None)."""
  names = {name: None for c in configs for name in on_hub(c)}
  return names, host.hub_or_cache() if names else None


def kept(names, reason):
  """Refuses names that a hub out of reach is needed for. Args: of `far`."""
  if reason is not None:
    cached(names, reason)
    print(f"{reason}: of {', '.join(names)} its cache is read", flush=True)
