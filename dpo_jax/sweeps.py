"""Runs at many points of a config, one folder each, in one process."""

import contextlib
import functools
import json

import jax
from etils import epath

from dpo_jax import loop, store
from dpo_jax.algos import base, terms
from dpo_jax.config import load, saved
from dpo_jax.eval import evaluation, rewards
from dpo_jax.run import build, recorder, together, trained
from dpo_jax.train import checkpoint


def sweep(config, overrides, workdir, *, at=None):
  """Trains and evaluates every point; what is finished is skipped.

  Data, compiled functions and the reference's log-probs are shared by points
  that differ only in traced fields, such as β or the learning rate. Up to
  config.sweep.together of them are trained in one program, init_seed too being
  what may differ; each leaves the same folder as when it is trained alone.

  Args:
    config: locked ConfigDict.
    overrides: list of the points, {"loss.beta": 0.1}; or where `at` is that of
      a load.Source, {"arg": "loss=simpo", "loss.beta": 2.0}.
    workdir: gets a folder a point, `reference` (the policy all start from,
      where there are prompts to sample) and sweep.json.
    at: point -> its config; None sets fields of `config`.
  Returns: exit code: 0; that of the signal that stopped it; or 1 if a point's
    training failed because nothing was finite (the others are still made).
  Raises: ValueError if a folder holds a point of another config.
  """
  workdir, overrides = epath.Path(workdir), list(overrides)
  if not overrides:
    raise ValueError("the sweep has no points")
  at = at or functools.partial(load.at, config)
  configs = [_sharing(at(point), workdir) for point in overrides]
  for here in configs:
    build.check(here)
  grouped = groups(configs, config.sweep.together)
  names = [load.point_name(point) for point in overrides]
  if len(set(names)) < len(names):
    raise ValueError(f"the sweep names a point twice: {sorted(names)}")
  samples = config.sample.prompts is not None
  _describe(config, configs, overrides, names, workdir)
  before = run = None
  failed = []
  if samples:
    print("── reference", flush=True)
    before = _sharing(config, workdir)
    run = _reference(before, workdir / "reference")
  for group in grouped:
    first = configs[group[0]]
    before, run = first, _kept(prepare_point(first, before, run))
    runs = beside([configs[index] for index in group], run)
    folders = [workdir / names[index] for index in group]
    for part in _parts(runs, folders, config.sweep.together):
      code, more = _train(*part)
      failed += more
      if code:
        return code
  if failed:
    print(f"failed: {', '.join(failed)}; the other points are done")
  return 1 if failed else 0


def _reference(config, folder):
  """Evaluates the policy that all points start from; returns its Run."""
  run = _kept(build.prepare(config))
  setup, ref, made = run.setup, run.setup.base, _made(run, step=0)
  if evaluation.done(setup.asked, folder, made):
    print("done before, skipped")
  else:
    start = setup.trained.init(ref, jax.random.key(setup.source.seed))
    evaluation.evaluate(run, start, ref, folder, made)
  return run


def prepare_point(config, before, run):
  """The Run of one point of a sweep.

  Where it differs from the point before it (its config and Run, or None) in
  traced fields only (β, label smoothing, learning rate), data and compiled
  functions are shared.
  """
  if run is None or _untraced(config) != _untraced(before):
    return build.prepare(config)
  return build.sharing(config, run)


def beside(configs, run):
  """The Runs of the points of a group, made from that of the first.

  They share data and compiled functions, and what they start from unless
  init_seed gives each its own.
  """
  if len(configs) > 1 and not run.feed.ahead:
    raise ValueError(
      f"sweep.together = {configs[0].sweep.together}: the batches of algo = "
      f"{configs[0].algo!r} depend on the policy, so that no two points share "
      "them; set it to 1"
    )
  run = _kept(run)
  runs = [build.sharing(config, run) for config in configs]
  seeds = {config.init_seed for config in configs}
  if len(seeds) == 1 or run.setup.source.spec is not None:
    return runs
  return [_kept(r._replace(setup=r.setup._replace(base=None))) for r in runs]


def _kept(run):
  """The Run with its base loaded: a large model takes a while."""
  base = trained.initial(run.setup)
  return run._replace(setup=run.setup._replace(base=base))


def _untraced(config):
  """The fields of a config that are compiled in, flat."""
  flat = saved.flatten(config.to_dict())
  numeric = base.numeric_fields(config.loss)
  traced = {f"loss.{name}" for name in numeric} | {"optim.learning_rate"}
  order = terms.names(config.loss)  # which term's metrics are reported
  return {**flat, **dict.fromkeys(traced), "loss order": order}


def _compiled(config):
  """The fields in which points that are stacked must agree, flat."""
  fields = _untraced(config)
  # One store of log-probs serves one reference.
  own_reference = config.init_from is None and config.ref == "cached"
  return fields if own_reference else {**fields, "init_seed": None}


