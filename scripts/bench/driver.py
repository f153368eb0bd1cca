"""The command: what to measure, where the results go, what is printed."""

import argparse
import json
import os
import pathlib
import re
import signal
import sys
import tempfile
import time

from dpo_jax import lookup
from scripts.bench import cases, client

_USAGE = """\
Benchmarks of dpo_jax and its peers, by turns on the same weights and batches.

  python scripts/bench.py              every case, over an hour on 2 cores
  python scripts/bench.py --quick      the headline case, with all peers
  python scripts/bench.py --cases gpt2 --systems ours,trl
  python scripts/bench.py --cases on-policy     reward models and RL
  python scripts/bench.py --device     accelerators; TRL too if it is there
  python scripts/bench.py --table      the table of the results there are

`bash scripts/bench.sh` makes the peers' virtual environments first and takes
the same options. --config.FIELD=VALUE sets a field of dpo_jax's config.
"""


def parser():
  """The options."""
  p = argparse.ArgumentParser(
    "bench",
    description=_USAGE,
    formatter_class=argparse.RawTextHelpFormatter,
    allow_abbrev=False,
  )
  what = p.add_mutually_exclusive_group()
  what.add_argument(
    "--quick", action="store_true", help="the headline, all peers"
  )
  p.add_argument("--cases", metavar="TEXT", help="cases with it in the name")
  what.add_argument("--device", action="store_true", help="accelerator set")
  what.add_argument("--table", action="store_true", help="print the results")
  p.add_argument("--smoke", action="store_true", help="micro shapes, 1 round")
  p.add_argument("--systems", metavar="A,B", help=", ".join(cases.SYSTEMS))
  p.add_argument("--rounds", type=_positive, help="repeats (3)")
  p.add_argument("--steps", type=_positive, help="of a round (1 or 2)")
  p.add_argument("--threads", type=_positive, default=2, help="of a worker (2)")
  p.add_argument(
    "--minutes", type=_positive, help="begin no case after so many"
  )
  p.add_argument("--out", type=pathlib.Path, help="file of the results")
  return p


def _positive(text):
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{text} is not above 0")
  return value


def parse(argv):
  """(options, config overrides); ends the process for what it cannot read."""
  p = parser()
  options, rest = p.parse_known_args(argv)
  overrides = []
  for word in rest:
    if not re.match(r"--config\.[\w.]+=", word):
      known = [o for a in p._actions for o in a.option_strings]
      p.error(f"{word}: no such option{lookup.nearest(word, known)}")
    overrides.append(word.removeprefix("--config."))
  if options.device and set((options.systems or "ours").split(",")) - {
    "ours",
    "trl",
  }:
    p.error("--device measures ours and trl alone")
  if options.cases and (options.quick or options.table):
    p.error("--cases goes with --device or alone")
  if options.smoke and (options.quick or options.cases or options.table):
    p.error("--smoke goes with --device or alone")
  if options.table and overrides:
    p.error("--config. has no effect with --table")
  return options, overrides


def chosen(options):
  """The cases to measure, with the systems that were asked for."""
  found = list(cases.CASES)
  if options.smoke:
    found = [cases.SMOKE, cases.SMOKE_ROLLOUTS]
  elif options.quick:
    found = list(cases.QUICK)
  elif options.cases:
    found = cases.choose(options.cases)
  if options.systems:
    wanted = options.systems.split(",")
    for name in wanted:
      lookup.lookup(cases.SYSTEMS, name, "--systems")
    found = [_with(case, wanted, options.smoke) for case in found]
    # Cases for one peer alone are the headline otherwise.
    peers = set(wanted) - {"ours", "matmul"} or {"ours"}
    found = [
      case
      for case in found
      if peers & set(case.systems) and ("ours" not in peers or not case.about)
    ]
    if not found:
      raise ValueError(f"--systems {options.systems}: not in these cases")
  if options.steps:
    found = [case._replace(steps=options.steps) for case in found]
  for case in found:
    for name in case.systems:
      client.python(cases.SYSTEMS[name])
  return found


def _with(case, wanted, any_case):
  """The case with these systems of its own, or of all where `any_case`.

  `ours` stays, since the needed FLOPs are its own, and the matmul, their rate.
  """
  known = cases.TASKS[case.task].modules if case.draws else cases.SYSTEMS
  allowed = known if any_case else case.systems
  needed = {"ours", "matmul"} | (set(wanted) & set(allowed))
  return case._replace(systems=tuple(n for n in cases.SYSTEMS if n in needed))


