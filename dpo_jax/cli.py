"""The command line: `dpo-jax VERB --config FILE.py[:ARG] --workdir DIR …`.

train    --config configs/dpo.py --config.data.train=my.jsonl --workdir DIR
         trains; resumes what DIR holds
         --profile traces a few steps for TensorBoard or Perfetto
sweep    --config configs/dpo.py --config.data.train=my.jsonl --workdir DIR
         trains and evaluates each point of the file's sweep(), skips finished
         ones, prints a table and writes a report
         --config.sweep.together=4 trains up to four at a time, in one program
eval     --workdir DIR --config.data.eval=held_out.jsonl
         evaluates a trained policy: held-out comparisons, reward, KL
sample   --workdir DIR --config.sample.prompts=my.jsonl
         draws completions of a trained policy
report   --workdir DIR
         writes the report of a sweep again
export   --workdir DIR
         writes the policy as a folder that transformers or PEFT loads
audit    --config configs/dpo.py --config.data.train=my.jsonl
         shows what would be trained on, token by token, and counts what is
         wrong with it; exit code 1 above the limits of config.audit

losses   prints every loss: formula, source, needs, dialects, defaults

`--config.FIELD=VALUE` sets a field of configs/base.py. eval, sample, export and
audit take the config of the run folder unless --config names another. --workdir
may be left out where the config has one, and for audit.
"""

import ast
import functools
import importlib.util
import os
import pathlib
import sys
import time

from etils import epath

from dpo_jax import allocator, lookup, programs, verbs

_USAGE = __doc__


def load_config(spec, overrides=()):
  """A locked config.

  Args:
    spec: "file.py" or "file.py:argument" of its `get_config`, or the
      config.json of a run.
    overrides: "loss.beta=0.2" and the like.
  Raises: ValueError for an unknown file, argument or key, nearest spelling
    shown.
  """
  return _load(spec, overrides)[0]


def _load(spec, overrides):
  """(locked config, its module or None)."""
  if spec.endswith(".json"):
    from dpo_jax.train import settings

    path, module = spec, None
    config = settings.saved_config(epath.Path(spec).parent)
  else:
    path, _, arg = spec.partition(":")
    module = import_file(path)
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
  return config, module


def _parse_value(key, text, kind):
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
  raise ValueError(f"--config.{key}={text} must be of type {kind.__name__}")


def _guess(text):
  """A literal where it is one, else text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def import_file(path):
  """The module of a config file, with its checkout in reach.

  Raises: ValueError if there is no such file.
  """
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
  for key, value in config.items():
    if hasattr(value, "to_dict"):
      yield from _paths(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def _parse(argv):
  """--name=value or --name value -> (options, config overrides)."""
  options, overrides = {}, []
  words = iter(argv)
  for word in words:
    if not word.startswith("--"):
      raise ValueError(f"unexpected argument {word!r}")
    name, given, value = word[2:].partition("=")
    if word == "--profile":
      overrides.append("log.profile=true")
      continue
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


def run(name, options, overrides):
  """Runs a verb.

  Args:
    name: of the verb.
    options: {"config", "workdir"}, as far as given.
    overrides: "loss.beta=0.2" and the like.
  Returns: exit code.
  """
  verb = lookup.lookup(verbs.VERBS, name, "verb")
  workdir, spec = options.get("workdir"), options.get("config")
  if spec is None and verb.saved and workdir is not None:
    spec = str(epath.Path(workdir) / "config.json")
  if not verb.config and "config" not in options:
    config = module = None
  elif spec is None:
    raise ValueError(f"{name} needs --config")
  else:
    config, module = _load(spec, overrides)
    workdir = config.get("workdir") if workdir is None else workdir
  if workdir is None and verb.folder:
    raise ValueError(f"{name} needs --workdir")
  allocator.keep_pages()
  allocator.claim_devices()
  programs.leave_triton_out()
  programs.keep()
  begin = time.perf_counter()
  code = verb.run(config, workdir, module)
  minutes, seconds = divmod(round(time.perf_counter() - begin), 60)
  what = name if workdir is None else f"{name} {workdir}"
  print(f"{what}: {minutes}:{seconds:02}", flush=True)
  return code


def main(argv=None):
  """Runs a verb; user mistakes end in one line on stderr and exit code 2."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
    print(_USAGE)
    return 0
  try:
    return run(argv[0], *_parse(argv[1:]))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except FloatingPointError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except BrokenPipeError:  # the reader went away: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except KeyboardInterrupt as stopped:
    print("interrupted; the same command goes on from here", file=sys.stderr)
    return getattr(stopped, "exit_code", 130)


if __name__ == "__main__":
  sys.exit(main())
