"""The command line: `dpo-jax VERB --config NAME[:ARG] --workdir DIR …`.

train    --config dpo --config.data.train=my.jsonl --workdir DIR
         trains; resumes what DIR holds
         --profile traces a few steps for TensorBoard or Perfetto
         --verbose names the shapes of batches in the program's own terms
sweep    --config dpo --config.data.train=my.jsonl --workdir DIR
         trains and evaluates each point of the file's sweep(), skips finished
         ones, prints a table and writes a report
         --sweep loss.beta=0.05,0.1 --sweep init_seed=0,1 names the points: all
         combinations; --sweep :loss=dpo,simpo, values of the config's argument
         --config.sweep.together=4 trains up to four at a time, in one program
eval     --workdir DIR --config.data.eval=held_out.jsonl
         evaluates a trained policy: held-out comparisons, reward, KL
sample   --workdir DIR --config.sample.prompts=my.jsonl
         draws completions of a trained policy
report   --workdir DIR
         writes the report of a sweep again
export   --workdir DIR
         writes the policy as a folder that transformers or PEFT loads
judge    --config.judge.samples=runs/a/completions.jsonl
         --config.judge.against=held_out.jsonl --config.judge.by=openai:MODEL
         --workdir DIR
         win rates of samples against the data's answers, or other samples: by
         a model behind an API, people (form:FILE) or a scorer (reward:DIR)
audit    --config dpo --config.data.train=my.jsonl
         shows what would be trained on, token by token, and counts what is
         wrong with it; exit code 1 above the limits of config.audit

launch   local --processes 2 -- train --config dpo --workdir DIR
         runs a command as several processes on this machine's CPU, as several
         machines would; lines of the second begin with [1]
         --restarts N starts all again when one died, or exits with 42
losses   prints every loss: formula, source, needs, dialects, defaults

--config names a file, configs/mine.py, or a config that comes with dpo_jax:
{names}. What follows a colon is its argument,
dpo:loss=ipo. --config.FIELD=VALUE sets a field: `dpo-jax train --help` lists
them all, with --config those of that config. eval, sample, export and audit
take the config of the run folder unless --config names another, and judge the
one of its name. --workdir may be left out where the config has one, and for
audit. --version says which dpo_jax this is.

train and sample run as several processes, one on each machine, all given the
same command and --coordinator HOST:PORT --processes N --process K: HOST is that
of process 0, K counts from 0. DPO_JAX_COORDINATOR, DPO_JAX_PROCESSES and
DPO_JAX_PROCESS say the same; srun's tasks and a TPU slice's workers need
neither.
"""

import logging
import os
import re
import sys
import traceback

import dpo_jax
from dpo_jax import host, launch, lookup, progress, verbs
from dpo_jax.config import load

_FLAGS = ("profile", "verbose")  # they take no value
_PROCESSES = ("coordinator", "processes", "process")
_OPTIONS = ("config", "sweep", "workdir", *_PROCESSES, *_FLAGS)


def _parse(argv):
  """--name=value or --name value -> (options, config overrides)."""
  options, overrides = {}, []
  words = iter(argv)
  for word in words:
    if not word.startswith("--"):
      raise ValueError(f"unexpected argument {word!r}")
    name, given, value = word[2:].partition("=")
    if not name.startswith("config."):
      lookup.lookup(_OPTIONS, name, "option")
    if name in _FLAGS:
      if given:
        raise ValueError(f"{word}: --{name} takes no value")
      overrides += ["log.profile=true"] if name == "profile" else []
      continue
    if not given:
      value = next(words, None)
      if value is None:
        raise ValueError(f"--{name} needs a value")
    if name.startswith("config."):
      overrides.append(f"{name.removeprefix('config.')}={value}")
    elif name == "sweep":
      options.setdefault(name, []).append(value)
    else:
      options[name] = value
  return options, overrides


def _help(words):
  """What is said of all verbs, or of the one that is asked about."""
  usage = __doc__.format(names=", ".join(load.shipped()))
  words = [word for word in words if word not in ("-h", "--help", "help")]
  if not words:
    return usage
  if words[0] == "launch":
    return re.search(r"^launch .*(?:\n .*)*", usage, re.MULTILINE)[0]
  lookup.lookup(verbs.VERBS, words[0], "verb")
  *_, closing, several = usage.strip().split("\n\n")
  own = re.search(rf"^{words[0]} .*(?:\n .*)*", usage, re.MULTILINE)[0]
  fields = verbs.fields(words[0], *_parse(words[1:]))
  return "\n\n".join(["", own, closing, several, *fields])[2:]


def _launch(words):
  """The exit code of a command that runs as several processes."""
  options, command = launch.options(words)
  lookup.lookup(verbs.VERBS, command[0], "verb")
  whole = [sys.executable, "-m", "dpo_jax", *command]
  return launch.local(whole, options["processes"], options["restarts"])


def main(argv=None):
  """Runs a verb; user mistakes end in one line on stderr and exit code 2."""
  argv = sys.argv[1:] if argv is None else argv
  code, progress.detailed = 0, "--verbose" in argv
  try:
    if argv[:1] == ["--version"]:
      print(f"dpo_jax {dpo_jax.__version__}")
    elif argv[:1] == ["launch"] and argv[1:] not in (["-h"], ["--help"]):
      code = _launch(argv[1:])
    elif not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
      print(_help(argv))
    else:
      code = verbs.run(argv[0], *_parse(argv[1:]))
    sys.stdout.flush()
    return code
  except (ValueError, FloatingPointError) as error:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1
  except BrokenPipeError:  # the reader went away: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except OSError as error:  # a full disk, or one that nobody may write to
    where = f"{error.filename}: " if error.filename else ""
    print(
      f"error: {where}{error.strerror or error}; is there room, and may you "
      "write there? --workdir names another folder",
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt as stopped:
    logging.disable()  # of what threads fail at that the exit cuts short
    said = "interrupted; the same command goes on from what is saved"
    print(said, file=sys.stderr)
    return getattr(stopped, "exit_code", 130)


def command():
  """`dpo-jax`: main, and a way out that waits for no other process."""
  try:
    code = main()
  except Exception:
    traceback.print_exc()
    code = 1
  host.leave(code)
  return code


if __name__ == "__main__":
  sys.exit(command())
