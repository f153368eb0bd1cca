"""The command line: `python -m dpo_jax.cli VERB --config FILE.py[:ARG] …`.

train   --config configs/dpo.py --config.data.train=my.jsonl --workdir DIR
"""

import ast
import functools
import importlib.util
import pathlib
import sys

from dpo_jax import lookup

_USAGE = __doc__


def load_config(spec, overrides=()):
  """A locked config.

  Args:
    spec: "file.py" or "file.py:argument" of its `get_config`.
    overrides: "loss.beta=0.2" and the like.
  Raises: ValueError for an unknown file, argument or key, nearest spelling
    shown.
  """
  path, _, arg = spec.partition(":")
  module = _import_file(path)
  config = module.get_config(arg) if arg else module.get_config()
  config.lock()
  known = list(_paths(config))
  for override in overrides:
    key, _, text = override.partition("=")
    if key not in known:
      raise ValueError(
        f"--config.{key} is not a field of {path}{lookup.nearest(key, known)}"
      )
    *parents, name = key.split(".")
    node = functools.reduce(lambda node, part: node[part], parents, config)
    node[name] = _parse_value(key, text, node.get_type(name))
  return config


def _parse_value(key, text, kind):
  """The text of an override as a value of the field's type."""
  if text == "None":
    return None
  try:
    if kind is str:
      return text
    value = ast.literal_eval(text.capitalize() if kind is bool else text)
    if kind is tuple and isinstance(value, str | list):
      value = (value,) if isinstance(value, str) else tuple(value)
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is kind:
      return value
  except (ValueError, SyntaxError):
    pass
  raise ValueError(f"--config.{key}={text} must be of type {kind.__name__}")


def _import_file(path):
  path = pathlib.Path(path)
  if not path.is_file():
    there = [str(p) for p in pathlib.Path("configs").glob("*.py")]
    raise ValueError(
      f"--config {path}: no such file{lookup.nearest(path, there)}"
    )
  # `from configs import base` works from the file's own checkout, or from here.
  roots = [str(path.resolve().parent.parent), str(pathlib.Path.cwd())]
  sys.path[:0] = roots
  try:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  finally:
    del sys.path[: len(roots)]
  return module


def _paths(config, prefix=""):
  for key in config:
    value = config.get_ref(key).get()
    if hasattr(value, "to_dict"):
      yield from _paths(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def train(config, options):
  """Trains; see loop.fit."""
  from dpo_jax import loop

  return loop.fit(config, options["workdir"]).exit_code


class _Verb:
  """A function (config, options) -> exit code, and the options it needs."""

  def __init__(self, fn, required):
    self.fn, self.required = fn, required


VERBS = {"train": _Verb(train, ("config", "workdir"))}


def _parse(argv):
  """--name=value or --name value -> (options, config overrides)."""
  options, overrides = {}, []
  words = iter(argv)
  for word in words:
    if not word.startswith("--"):
      raise ValueError(f"unexpected argument {word!r}")
    name, given, value = word[2:].partition("=")
    if not given:
      value = next(words, None)
      if value is None:
        raise ValueError(f"--{name} needs a value")
    if name.startswith("config."):
      overrides.append(f"{name.removeprefix('config.')}={value}")
    else:
      lookup.lookup(("config", "workdir"), name, "option")
      options[name] = value
  return options, overrides


def main(argv=None):
  """Runs a verb; user mistakes end in one line on stderr and exit code 2."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_USAGE)
    return 0
  try:
    verb = lookup.lookup(VERBS, argv[0], "verb")
    options, overrides = _parse(argv[1:])
    for name in verb.required:
      if name not in options:
        raise ValueError(f"{argv[0]} needs --{name}")
    config = load_config(options["config"], overrides)
    return verb.fn(config, options)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except FloatingPointError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  sys.exit(main())
