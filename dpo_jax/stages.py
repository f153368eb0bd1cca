"""Several verbs in a row, as a config of algo = "stages" lists them.

Imports of what needs jax are inside, as those of verbs.
"""

import json
import os
import subprocess
import sys
import threading
import time

from etils import epath

from dpo_jax import preflight, store
from dpo_jax.config import load, points


def run(config, workdir, source, verb_of):
  """Runs verbs on other configs of the same file; the first failure ends it.

  Args:
    config: of the whole; `source` is its load.Source.
    verb_of: (verb, options, overrides) -> exit code, as verbs.run.
  """
  if workdir != config.workdir:
    raise ValueError(
      f"--workdir {workdir}: the stages have folders of their own; name the "
      f"root by the config's argument, root={workdir}"
    )
  rest = "".join(f",{name}={value}" for name, value in config.arguments)
  steps = []
  for verb, name, *axes in config.stages:
    spec = f"{source.module.__file__}:stage={name}{rest}"
    steps.append((verb, name, load.load(spec, (), axes)))
  configs = [step.config for _, _, step in steps]
  for one in configs:  # what is wrong with the last is said before the first
    preflight.config(one, ())
  far = preflight.far(configs)
  if "plan" in config:  # which takes no network
    print(_plan(steps, config.plan), flush=True)
  preflight.kept(*far)
  if "compared" in config:  # what a report looks for, also of a part
    text = json.dumps(config.compared.to_dict(), indent=2) + "\n"
    store.write(epath.Path(workdir) / "compared.json", text.encode())
  for beside in _parts(steps):
    if len(beside) > 1 and _cores_alone():
      code = _together([(name, step) for _, name, step in beside])
      if code:
        return code
      continue
    for verb, name, step in beside:
      print(f"━━ {verb} {name}", flush=True)
      verb = "train" if verb == "together" else verb
      sweep = {"sweep": list(step.axes)} if step.axes else {}
      code = verb_of(verb, {"config": f"{step.path}:{step.arg}", **sweep}, [])
      if code:
        return code
  if "compared" in config:
    return verb_of("report", {"workdir": workdir}, [])
  return 0


def _parts(steps):
  """Steps in turn, in lists: those of "together" side by side, others alone."""
  parts = []
  for step in steps:
    if parts and step[0] == parts[-1][-1][0] == "together":
      parts[-1].append(step)
    else:
      parts.append([step])
  return parts


def _cores_alone():
  """Whether processes can share the devices: an accelerator is of one."""
  import jax

  return jax.default_backend() == "cpu"


def _together(stages):
  """Runs stages at the same time, a process each, and waits for all of them.

  Each writes what it says to log.txt in its folder; its headlines stand here,
  too. A signal is passed on, so that each saves.

  Args:
    stages: list of (name, load.Source).
  Returns: the exit code of a stop, or the first that is not 0, or 0.
  """
  from dpo_jax.train import health

  print(
    f"━━ {len(stages)} at once: {', '.join(n for n, _ in stages)}", flush=True
  )
  with health.stop_on_signal() as stop:
    children = [_child(step) for _, step in stages]
    threads = [
      threading.Thread(target=_follow, args=(child, name, step.config.workdir))
      for child, (name, step) in zip(children, stages, strict=True)
    ]
    for thread in threads:
      thread.start()
    told = False
    while any(child.poll() is None for child in children):
      time.sleep(0.1)
      if stop and not told:
        told = True
        for child in children:
          child.send_signal(stop.signal)
    for thread in threads:
      thread.join()
  failed = [child.returncode for child in children if child.returncode]
  return stop.exit_code if stop else next(iter(failed), 0)


def _child(step):
  """The process of a stage; the terminal's signals do not reach it."""
  command = ("-m", "dpo_jax", "train", "--config", f"{step.path}:{step.arg}")
  return subprocess.Popen(
    [sys.executable, *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    encoding="utf-8",
    errors="replace",
    env={**os.environ, "PYTHONUNBUFFERED": "1"},
    start_new_session=True,
  )


def _follow(child, name, folder):
  """Writes what a process says to its log, and its headlines here."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path, last = folder / "log.txt", ""
  with open(path, "a") as log:
    for line in child.stdout:
      log.write(line)
      log.flush()
      last = line.strip() or last
      if line.startswith("━━"):
        print(f"{name}: {line.strip()}", flush=True)
  if child.wait():
    print(f"{name}: exit code {child.returncode}, {last} ({path})", flush=True)


def _plan(steps, options):
  """The table of what stages will take: (verb, name, load.Source) of each."""
  from dpo_jax import plan
  from dpo_jax.plan import table

  stages = [
    plan.Stage(
      *(verb, name, step.config),
      points=len(points.of(step)) if verb == "sweep" else 1,
    )
    for verb, name, step in steps
  ]
  return table.text(plan.rows(stages, options), options)


def tokenizer(config, workdir):
  """Trains a tokenizer on the texts of a source, unless it is there."""
  from dpo_jax.data.read import sources
  from dpo_jax.data.tokens import bpe

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
  store.write(about, config.to_json().encode())
  print(f"{size} tokens from {len(texts)} texts in {workdir}")
  return 0
