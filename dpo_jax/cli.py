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

import os
import sys

from dpo_jax import lookup, verbs


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


def main(argv=None):
  """Runs a verb; user mistakes end in one line on stderr and exit code 2."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
    print(__doc__)
    return 0
  try:
    return verbs.run(argv[0], *_parse(argv[1:]))
  except (ValueError, FloatingPointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1
  except BrokenPipeError:  # the reader went away: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except KeyboardInterrupt as stopped:
    print("interrupted; the same command goes on from here", file=sys.stderr)
    return getattr(stopped, "exit_code", 130)


if __name__ == "__main__":
  sys.exit(main())