class Progress:
  """A line that passes on a terminal, elsewhere a line each ten seconds."""

  def __init__(self, total):
    """Args:
    total: pieces of work.
    """
    self._total, self._done = total, 0
    self._begin = self._shown = time.perf_counter()
    self._live = sys.stdout.isatty()

  def tick(self, text):
    """Another piece is done."""
    self._done += 1
    now = time.perf_counter()
    if not self._live and now - self._shown < 10:
      return
    self._shown = now
    spent = now - self._begin
    left = spent / self._done * (self._total - self._done)
    line = (
      f"{self._done}/{self._total}  {text}  {_clock(spent)}  ETA {_clock(left)}"
    )
    print(f"\r\x1b[K{line}" if self._live else line, end="", flush=True)
    if not self._live:
      print(flush=True)

  def say(self, text):
    """Lines that stay."""
    print(f"\r\x1b[K{text}" if self._live else text, flush=True)


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes}:{seconds:02}"


def cpus(threads):
  """The CPUs of the workers."""
  if not hasattr(os, "sched_getaffinity"):
    return set(range(threads))
  there = sorted(os.sched_getaffinity(0))
  if len(there) < threads:
    raise ValueError(f"--threads {threads}: there are {len(there)} cores")
  return set(there[:threads])


def path_of(machine):
  """Where the results of a machine are kept."""
  slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
  return client.ROOT / "scripts" / "results" / f"{slug}.json"


def read(path, machine):
  """The results there are."""
  if path.exists():
    return json.loads(path.read_text())
  return {"machine": machine, "cases": {}}


def write(path, results):
  """Replaces the results."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix(".new")
  new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
  new.replace(path)


def run_cases(options, overrides):
  """Measures cases on CPUs; the exit code."""
  from scripts.bench import rounds, summary

  count = options.rounds or (1 if options.smoke else 3)
  machine = f"{options.threads}-core CPU"
  path = options.out or path_of(machine)
  if options.smoke and options.out is None:
    path = None
  found, where = chosen(options), cpus(options.threads)
  progress = Progress(sum(len(c.systems) for c in found) * (1 + count))
  begin, fresh = time.perf_counter(), {"machine": machine, "cases": {}}
  with tempfile.TemporaryDirectory(prefix="bench-") as folder:
    for case in found:
      spent = (time.perf_counter() - begin) / 60
      if options.minutes and spent > options.minutes:
        progress.say(f"{case.name}: left out, --minutes are over")
        continue
      result = rounds.measure(
        case,
        pathlib.Path(folder),
        rounds=count,
        cpus=where,
        overrides=overrides,
        tick=lambda text, case=case: progress.tick(f"{case.name}  {text}"),
      )
      fresh["cases"][case.name] = result
      one = {**fresh, "cases": {case.name: result}}
      progress.say(summary.table(one).split("\n\n", 1)[1] + "\n")
      if path is not None:
        kept = read(path, machine)
        kept["cases"][case.name] = result
        write(path, kept)
  return report(fresh, path)


def report(results, path):
  """Prints goals and agreement; exit code 1 if losses differ."""
  from scripts.bench import summary

  lines, good = summary.agreement(results)
  print("\n".join([*summary.goals(results), *lines]))
  if path is not None:
    print(f"written to {os.path.relpath(path)}")
  return 0 if good else 1


def run_device(options, overrides):
  """Measures the accelerator set; the exit code.

  Each shape is written when it is done; what the file has of other shapes, and
  of the other system on the same data, stays.
  """
  from scripts.bench import device

  def say(text):
    print(text, flush=True)

  path, shown = None, {"shapes": {}}
  for machine, name, found in device.run(options, overrides, say):
    shown["machine"], shown["shapes"][name] = machine or "no device", found
    path = options.out
    if path is None and machine is not None and not options.smoke:
      path = path_of(machine)
    if path is None or "why" in found:  # what was measured before stays
      continue
    kept = {"machine": machine, "shapes": {}}
    if path.exists():
      kept = json.loads(path.read_text())
    if kept["machine"] != machine:
      raise ValueError(
        f"{path} is of {kept['machine']}, and this is {machine}: name another "
        "--out"
      )
    before = kept["shapes"].get(name, {})
    if all(before.get(k) == found.get(k) for k in ("tokens", "overrides")):
      found = {**before, **found}
    kept["shapes"][name] = shown["shapes"][name] = found
    write(path, kept)
  print(device.table(shown))
  if path is not None and path.exists():
    print(f"written to {os.path.relpath(path)}")
  return 0


def show(options):
  """Prints the table of the results there are; the exit code."""
  from scripts.bench import device, summary

  path = options.out or path_of(f"{options.threads}-core CPU")
  if not path.exists():
    raise ValueError(f"--table: {os.path.relpath(path)} is not there")
  results = json.loads(path.read_text())
  if "shapes" in results:
    print(device.table(results))
    return 0
  print(summary.table(results))
  print()
  return report(results, None)


def main(argv=None):
  """Runs the command; mistakes of the user end in a line and exit code 2."""
  options, overrides = parse(argv)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends workers too
  os.environ["JAX_PLATFORMS"] = "cpu"
  try:
    if options.table:
      return show(options)
    if options.device:
      return run_device(options, overrides)
    return run_cases(options, overrides)
  except (ValueError, client.Failed) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
