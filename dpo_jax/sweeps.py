"""Runs at many points of a config, one folder each, in one process."""

import copy
import functools
import json

from etils import epath

from dpo_jax import assembly, evaluation, lookup, loop, weights
from dpo_jax.eval import rewards
from dpo_jax.train import settings


def point_name(overrides):
  """`beta=0.1,seed=1` of {"loss.beta": 0.1, "data.seed": 1}."""
  short = [key.rsplit(".", 1)[-1] for key in overrides]
  keys = short if len(set(short)) == len(short) else list(overrides)
  values = overrides.values()
  return ",".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))


def at(config, overrides):
  """A copy of a config with {"loss.beta": 0.1, …} set.

  Raises: ValueError for a field that is not there, or of another type.
  """
  config, fields = copy.deepcopy(config), settings.flatten(config.to_dict())
  for key, value in overrides.items():
    if key not in fields:
      raise ValueError(
        f"the sweep sets {key}, which is not a field of the config"
        f"{lookup.nearest(key, fields)}"
      )
    *parents, name = key.split(".")
    node = functools.reduce(lambda node, part: node[part], parents, config)
    try:
      node[name] = value
    except TypeError as error:
      raise ValueError(
        f"the sweep sets {key} = {value!r}, which must be of type "
        f"{node.get_type(name).__name__}"
      ) from error
  return config


def sweep(config, points, workdir):
  """Trains and evaluates every point; what is finished is skipped.

  Data, compiled functions and the reference's log-probs are shared by points
  that differ only in traced fields, such as β or the learning rate.

  Args:
    config: locked ConfigDict.
    points: list of overrides, {"loss.beta": 0.1}.
    workdir: gets a folder a point, `reference` (the policy all start from,
      where there are prompts to sample) and sweep.json.
  Returns: exit code: 0; that of the signal that stopped it; or 1 if a point's
    training failed because nothing was finite (the others are still made).
  Raises: ValueError if a folder holds a point of another config.
  """
  workdir, points = epath.Path(workdir), list(points)
  if not points:
    raise ValueError("the sweep has no points")
  configs = [_sharing(at(config, point), workdir) for point in points]
  for here in configs:
    assembly.check(here)
  names = [point_name(point) for point in points]
  if len(set(names)) < len(names):
    raise ValueError(f"the sweep names a point twice: {sorted(names)}")
  samples = config.sample.prompts is not None
  _describe(config, points, names, workdir, "reference" if samples else None)
  run, failed = None, []
  if samples:
    print("── reference", flush=True)
    run = _reference(_sharing(config, workdir), workdir / "reference")
  for name, here in zip(names, configs, strict=True):
    print(f"── {name}", flush=True)
    run = assembly.prepare_point(here, run)
    try:
      code = _point(run, workdir / name)
    except FloatingPointError as error:
      print(f"{name}: {error}", flush=True)
      failed.append(name)
      continue
    if code:
      return code
  if failed:
    print(f"failed: {', '.join(failed)}; the other points are done")
  return 1 if failed else 0


def _initial(setup):
  """What all points start from, kept: a large model takes a while to load."""
  return setup.once("initial", lambda: weights.initial(setup))


def _reference(config, folder):
  """Evaluates the policy that all points start from; returns its Run."""
  run = assembly.prepare(config)
  ref = _initial(run.setup)
  made = evaluation.made_of(0, run.loader.fingerprint, ref)
  if evaluation.done(config, folder, made):
    print("done before, skipped")
  else:
    evaluation.evaluate(run.setup, ref, ref, folder, made)
  return run


def _point(run, folder):
  """Trains and evaluates a point, unless it is done; returns its exit code."""
  config = run.setup.config
  ref = _initial(run.setup)
  made = evaluation.made_of(run.total, run.loader.fingerprint, ref)
  if evaluation.done(config, folder, made):
    print("done before, skipped")
    return 0
  result = loop.fit(config, folder, run)
  held_out = config.data.eval is not None
  if not result.exit_code and (held_out or config.sample.prompts is not None):
    policy = weights.policy(run.setup, ref, result.state.params)
    evaluation.evaluate(run.setup, policy, ref, folder, made)
  return result.exit_code


def _sharing(config, workdir):
  """The config with one store of reference log-probs for all points."""
  if config.ref != "cached" or config.ref_store is not None:
    return config
  return at(config, {"ref_store": str(workdir / "ref_logps")})


def _describe(config, points, names, workdir, reference):
  workdir.mkdir(parents=True, exist_ok=True)
  notes = []
  if reference is not None and config.sample.labelled is not None:
    scorers = rewards.load_all(config.sample.scorers)
    notes = rewards.check(scorers, config.sample.labelled)
    print("\n".join(notes))
  about = {
    "title": f"{config.loss.name} over "
    + ", ".join(dict.fromkeys(key for point in points for key in point)),
    "points": [
      {"name": name, "overrides": point, "folder": name}
      for name, point in zip(names, points, strict=True)
    ],
    "reference": reference,
    "notes": notes,
  }
  (workdir / "sweep.json").write_text(json.dumps(about, indent=2) + "\n")
