"""A config from its file: argument, overrides, points of a sweep."""

import ast
import collections
import copy
import functools
import importlib.util
import inspect
import operator
import pathlib
import sys
import types
from typing import NamedTuple

from etils import epath
from ml_collections import config_dict

from dpo_jax import lookup
from dpo_jax.config import saved


def load_config(spec, overrides=()):
  """A locked config.

  Args:
    spec: "file.py" or "file.py:argument" of its `get_config`; in the place of
      a file, the name of a config that comes with the package, "dpo:loss=ipo";
      or the config.json of a run.
    overrides: "loss.beta=0.2" and the like, or {"loss.beta": 0.2, …}.
  Raises: ValueError for an unknown file, argument or key, nearest spelling
    shown.
  """
  if isinstance(overrides, dict):
    return at(load(spec, ()).config, overrides, "load_config")
  return load(spec, overrides).config


class Source(NamedTuple):
  """A config, and what makes it anew with another argument.

  Attributes:
    config: locked ConfigDict.
    module: of its file; None for the config.json of a run.
    path, arg: of the spec.
    overrides, axes: of the command line, --config.FIELD=… and --sweep ….
  """

  config: config_dict.ConfigDict
  module: types.ModuleType | None
  path: str
  arg: str
  overrides: tuple
  axes: tuple

  def at(self, point):
    """The config of a point of a sweep.

    Args:
      point: {"loss.beta": 0.1, …}; with {"arg": "loss=simpo", …} the argument
        of the config is read first, over that of the command line.
    """
    if "arg" not in point:
      return at(self.config, point)
    arg, rest = point["arg"], {k: v for k, v in point.items() if k != "arg"}
    if self.module is None:
      raise ValueError(
        f"the sweep sets the argument {arg}, and {self.path} takes no "
        "argument: name a config file, or one that comes with dpo_jax"
      )
    whole = ",".join(filter(None, (self.arg, arg)))
    spec = f"{self.path}:{arg}"
    config = _made(self.module, self.path, whole)
    return at(_with(config, spec, self.overrides), rest)


def load(spec, overrides, axes=()):
  """The Source of a config, see `load_config`."""
  if spec.endswith(".json"):
    path, arg, module = spec, "", None
    config = saved.saved_config(epath.Path(path).parent)
  else:
    path, _, arg = spec.partition(":")
    module = import_file(file_of(path))
    config = _made(module, path, arg)
  config = _with(config, path, overrides)
  return Source(config, module, path, arg, tuple(overrides), tuple(axes))


def _with(config, spec, overrides):
  """The config, locked, with what a command sets."""
  config.lock()
  for override in overrides:
    key, _, text = override.partition("=")
    value = parsed(config, spec, key, text, f"--config.{key}")
    node, name = _place(config, key)
    node[name] = value
  return config


def parsed(config, spec, key, text, flag):
  """The value of a field that a command gives as text.

  Args:
    config: ConfigDict that has the field.
    spec: of the config, for messages.
    key: "loss.beta".
    text: "0.2".
    flag: how the command names the field, for messages.
  Raises: ValueError if it is no field, or the text no value of its type.
  """
  known = saved.flatten(config.to_dict())
  if key not in known:
    raise ValueError(
      f"{flag} is not a field of {spec}{lookup.nearest(key, known)}"
    )
  node, name = _place(config, key)
  return _parse_value(flag, text, node.get_type(name))


def _place(config, path):
  """(section, name) of the field at a path, "loss.beta"."""
  *parents, name = path.split(".")
  return functools.reduce(operator.getitem, parents, config), name


def _parse_value(flag, text, kind):
  """The text of an override as a value of the field's type."""
  if text == "None":
    return None
  try:
    if kind is str:
      return text
    if kind is type(None):
      return _guess(text)
    if kind is tuple and not set(text) & set("([\"'"):
      return tuple(text.split(","))
    value = ast.literal_eval(text.capitalize() if kind is bool else text)
    if kind is tuple and isinstance(value, str | list):
      value = (value,) if isinstance(value, str) else tuple(value)
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is kind:
      return value
  except (ValueError, SyntaxError):
    pass
  raise ValueError(f"{flag}={text} must be of type {kind.__name__}")


