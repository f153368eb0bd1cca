"""Parts of a plan that verbs write: what a verb does, but for the computing.

Steps cost nothing, the sampler draws what its arguments say, parameters are
zeros; the loop, the loaders, the stores and the writers are the real ones.
"""

import concurrent.futures
import contextlib
import functools
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import types
import zlib
from unittest import mock

import jax
import numpy as np
import openai

from dpo_jax import export, loop, sweeps, tree, verbs
from dpo_jax.config import load
from dpo_jax.data.batch import loader
from dpo_jax.eval import completions, evaluation, frontier
from dpo_jax.eval.judge import asking
from dpo_jax.run import base as plain
from dpo_jax.run import build, forward, gain, held_out
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import checkpoint, guard, log
from dpo_jax.train import state as state_lib
from tests.knobs import drawn
from tests.knobs import plan as plan_lib

NOISE = 0.05  # rewards at step 0 of the steps that cost nothing


@contextlib.contextmanager
def _folder():
  """An empty folder, in which relative paths of a config end up too."""
  with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
    yield pathlib.Path(name)


def _files(folder, leave_out=()):
  """{path: digest}; `leave_out` names files that only repeat the config."""
  return {
    str(path.relative_to(folder)): plan_lib.digest(path.read_bytes())
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name not in leave_out
  }


def _patched(stack, *changes):
  for owner, name, value in changes:
    stack.enter_context(mock.patch.object(owner, name, value))


def command(plan):
  """The folder that a command without --workdir gets."""
  seen = []

  def run(config, workdir, source):
    seen.append(workdir)

  verb = verbs.Verb(run, saved=False)
  with contextlib.ExitStack() as stack:
    source = load.Source(plan.config, None, "c.py", "", (), ())
    _patched(stack, (load, "load", lambda *_: source))
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(mock.patch.dict(verbs.VERBS, {"train": verb}))
    verbs.run("train", {"config": "c.py"}, [])
  return seen


def training(plan):
  """What `train` logs, evaluates, saves and stores, at which steps."""
  build.check(plan.config)
  peaks = (plan.before or plan).once("peaks", plan_lib.peaks)
  events = []

  class Checkpointer:
    lost = 0

    def __init__(self, workdir, *, keep):
      events.append(("keep", keep))

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def restore(self, state, identity):
      return None

    def steps(self):
      return []

    def save(self, state, identity, *, wait):
      events.append(("save", state.step))
      return True

  def evaluate(setup, measured, state):
    events.append(("evaluate", state.step))
    return {"loss": 0.0}

  def measure(setup, params, frozen, loader, count, unit):
    events.append(("gain", loader.fingerprint, count, unit))
    return gain.of_scores([[0.0], [1.0]], unit)

  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(_folder())
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(mock.patch.dict(sys.modules, _trackers(events)))
    _patched(
      stack,
      (trained_lib, "initial", lambda setup: {}),
      (build, "initial_state", lambda *_: _state(0)),
      (forward, "token_logps", _zero_logps),
      (held_out, "evaluate", evaluate),
      (gain, "measure", measure),
      (checkpoint, "Checkpointer", Checkpointer),
      (log, "peak_flops", lambda: (1.0, "")),
      (jax.profiler, "start_trace", lambda _: events.append("traced from")),
      (jax.profiler, "stop_trace", lambda: events.append("traced to")),
    )
    run, _ = plan_lib.run_of(plan._replace(cache={}))
    run = run._replace(step=_free_step(run, peaks))
    if run.feed.loader is None:  # what is drawn is a part of its own
      stats = loader.Stats(1, 1, 1, 1, 1, 1.0)
      feed = run.feed._replace(batch=lambda number, state: ({}, stats))
      run = run._replace(feed=feed)
    try:
      loop.fit(plan.config, folder / "run", run)
    except (ValueError, FloatingPointError) as error:
      events.append(("stopped", type(error).__name__))
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    events += [(row["kind"], row["step"]) for row in rows]
    files = _files(folder, ("metrics.jsonl", "config.json", "entry.json"))
    # The address of stored log-probs repeats what they are made of.
    return events, [re.sub("/[0-9a-f]{24}/", "/KEY/", path) for path in files]


def _state(number):
  skipped = guard.create(None)
  return state_lib.TrainState(number, {}, {}, {}, {}, skipped)


def _free_step(run, peaks):
  """A step of a run that costs nothing and fails ever more.

  Args:
    peaks: metrics that are the largest of something.
  """
  bounds = None
  if run.algorithm.first is not None:
    bounds = run.algorithm.first(run.hparams, NOISE)
  loss = 0.0 if bounds is None else bounds[1]

  def step(state, batch, hparams):
    skipped = dict.fromkeys(guard.METRICS, state.step + 1.0)
    metrics = {"loss": loss, **skipped, **dict.fromkeys(peaks, NOISE)}
    return _state(state.step + 1), metrics

  return step


def _zero_logps(setup, params, loader, numbers):
  for number in numbers:
    for index in loader.indices(number):
      yield int(index), np.zeros(loader.counts[index], np.float32)


def _trackers(events):
  """Modules that write down what they are asked to track."""

  def track(*values, **_):
    events.append(("tracked", str(values[0])))

  def init(*, project, **_):
    events.append(("project", project))
    return types.SimpleNamespace(log=track, finish=lambda: None)

  def writer(folder, purge_step):
    events.append(("tensorboard", purge_step))
    return types.SimpleNamespace(add_scalar=track, close=lambda: None)

  return {
    "wandb": types.SimpleNamespace(init=init),
    "tensorboardX": types.SimpleNamespace(SummaryWriter=writer),
  }


