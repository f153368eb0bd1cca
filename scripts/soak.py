#!/usr/bin/env python3
"""Kills, damages and starves runs at random; checks that nothing is lost.

    python scripts/soak.py --kills 50

Of each part a run to its end is the standard. The same run is then started,
killed at a random moment (SIGKILL, SIGTERM; at the start, between steps, in a
save), its newest checkpoint is damaged now and then, or its disk is full, and
it is started again, until it has been killed so often; what it then ends with
must be the same bits, of the same examples. Seeds are shown; a part that fails
leaves its folder, and the exit code is 1.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EVERY = 3  # steps between checkpoints
KEEP = 4
_SMALL = 2**14  # bytes a file may have where the disk is "full"
_PATIENCE = 300.0  # seconds in which a life must show its first step


class Part(NamedTuple):
  """A kind of run. spec: of a config; share: of all kills."""

  spec: str
  fields: tuple
  share: float


ALL = (
  f"checkpoint.every={EVERY}",
  f"checkpoint.keep={KEEP}",
  "log.every=1",
  "data.eval=None",
)
PARTS = {
  "one process": Part(
    "dpo.py:smoke,ref=ema",
    (
      *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulation=2"),
      *("data.train=toy:100", "ref_every=5"),
    ),
    share=1.0,
  ),
  "on policy": Part(
    "ppo.py:smoke",
    (
      "mesh.data=4",
      "mesh.tensor=2",
      "rollout.kl_target=1.0",
      "rollout.kl_horizon=100",
    ),
    share=0.2,
  ),
}


# ── A life: what is started and killed ───────────────────────────────────────


def work(name, folder, steps):
  """Trains a part in this process; notes the examples of every batch."""
  import jax

  jax.config.update("jax_default_matmul_precision", "highest")
  from dpo_jax import loop
  from dpo_jax.config import load
  from dpo_jax.run import build

  part = PARTS[name]
  fields = (*ALL, *part.fields, f"train.steps={steps}")
  config = load.load_config(f"{ROOT}/configs/{part.spec}", fields)
  run = build.prepare(config)
  folder.mkdir(parents=True, exist_ok=True)
  # One a life, or the full disk would be that of the notes.
  notes = folder / f"examples.{os.getpid()}.jsonl"

  def batch(number, state, batch_of=run.feed.batch):
    arrays, stats = batch_of(number, state)
    ids = sorted(
      int(i)
      for shard in arrays["example_id"].addressable_shards
      for i in shard.data.ravel()
    )
    with notes.open("a") as file:
      file.write(json.dumps([number, ids]) + "\n")
    return arrays, stats

  run = run._replace(feed=run.feed._replace(batch=batch))
  return loop.fit(config, folder, run).exit_code


class Life:
  """A process of a part, from its start until it is gone."""

  def __init__(self, name, folder, steps, full=False):
    self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    flags = "--xla_force_host_platform_device_count=8"
    self._process = subprocess.Popen(
      [sys.executable, __file__, "--work", name, str(folder), str(steps)],
      stdout=self._output,
      stderr=subprocess.STDOUT,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
      },
      preexec_fn=_full_disk if full else None,
    )
    self._notes = folder / f"examples.{self._process.pid}.jsonl"

  def output(self):
    self._output.seek(0)
    return self._output.read()

  def wait(self, batches):
    """Until it has so many batches more than it began with, or is gone."""
    deadline = time.monotonic() + _PATIENCE
    while self.alive() and self._batches() < batches:
      if time.monotonic() > deadline:
        raise SystemExit(f"no step in {_PATIENCE:.0f} s:\n{self.output()}")
      time.sleep(0.005)

  def _batches(self):
    path = self._notes
    return path.read_bytes().count(b"\n") if path.exists() else 0

  def alive(self):
    return self._process.poll() is None

  def end(self, number=None):
    """Sends a signal; the exit code, once the process is gone."""
    if number is not None and self.alive():
      self._process.send_signal(number)
    return self._process.wait(timeout=_PATIENCE)


def _full_disk():
  """No file grows beyond a few kB: what a full disk does to a checkpoint."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL, _SMALL))


# ── What happens to it ───────────────────────────────────────────────────────


def harm(folder, spoilt, rng):
  """Damages the newest checkpoint, if an older one is whole.

  Args:
    folder: of the run.
    spoilt: steps that were damaged before.
    rng: random.Random.
  Returns: the kind of damage, or None.
  """
  saved = sorted(
    int(path.name)
    for path in (folder / "checkpoints").glob("*")
    if path.name.isdigit()
  )
  whole = [step for step in saved if step not in spoilt]
  if len(whole) < 2 or saved[-1] in spoilt:
    return None
  newest = folder / "checkpoints" / str(saved[-1])
  paths = sorted(path for path in newest.rglob("*") if path.is_file())
  path = rng.choice(paths)
  kind = rng.choice(("flipped bit", "cut", "deleted"))
  content = path.read_bytes()
  if kind == "deleted":
    path.unlink()
  elif kind == "cut":
    path.write_bytes(content[: rng.randrange(len(content) or 1)])
  elif content:
    at = rng.randrange(len(content))
    changed = content[at] ^ (1 << rng.randrange(8))
    path.write_bytes(content[:at] + bytes([changed]) + content[at + 1 :])
  spoilt.add(saved[-1])
  return kind