def _guess(text):
  """A literal where it is one, else text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _made(module, path, arg):
  """What the `get_config` of a module makes of an argument."""
  make = getattr(module, "get_config", None)
  if make is None:
    raise ValueError(f"--config {path}: it has no get_config()")
  if arg and not inspect.signature(make).parameters:
    raise ValueError(
      f"--config {path}:{arg}: its get_config() takes no argument"
    )
  return make(arg) if arg else make()


def shipped():
  """{name: file} of the configs that come with the package."""
  (folder,) = importlib.import_module("dpo_jax.configs").__path__
  files = sorted(pathlib.Path(folder).glob("*.py"))
  texts = {p: p.read_text(encoding="utf-8") for p in files}
  return {p.stem: p for p in files if "\ndef get_config(" in texts[p]}


def file_of(name):
  """The file of a config: a path that ends in .py, or the name of one shipped.

  Raises: ValueError if there is no such file, nearest spelling shown.
  """
  path, own = pathlib.Path(name), shipped()
  if path.suffix == ".py" and path.is_file():
    return path
  if name in own:
    return own[name]
  here = [str(p) for p in pathlib.Path().glob("*.py")]
  here += map(str, pathlib.Path("configs").glob("*.py"))
  hint = lookup.nearest(name, here) or lookup.nearest(path.stem, own)
  raise ValueError(
    f"--config {name}: no such file{hint} (a FILE.py, or by its name one that "
    f"comes with dpo_jax: {', '.join(own)})"
  )


def import_file(path):
  """The module of a config file, with its checkout in reach.

  Raises: ValueError for what it imports under a name that is not there.
  """
  path = pathlib.Path(path)
  # What lies beside the file's folder may be imported, or what lies here.
  roots = [str(path.resolve().parent.parent), str(pathlib.Path.cwd())]
  sys.path[:0] = roots
  try:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  except ModuleNotFoundError as error:
    if error.name != "configs":
      raise
    raise ValueError(
      f"--config {path}: {error}; the configs that come with dpo_jax are "
      "dpo_jax.configs: write `from dpo_jax.configs import base`"
    ) from error
  finally:
    del sys.path[: len(roots)]
  return module


def point_name(overrides):
  """`beta=0.1,seed=1` of {"loss.beta": 0.1, "data.seed": 1}, a folder."""
  short = [key.rsplit(".", 1)[-1] for key in overrides]
  keys = short if len(set(short)) == len(short) else list(overrides)
  pairs = zip(keys, overrides.values(), strict=True)
  parts = [v if k == "arg" else f"{k}={v}" for k, v in pairs]
  return ",".join(parts).replace("/", "_")


def swept(overrides):
  """What a point sets, in words: fields, and arguments of the config."""
  for key, value in overrides.items():
    args = value.split(",") if key == "arg" else [key]
    yield from (arg.partition("=")[0] for arg in args)


def at(config, overrides, who="the sweep"):
  """A copy of a config with {"loss.beta": 0.1, …} set.

  Args:
    who: sets them, for messages.
  Raises: ValueError for a field that is not there, or of another type.
  """
  config, fields = copy.deepcopy(config), saved.flatten(config.to_dict())
  if "arg" in overrides:
    raise ValueError(
      f"{who} sets the argument {overrides['arg']}, which is of a file and "
      "not of a config: give sweeps.sweep the `at` of its load.Source"
    )
  for key, value in overrides.items():
    if key not in fields:
      raise ValueError(
        f"{who} sets {key}, which is not a field of the config"
        f"{lookup.nearest(key, fields)}"
      )
    node, name = _place(config, key)
    try:
      node[name] = value
    except TypeError as error:
      raise ValueError(
        f"{who} sets {key} = {value!r}, which must be of type "
        f"{node.get_type(name).__name__}"
      ) from error
  return config


def plain(section):
  """A section of a config as an immutable NamedTuple of its fields."""
  fields = {
    key: plain(value) if hasattr(value, "items") else value
    for key, value in section.items()
  }
  return collections.namedtuple("Section", fields)(**fields)