def groups(configs, together):
  """Indices of the points that may be trained in one program, group by group.

  They differ in traced fields and init_seed alone; with `together` = 1, each is
  a group of its own.

  Raises: ValueError if no two points may be trained together.
  """
  if together == 1:
    return [[index] for index in range(len(configs))]
  if configs[0].log.wandb is not None:
    raise ValueError(
      f"log.wandb = {configs[0].log.wandb!r} follows one run at a time: set "
      "sweep.together = 1, or log.tensorboard in its place"
    )
  fields, alike = [_compiled(config) for config in configs], {}
  for index, here in enumerate(fields):
    key = json.dumps(here, sort_keys=True, default=str)
    alike.setdefault(key, []).append(index)
  if len(alike) < len(configs):
    return list(alike.values())
  why = "there is one point"
  if len(configs) > 1:
    differ = [k for k, v in fields[0].items() if fields[1].get(k) != v]
    why = f"the points differ in {', '.join(differ)}, which is compiled in"
    if differ == ["init_seed"]:
      why = "each init_seed has a reference of its own, and ref = 'cached'"
  raise ValueError(
    f"sweep.together = {together} has no effect: {why}; set it to 1, or sweep "
    "over the loss's numbers, optim.learning_rate or init_seed"
  )


def _parts(runs, folders, together):
  """Yields (runs, folders) to train at once: what is not done, at one step."""
  steps = {}
  for run, folder in zip(runs, folders, strict=True):
    if evaluation.done(run.setup.asked, folder, _made(run, run.total)):
      print(f"── {folder.name}\ndone before, skipped", flush=True)
    else:
      step = checkpoint.latest_step(folder)
      steps.setdefault(step, []).append((run, folder))
  for waiting in steps.values():
    for first in range(0, len(waiting), together):
      yield zip(*waiting[first : first + together], strict=True)


def _made(run, step):
  """How the policy of a point is made, see evaluation.made_of."""
  about = run.feed.fingerprint, run.setup.base, run.identity
  return evaluation.made_of(step, *about)


def _train(runs, folders):
  """Trains points at once, then evaluates each.

  Returns: (exit code, names of the points that failed).
  """
  failed = []
  print(f"── {' + '.join(folder.name for folder in folders)}", flush=True)
  results = fit_together(runs, folders)
  for run, folder, result in zip(runs, folders, results, strict=True):
    if result.failure is not None:
      print(f"{folder.name}: {result.failure}", flush=True)
      failed.append(folder.name)
    elif not result.exit_code and evaluation.asked_for(run):
      made = _made(run, run.total)
      base = run.setup.base
      evaluation.evaluate(run, result.state.params, base, folder, made)
  return max(result.exit_code for result in results), failed


def fit_together(runs, workdirs):
  """Trains runs that differ in traced scalars alone in one program.

  Args:
    runs: list of Run, of `beside`.
    workdirs: a run folder for each, as `loop.fit` leaves it; all are at the
      same step.
  Returns: list of recorder.Result. A run whose updates are not finite fails
    alone.
  Raises: ValueError as `loop.fit`, and if the folders are at different steps.
  """
  with loop.held(workdirs) as stop, contextlib.ExitStack() as opened:
    if len(runs) == 1:
      return [loop.fit_run(*runs, *workdirs, stop)]
    restored = [
      loop.restore(run, workdir, stop, opened)
      for run, workdir in zip(runs, workdirs, strict=True)
    ]
    runs, states, checkpoints = map(list, zip(*restored, strict=True))
    del restored
    steps = [int(state.step) for state in states]
    if len(set(steps)) > 1:
      at = zip(workdirs, steps, strict=True)
      raise ValueError(
        "runs that train together must be at the same step, but "
        + ", ".join(f"{workdir} is at {step}" for workdir, step in at)
        + "; train them one by one: --config.sweep.together=1"
      )
    start = steps[0]
    loop.within(start, runs[0].total, workdirs[0])
    records = [
      recorder.Recorder(*each, start, name=f"{epath.Path(each[1]).name}: ")
      for each in zip(runs, workdirs, checkpoints, strict=True)
    ]
    step, state, hparams, parts = together.program(runs, states)
    record = together.Recorders(records, parts)
    args = runs[0], step, hparams, state, record, start, stop
    results = loop.train(*args)
    for run, result in zip(runs, results, strict=True):
      loop.finish(run, result)
    return results


def _sharing(config, workdir):
  """The config with one store of reference log-probs for all points."""
  if config.ref != "cached" or config.ref_store is not None:
    return config
  return load.at(config, {"ref_store": str(workdir / "ref_logps")})


def _describe(config, configs, overrides, names, workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  notes, sampled = [], config.sample.prompts is not None
  if sampled and config.sample.labelled is not None:
    scorers = rewards.load_all(config.sample.scorers)
    notes = rewards.check(scorers, config.sample.labelled)
    print("\n".join(notes))
  swept = [key for point in overrides for key in load.swept(point)]
  about = {
    "title": f"{' and '.join(dict.fromkeys(c.loss.name for c in configs))} "
    f"over {', '.join(dict.fromkeys(swept))}",
    "points": [
      {"name": name, "overrides": point, "folder": name}
      for name, point in zip(names, overrides, strict=True)
    ],
    "reference": "reference" if sampled else None,
    "notes": notes,
  }
  text = json.dumps(about, indent=2) + "\n"
  store.write(workdir / "sweep.json", text.encode())
