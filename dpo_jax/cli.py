"""The command line: `dpo-jax VERB --config FILE.py[:ARG] --workdir DIR …`.

train    --config configs/dpo.py --config.data.train=my.jsonl --workdir DIR
         trains; resumes what DIR holds
sweep    --config configs/dpo.py --config.data.train=my.jsonl --workdir DIR
         trains and evaluates each point of the file's sweep(), skips finished
         ones, prints a table and writes a report
eval     --workdir DIR --config.data.eval=held_out.jsonl
         evaluates a trained policy: held-out comparisons, reward, KL
sample   --workdir DIR --config.sample.prompts=my.jsonl
         draws completions of a trained policy
report   --workdir DIR
         writes the report of a sweep again

`--config.FIELD=VALUE` sets a field of configs/base.py. eval and sample take the
config of the run folder unless --config names another. --workdir may be left
out where the config has one.
"""

import ast
import functools
import importlib.util
import json
import pathlib
import sys
import time

from etils import epath

from dpo_jax import allocator, lookup

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
    from dpo_jax.train import checkpoint

    path, module = spec, None
    config = checkpoint.saved_config(epath.Path(spec).parent)
  else:
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
  for key, value in config.items():
    if hasattr(value, "to_dict"):
      yield from _paths(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def train(config, workdir, module):
  """Trains a policy (loop.fit), or the tokenizer of algo = "tokenizer"."""
  del module
  if config.get("algo") == "tokenizer":
    return _tokenizer(config, workdir)
  from dpo_jax import loop

  return loop.fit(config, workdir).exit_code


def _tokenizer(config, workdir):
  from dpo_jax.data import bpe, sources

  about = epath.Path(workdir) / "tokenizer.about.json"
  if about.exists():
    if json.loads(about.read_text()) != json.loads(config.to_json()):
      raise ValueError(f"{workdir} holds a tokenizer of another config")
    print(f"{workdir}: trained before, skipped")
    return 0
  records = sources.load(config.data.train, "sft", sources.Policy("error"))
  sources.refuse_messages(records, "the tokenizer's data.train")
  texts = [r.prompt + c for r in records for c in r.completions]
  size = bpe.train(texts, config.vocab_size, workdir)
  about.write_text(config.to_json())
  print(f"{size} tokens from {len(texts)} texts in {workdir}")
  return 0


def evaluate(config, workdir, module):
  """Evaluates the policy of a run folder; writes evaluation.json there."""
  del module
  from dpo_jax import assembly, evaluation
  from dpo_jax.train import checkpoint

  setup = assembly.prepare_model(config)
  policy = assembly.saved_params(setup, workdir)
  ref = assembly.initial_params(setup)
  meta = checkpoint.check_run(workdir, config.to_dict(), ref)
  made = evaluation.made_of(meta["step"], meta["data_fingerprint"], ref)
  result = evaluation.evaluate(setup, policy, ref, workdir, made)
  for name, value in result.get("comparisons", {}).items():
    print(f"{name:24} {value:.4g}")
  for name, value in result.get("means", {}).items():
    print(f"{name:24} {value['mean']:.4g} ± {value['se']:.2g}")
  return 0


def sample(config, workdir, module):
  """Draws completions of a run's policy, or of init_from's, into its folder."""
  del module
  from dpo_jax import assembly
  from dpo_jax.eval import generate
  from dpo_jax.train import checkpoint
  from dpo_jax.train import state as state_lib

  setup = assembly.prepare_model(config)
  step = checkpoint.latest_step(workdir)
  if step is not None:
    policy = assembly.saved_params(setup, workdir)
    print(f"the policy of {workdir}, step {step}")
  elif config.init_from is not None:
    policy = assembly.initial_params(setup)
    print(f"the policy of init_from = {config.init_from}")
  else:
    raise ValueError(
      f"{workdir} holds no trained policy, and init_from names none"
    )
  identity = {
    "sample": config.sample.to_dict(),
    "policy": state_lib.fingerprint(policy),
    "model": config.model.to_dict(),
    "precision": config.precision,
    "tokenizer": config.tokenizer,
  }
  rows = generate.write(setup, policy, identity, workdir)
  for row in rows[:3]:
    print(f"{row['prompt']} ⟶{row['completion']}")
  return 0


def sweep(config, workdir, module):
  """Trains and evaluates the points of the config file's `sweep()`."""
  from dpo_jax import report, sweeps

  if not hasattr(module, "sweep"):
    where = "a run's config.json" if module is None else module.__file__
    raise ValueError(
      f"{where} has no sweep(): name a config file that has one, which yields "
      'the points, for example {"loss.beta": 0.1}'
    )
  code = sweeps.sweep(config, module.sweep(), workdir)
  if code == 0:
    page = report.write(workdir)
    print(report.table(report.rows(workdir), "text"))
    print(f"report: {page}")
  return code


def write_report(config, workdir, module):
  """Writes report.html, report.md and the figures of a sweep's folder."""
  del config, module
  from dpo_jax import report

  page = report.write(workdir)
  print(report.table(report.rows(workdir), "text"))
  print(f"report: {page}")
  return 0


# Each: function (config, workdir, module of the config) -> exit code, and
# whether the config may be the one that the run folder holds.
VERBS = {
  "train": (train, False),
  "eval": (evaluate, True),
  "sample": (sample, True),
  "sweep": (sweep, False),
  "report": (write_report, True),
}


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


def _run(argv):
  fn, saved = lookup.lookup(VERBS, argv[0], "verb")
  options, overrides = _parse(argv[1:])
  workdir, spec = options.get("workdir"), options.get("config")
  if spec is None and saved and workdir is not None:
    spec = str(epath.Path(workdir) / "config.json")
  if argv[0] == "report" and "config" not in options:
    config = module = None
  elif spec is None:
    raise ValueError(f"{argv[0]} needs --config")
  else:
    config, module = _load(spec, overrides)
    workdir = config.get("workdir") if workdir is None else workdir
  if workdir is None:
    raise ValueError(f"{argv[0]} needs --workdir")
  allocator.keep_pages()
  begin = time.perf_counter()
  code = fn(config, workdir, module)
  minutes, seconds = divmod(round(time.perf_counter() - begin), 60)
  print(f"{argv[0]} {workdir}: {minutes}:{seconds:02}", flush=True)
  return code


def main(argv=None):
  """Runs a verb; user mistakes end in one line on stderr and exit code 2."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
    print(_USAGE)
    return 0
  try:
    return _run(argv)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except FloatingPointError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from here", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main())