def one_kill(name, folder, steps, counts, spoilt, rng):
  """Starts a run, kills it at a random moment, and damages what it left."""
  full = rng.random() < 0.15 and (folder / "checkpoints").exists()
  life = Life(name, folder, steps, full)
  if rng.random() < 0.1:  # before the first step
    time.sleep(rng.uniform(0.0, 3.0))
  else:  # some batches on, and somewhere within a step or a save
    life.wait(rng.randint(1, 8))
    time.sleep(rng.uniform(0.0, 0.1))
  number = rng.choice((signal.SIGKILL, signal.SIGTERM))
  ended = not life.alive()
  code = life.end(number)
  said = life.output()
  kept = "could not be saved" in said  # 1: by a full disk, which it says
  if code not in (-signal.SIGKILL, -signal.SIGTERM, 42, 0, 1 if kept else 0):
    raise SystemExit(f"{name}: exit code {code}:\n{said}")
  counts["restarts"] += 1
  counts[signal.Signals(number).name] += not ended
  counts["full disk"] += full
  counts["older checkpoint"] += "trying an older one" in said
  if rng.random() < 0.4:
    kind = harm(folder, spoilt, rng)
    if kind:
      counts[kind] += 1


# ── What must hold in the end ────────────────────────────────────────────────


def examples(folder):
  """{batch: ids of its examples}, and how many batches were made again."""
  batches, again = {}, 0
  for path in sorted(folder.glob("examples.*.jsonl")):
    for line in path.read_text().splitlines():
      try:
        number, ids = json.loads(line)
      except ValueError:
        continue  # cut by a kill: the batch was not used
      if batches.get(number, ids) != ids:
        raise SystemExit(
          f"{path}: batch {number} was {batches[number]}, now {ids}"
        )
      again += number in batches
      batches[number] = ids
  return batches, again


def checksums(folder, steps):
  """Of every array of the last checkpoint; None if it is not there."""
  path = folder / "checkpoints" / str(steps) / "meta" / "metadata"
  return json.loads(path.read_text())["checksums"] if path.exists() else None


def soak(name, kills, seed, folder):
  """Does one part; {row of the table: value}."""
  began, rng = time.monotonic(), random.Random(f"{seed} {name}")
  # A life makes up to eight batches, and most of the last ones again.
  steps, spoilt = 8 * (kills + 2), set()  # whole iterations of PPO
  names = ("restarts", "SIGKILL", "SIGTERM", "full disk", "flipped bit", "cut")
  counts = dict.fromkeys((*names, "deleted", "older checkpoint"), 0)
  whole, cut = folder / "whole", folder / "cut"
  life = Life(name, whole, steps)
  if life.end():
    raise SystemExit(f"{name}: {life.output()}")
  while (done := counts["SIGKILL"] + counts["SIGTERM"]) < kills:
    if checksums(cut, steps):
      raise SystemExit(f"{name}: it was done after {done} of {kills} kills")
    one_kill(name, cut, steps, counts, spoilt, rng)
    print(f"{name}: {done} of {kills} kills", flush=True)
  life = Life(name, cut, steps)
  if life.end():
    raise SystemExit(f"{name}: {life.output()}")
  (want, _), (got, again) = examples(whole), examples(cut)
  wrong = [n for n in range(steps) if got.get(n) != want.get(n)]
  same = checksums(cut, steps) == checksums(whole, steps)
  return {
    **counts,
    "steps": steps,
    "batches made again": again,
    "batches lost or changed": len(wrong),
    "params equal": same,
    "seconds": round(time.monotonic() - began),
  }


def table(results):
  """Lines of a Markdown table, a column a part."""
  rows = list(next(iter(results.values())))
  yield "| | " + " | ".join(results) + " |"
  yield "|---|" + "---|" * len(results)
  for row in rows:
    values = (str(result[row]) for result in results.values())
    yield f"| {row} | " + " | ".join(values) + " |"


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kills", type=int, default=50, help="of all parts")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--part", choices=PARTS, help="default: all of them")
  parser.add_argument("--out", type=pathlib.Path, help="of a JSON file")
  parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    name, folder, steps = args.work
    return work(name, pathlib.Path(folder), int(steps))
  print(f"seed {args.seed}", flush=True)
  results, failed = {}, False
  for name in [args.part] if args.part else PARTS:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    kills = max(1, round(args.kills * PARTS[name].share))
    try:
      result = results[name] = soak(name, kills, args.seed, folder)
    except SystemExit as error:
      raise SystemExit(f"{error}\nseed {args.seed}, {folder}") from error
    bad = result["batches lost or changed"] or not result["params equal"]
    failed |= bool(bad)
    if not bad:
      shutil.rmtree(folder)
    print(
      f"{name}: {result['restarts']} restarts, "
      f"{result['batches lost or changed']} batches lost or changed, params "
      f"{'equal' if result['params equal'] else f'DIFFER, see {folder}'}",
      flush=True,
    )
  print("\n".join(table(results)))
  if args.out:
    content = {"seed": args.seed, "parts": results}
    args.out.write_text(json.dumps(content, indent=2) + "\n")
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