def sampling(plan):
  """What `sample` asks of the sampler, and the files that it writes."""
  setup, _ = plan_lib.setup_of(plan)
  calls = []
  with _folder() as folder, contextlib.redirect_stdout(io.StringIO()):
    programs = setup.programs._replace(sample=drawn.sampler(calls))
    setup = setup._replace(programs=programs)
    completions.write(setup, None, {}, folder)
    return calls, _files(folder)


def measuring(plan):
  """Of which checkpoints of a run `eval` measures samples."""
  steps = []
  with _folder() as folder, contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    _patched(
      stack,
      (checkpoint, "steps", lambda workdir: [2, 4, 6]),
      (trained_lib, "restored", lambda *_, step: step),
      (frontier, "measure", lambda setup, policy, ref: ({}, [])),
      (evaluation, "made_with", dict),
    )
    setup, _ = plan_lib.setup_of(plan)
    trained = setup.trained._replace(model=lambda base, params: params)
    if setup.sample.prompts is None:
      return steps
    measured = plain.Measured(setup._replace(trained=trained), None, None)
    made = {"step": 6}
    result = evaluation.evaluate(measured, None, None, folder, made)
    return [point["step"] for point in result.get("checkpoints", [])]


def sweeping(plan):
  """What `sweep` trains at once, and writes beside the points' folders."""
  made, at_once = [{}, {"optim.learning_rate": 0.5}], []

  def train(runs, folders):
    at_once.append(len(folders))
    return 0, []

  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(_folder())
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    _patched(
      stack,
      (sweeps, "_reference", lambda *_: None),
      (sweeps, "_parts", lambda *parts: [parts[:2]]),
      (sweeps, "_train", train),
      (sweeps, "prepare_point", lambda *_: None),
      (sweeps, "_kept", lambda run: run),
      (sweeps, "beside", lambda *_: None),
    )
    sweeps.sweep(plan.config, made, folder)
    return at_once, _files(folder)


def auditing(plan):
  """What `audit` prints, and its exit code."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    code = verbs.audit(plan.config, None, None)
  return code, out.getvalue()


def exporting(plan):
  """The files that `export` writes, and where it uploads them."""
  pushed = []

  def zeros(setup, *_):
    return _zeros(trained_lib.model_shapes(setup))

  def trained(setup, *_):
    return _zeros(trained_lib.trained_shapes(setup))

  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(_folder())
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    _patched(
      stack,
      (checkpoint, "identity", lambda _: {"step": 1, "checksums": {}}),
      (trained_lib, "initial", zeros),
      (trained_lib, "merged", zeros),
      (trained_lib, "restored", trained),
      (gain, "read", lambda *_: (1.0, 0.0)),
      (export, "push", lambda folder, *to: pushed.append(to)),
    )
    verbs.export(plan.config, folder, None)
    return pushed, _files(folder, ("dpo_jax.json",))


def _zeros(shapes):
  return tree.map_named(lambda _, x: np.zeros(x.shape, x.dtype), shapes)


def judging(plan):
  """What `judge` asks of an endpoint and how, and the files that it writes."""
  verbs._judged(plan.config, "judge")
  events = []

  def client(**settings):
    events.append(settings)
    create = functools.partial(_judged, events)
    completions = types.SimpleNamespace(create=create)
    return types.SimpleNamespace(
      chat=types.SimpleNamespace(completions=completions)
    )

  def workers(count):
    events.append(count)
    return _WORKERS(1)  # so that they ask in order

  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(_folder())
    out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    keys = {"OPENAI_API_KEY": "a-key-of-ours", "OTHER_KEY": "another-of-ours"}
    stack.enter_context(mock.patch.dict(os.environ, keys))
    _patched(
      stack,
      (openai, "OpenAI", client),
      (asking, "_FIRST", 0.0),
      (asking.concurrent.futures, "ThreadPoolExecutor", workers),
    )
    verbs.judge(plan.config, folder / "out", None)
    result = json.loads((folder / "out/judge.json").read_text())
    del result["config"]  # what it is proven to have an effect beside
    said = out.getvalue().replace(str(folder), "FOLDER")
    return events, said, result, _files(folder, ("judge.json",))


_WORKERS = concurrent.futures.ThreadPoolExecutor


def _judged(events, *, messages, **settings):
  """A response that prefers one text or the other; one question gets none."""
  text = re.sub("[0-9a-f]{16}", "", messages[0]["content"])
  events.append((text, settings))
  shown = re.compile(r"\[ [AB] begins\]\n(.*?)\n\[ [AB] ends", re.DOTALL)
  first, second = (zlib.crc32(x.encode()) for x in shown.findall(text))
  if len(events) == 4 or events[-2] == events[-1]:
    raise openai.APITimeoutError(request=None)
  verdict = re.search(r'with nothing but "(.*): A"', text)[1]
  said = f"It is so.\n{verdict}: {'A' if first > second else 'B'}"
  message = types.SimpleNamespace(content=said)
  usage = types.SimpleNamespace(prompt_tokens=10**6, completion_tokens=10**5)
  choices = [types.SimpleNamespace(message=message)]
  return types.SimpleNamespace(choices=choices, usage=usage)
