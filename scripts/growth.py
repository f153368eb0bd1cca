#!/usr/bin/env python3
"""Time and memory as one thing grows, as a Markdown table.

  python scripts/growth.py data                     1,000 … 1,000,000 of them
  python scripts/growth.py data --sizes 1000 10000  others
  python scripts/growth.py step                     length, rows, layers …

`data`: of a generated .jsonl, how fast it is tokenised by one core and by all,
and what a later start costs, from opening the file to the first batch, when the
tokens are in the cache. A million take 0.2 GB in --folder, their tokens 0.4 GB,
and four minutes on two cores. `step`: of one train step, see growth_step.py.
Every number is of a process of its own.
"""

import argparse
import functools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import growth_step

ROOT = pathlib.Path(__file__).parent.parent


def table(rows):
  """A Markdown table of dicts with the same keys."""
  lines = ["| " + " | ".join(rows[0]) + " |"]
  lines.append("|" + "---:|" * len(rows[0]))
  lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
  return "\n".join(lines)


def in_process(measure, *args):
  """What a function of MEASURED returns in a process of its own."""
  done = subprocess.run(
    [sys.executable, __file__, "measured", measure, *map(str, args)],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    cwd=ROOT,
  )
  return json.loads(done.stdout.splitlines()[-1])


class AnonymousPeak(threading.Thread):
  """Samples the memory that this process cannot give back to a file, in MB."""

  def __init__(self):
    super().__init__(daemon=True)
    self.first = self.peak = self.now()
    self.start()

  @staticmethod
  def now():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
      if line.startswith("RssAnon:"):
        return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status names no RssAnon")

  def run(self):
    while True:
      self.peak = max(self.peak, self.now())
      time.sleep(0.01)


def write_comparisons(path, count):
  """Lines of generated text: prompts of ~40 letters, completions of ~30."""
  rng = random.Random(0)
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = [
    "".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)
  ]

  def text(fewest, most):
    return " ".join(rng.choices(words, k=rng.randint(fewest, most)))

  with path.open("w") as file:
    for number in range(count):
      row = {
        "prompt": f"{number} {text(3, 9)}",
        "chosen": f" {text(3, 6)}",
        "rejected": f" {text(3, 6)}",
      }
      file.write(json.dumps(row) + "\n")


def start(path, folder, cores):
  """{"seconds", "load", …} from opening a data set to its first batch.

  Args:
    path: of the data.
    folder: of the token cache.
    cores: that may be used; one also means one process.
  """
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
  from dpo_jax.config import load
  from dpo_jax.data.tokens import corpus
  from dpo_jax.run import build, feed, feeds

  overrides = (
    f"data.train={path} data.token_cache={folder} data.batch_size=64 "
    "data.max_prompt_length=256 data.max_completion_length=256 "
    "train.steps=5000"  # the planner looks at 4,096 batches
  )
  config = load.load_config(
    str(ROOT / "configs/dpo.py:smoke"), overrides.split()
  )
  setup = build.prepare_model(config)
  took, load = {}, corpus.load

  def timed(*args, **options):
    begin = time.perf_counter()
    found = load(*args, **options)
    took["load"] = time.perf_counter() - begin
    return found

  corpus.load = timed
  memory, begin = AnonymousPeak(), time.perf_counter()
  loader, _ = feed.load(
    *(setup, build.algorithm_of(config, setup)),
    *(config.data.train, "data.train", 1),
    steps=functools.partial(feeds.total_steps, config),
  )
  loader.batch(0)
  return {
    "seconds": time.perf_counter() - begin,
    **took,
    "before": memory.first,
    "peak": memory.peak,
    "fingerprint": loader.fingerprint,
  }


def data(args):
  """Start-up against the number of comparisons."""
  cores, rows = len(os.sched_getaffinity(0)), []
  for size in args.sizes:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="growth-", dir=args.folder))
    try:
      path, cache = folder / "data.jsonl", folder / "tokens"
      write_comparisons(path, size)
      alone = in_process("start", path, folder / "alone", 1)
      shutil.rmtree(folder / "alone")
      cold = in_process("start", path, cache, cores)
      warm = in_process("start", path, cache, cores)
      found = {x["fingerprint"] for x in (alone, cold, warm)}
      assert len(found) == 1, found
      tokens = sum(x.stat().st_size for x in cache.rglob("*.bin"))
      rows.append(
        {
          "comparisons": f"{size:,}",
          "file, MB": f"{path.stat().st_size / 1e6:.1f}",
          "cache, MB": f"{tokens / 1e6:.1f}",
          "cold, one core, records/s": f"{size / alone['load']:,.0f}",
          f"cold, {cores} cores, records/s": f"{size / cold['load']:,.0f}",
          "warm, s": f"{warm['seconds']:.2f}",
          "of it tokens, s": f"{warm['load']:.2f}",
          "anonymous memory before, MB": f"{warm['before']:.0f}",
          "at most, warm, MB": f"{warm['peak']:.0f}",
          "at most, cold, MB": f"{cold['peak']:.0f}",
        }
      )
      print(table(rows[-1:]), flush=True)
    finally:
      shutil.rmtree(folder)
  print("\n" + table(rows))


def step(args):
  """Time and memory of a train step against its sizes."""
  for what in args.of:
    rows = []
    for size, changed in growth_step.points(what):
      found = in_process("step", *changed.values())
      rows.append(growth_step.row(what, size, found))
      print(f"{what} {size}: {found['how']}", flush=True)
    print("\n" + table(rows) + "\n", flush=True)


MEASURED = {"start": start, "step": growth_step.measure}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  verbs = parser.add_subparsers(required=True)
  one = verbs.add_parser("data", help=data.__doc__)
  one.add_argument(
    "--sizes", type=int, nargs="+", default=[10**k for k in range(3, 7)]
  )
  one.add_argument("--folder", default=tempfile.gettempdir())
  one.set_defaults(run=data)
  one = verbs.add_parser("step", help=step.__doc__)
  one.add_argument(
    "--of", nargs="+", choices=growth_step.GROW, default=list(growth_step.GROW)
  )
  one.set_defaults(run=step)
  one = verbs.add_parser("measured", help="one number, in this process")
  one.add_argument("name", choices=MEASURED)
  one.add_argument("args", nargs="*")
  one.set_defaults(
    run=lambda args: print(json.dumps(MEASURED[args.name](*args.args)))
  )
  args = parser.parse_args()
  args.run(args)


if __name__ == "__main__":
  main()
