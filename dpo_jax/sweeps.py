"""Runs at many points of a config, one folder each, in one process."""

import json

from etils import epath

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.eval import evaluation, rewards
from dpo_jax.run import build, trained
from dpo_jax.run import together as together_lib
from dpo_jax.train import checkpoint


def sweep(config, overrides, workdir):
  """Trains and evaluates every point; what is finished is skipped.

  Data, compiled functions and the reference's log-probs are shared by points
  that differ only in traced fields, such as β or the learning rate. Up to
  config.sweep.together of them are trained in one program, init_seed too being
  what may differ; each leaves the same folder as when it is trained alone.

  Args:
    config: locked ConfigDict.
    overrides: list of the points, {"loss.beta": 0.1}.
    workdir: gets a folder a point, `reference` (the policy all start from,
      where there are prompts to sample) and sweep.json.
  Returns: exit code: 0; that of the signal that stopped it; or 1 if a point's
    training failed because nothing was finite (the others are still made).
  Raises: ValueError if a folder holds a point of another config.
  """
  workdir, overrides = epath.Path(workdir), list(overrides)
  if not overrides:
    raise ValueError("the sweep has no points")
  configs = [_sharing(load.at(config, point), workdir) for point in overrides]
  for here in configs:
    build.check(here)
  groups = together_lib.groups(configs, config.sweep.together)
  names = [load.point_name(point) for point in overrides]
  if len(set(names)) < len(names):
    raise ValueError(f"the sweep names a point twice: {sorted(names)}")
  samples = config.sample.prompts is not None
  _describe(config, overrides, names, workdir, "reference" if samples else None)
  run, failed = None, []
  if samples:
    print("── reference", flush=True)
    run = _reference(_sharing(config, workdir), workdir / "reference")
  for group in groups:
    run = together_lib.prepare_point(configs[group[0]], run)
    runs = together_lib.beside([configs[index] for index in group], run)
    folders = [workdir / names[index] for index in group]
    for part in _parts(runs, folders, config.sweep.together):
      code, more = _train(*part)
      failed += more
      if code:
        return code
  if failed:
    print(f"failed: {', '.join(failed)}; the other points are done")
  return 1 if failed else 0


def _initial(setup):
  """What all points start from, kept: a large model takes a while to load."""
  return setup.once("initial", lambda: trained.initial(setup))


def _reference(config, folder):
  """Evaluates the policy that all points start from; returns its Run."""
  run = build.prepare(config)
  ref = _initial(run.setup)
  made = evaluation.made_of(0, run.loader.fingerprint, ref)
  if evaluation.done(config, folder, made):
    print("done before, skipped")
  else:
    evaluation.evaluate(run.setup, ref, ref, folder, made)
  return run


def _parts(runs, folders, together):
  """Yields (runs, folders) to train at once: what is not done, at one step."""
  steps = {}
  for run, folder in zip(runs, folders, strict=True):
    made = _made(run)
    if evaluation.done(run.setup.config, folder, made):
      print(f"── {folder.name}\ndone before, skipped", flush=True)
    else:
      step = checkpoint.latest_step(folder)
      steps.setdefault(step, []).append((run, folder))
  for there in steps.values():
    for first in range(0, len(there), together):
      yield zip(*there[first : first + together], strict=True)


def _made(run):
  """How the policy of a point is made, see evaluation.made_of."""
  ref = _initial(run.setup)
  return evaluation.made_of(run.total, run.loader.fingerprint, ref)


def _train(runs, folders):
  """Trains points at once, then evaluates each.

  Returns: (exit code, names of the points that failed).
  """
  failed = []
  print(f"── {' + '.join(folder.name for folder in folders)}", flush=True)
  results = loop.fit_together(runs, folders)
  for run, folder, result in zip(runs, folders, results, strict=True):
    if result.failure is not None:
      print(f"{folder.name}: {result.failure}", flush=True)
      failed.append(folder.name)
    elif not result.exit_code:
      _evaluate(run, folder, result.state)
  return max(result.exit_code for result in results), failed


def _evaluate(run, folder, state):
  """Evaluates a trained point, if there is something to evaluate it on."""
  config, ref = run.setup.config, _initial(run.setup)
  if config.data.eval is not None or config.sample.prompts is not None:
    policy = trained.policy(run.setup, ref, state.params)
    evaluation.evaluate(run.setup, policy, ref, folder, _made(run))


def program(config, overrides, workdir):
  """Points in one compiled step, ready to be called: to measure it, say.

  Args: as for `sweep`, of points that can be trained in one program; workdir
    gets the reference's log-probs, if they are cached.
  Returns: (Run of the first point, together.Program); build.place_batch places
    a batch of the Run's loader.
  Raises: ValueError if they cannot.
  """
  workdir = epath.Path(workdir)
  configs = [_sharing(load.at(config, point), workdir) for point in overrides]
  for here in configs:
    build.check(here)
  if len(together_lib.groups(configs, len(configs))) > 1:
    raise ValueError(f"these points are not of one program: {overrides}")
  run = build.prepare(configs[0])
  return loop.program(together_lib.beside(configs, run), workdir)


def _sharing(config, workdir):
  """The config with one store of reference log-probs for all points."""
  if config.ref != "cached" or config.ref_store is not None:
    return config
  return load.at(config, {"ref_store": str(workdir / "ref_logps")})


def _describe(config, overrides, names, workdir, reference):
  workdir.mkdir(parents=True, exist_ok=True)
  notes = []
  if reference is not None and config.sample.labelled is not None:
    scorers = rewards.load_all(config.sample.scorers)
    notes = rewards.check(scorers, config.sample.labelled)
    print("\n".join(notes))
  about = {
    "title": f"{config.loss.name} over "
    + ", ".join(dict.fromkeys(key for point in overrides for key in point)),
    "points": [
      {"name": name, "overrides": point, "folder": name}
      for name, point in zip(names, overrides, strict=True)
    ],
    "reference": reference,
    "notes": notes,
  }
  (workdir / "sweep.json").write_text(json.dumps(about, indent=2) + "\n")
