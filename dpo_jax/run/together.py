"""Points of a sweep: what they share, and several of them in one program."""

import collections
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.algos import base
from dpo_jax.algos import terms as loss_parts
from dpo_jax.config import saved
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build as build_lib
from dpo_jax.run import checks, stacked, trained


def prepare_point(config, run):
  """The Run of one point of a sweep.

  Args:
    config: of this point.
    run: the point before it, or None. Where the two differ in traced fields
      only (β, label smoothing, learning rate), data and compiled functions are
      shared.
  """
  if run is None or _untraced(config) != _untraced(run.setup.config):
    return build_lib.prepare(config)
  checks.values(config)
  return _sharing(config, run, run.setup.cache)


def _sharing(config, run, cache):
  """A Run with the data of another, and this cache."""
  setup = run.setup._replace(config=config, cache=cache)
  data = {"data_fingerprint": run.loader.fingerprint}
  return run._replace(
    setup=setup,
    algorithm=build_lib.trained_algorithm(setup),
    hparams=build_lib.hyper_params(config),
    identity=config.to_dict() | data,
  )


def _untraced(config):
  """The fields of a config that are compiled in, flat."""
  flat = saved.flatten(config.to_dict())
  numeric = base.numeric_fields(config.loss)
  traced = {f"loss.{name}" for name in numeric} | {"optim.learning_rate"}
  out = {k: v for k, v in flat.items() if k not in traced}
  # Of a mixture the heaviest term's metrics are reported.
  order = [part.name for part in loss_parts.of(config.loss)]
  return {**out, **dict.fromkeys(traced), "loss order": order}


def _compiled(config):
  """The fields in which points that are stacked must agree, flat."""
  fields = _untraced(config)
  # One store of log-probs serves one reference.
  own_reference = config.init_from is None and config.ref == "cached"
  return fields if own_reference else {**fields, "init_seed": None}


def groups(configs, together):
  """Indices of the points that may be trained in one program, group by group.

  They differ in traced fields and init_seed alone.

  Args:
    configs: of all points.
    together: config.sweep.together; with 1, each is a group of its own.
  Raises: ValueError if no two points may be trained together.
  """
  if together == 1:
    return [[index] for index in range(len(configs))]
  if configs[0].log.wandb is not None:
    raise ValueError(
      f"log.wandb = {configs[0].log.wandb!r} follows one run at a time: set "
      "sweep.together = 1, or log.tensorboard in its place"
    )
  fields, found = [_compiled(config) for config in configs], {}
  for index, here in enumerate(fields):
    key = json.dumps(here, sort_keys=True, default=str)
    found.setdefault(key, []).append(index)
  if len(found) < len(configs):
    return list(found.values())
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


def beside(configs, run):
  """The Runs of the points of a group.

  Args:
    configs: of the points.
    run: Run of the first.
  Returns: list of Run, which share data and compiled functions, and what they
    start from unless init_seed gives each its own.
  """
  setup = run.setup
  seeds = {config.init_seed for config in configs}
  if len(seeds) == 1 or setup.config.init_from is not None:
    setup.once("initial", lambda: trained.initial(setup))
    return [_sharing(config, run, setup.cache) for config in configs]
  shared = {k: v for k, v in setup.cache.items() if k != "initial"}
  runs = []
  for config in configs:
    checks.values(config)
    here = setup._replace(config=config, cache=shared)
    # What is built later goes to the first map, where all find it.
    cache = collections.ChainMap(shared, {"initial": trained.initial(here)})
    runs.append(_sharing(config, run, cache))
  return runs


class Program(NamedTuple):
  """One or several runs as one compiled step.

  Attributes:
    step: (state, batch, hparams) -> (state, list of the metrics of each run);
      donates its state.
    state, hparams: the first state, and the traced scalars; of several runs
      they are stacked.
    parts: state -> iterator of the TrainState of each run.
  """

  step: Callable
  state: Any
  hparams: dict
  parts: Callable


def program(runs, states):
  """The Program of runs of one group.

  Args:
    runs: list of Run.
    states: their placed TrainStates; emptied, so that they are not kept beside
      the stacked one.
  """
  if len(runs) > 1:
    return _stacked(runs, states)
  step = build_lib.train_step(runs[0], states[0])

  def alone(state, batch, hparams):
    state, metrics = step(state, batch, hparams)
    return state, [metrics]

  return Program(
    alone, states.pop(), runs[0].hparams, lambda state: iter([state])
  )


def _stacked(runs, states):
  lead, count = runs[0], len(runs)
  setup, shardings = lead.setup, jax.tree.map(lambda x: x.sharding, states[0])
  frozen = [state.frozen for state in states]
  shared = _same(frozen)
  moving = _stack([s.replace(frozen={}) for s in states], setup.mesh)
  frozen = frozen[0] if shared else _stack(frozen, setup.mesh)
  state = moving.replace(frozen=frozen)
  states.clear()

  def build():
    step = stacked.over_points(build_lib.step_body(lead), count, shared=shared)
    return run_lib.parallelize(step, setup.mesh, setup.mode, state)

  unstack = run_lib.jitted(stacked.unstack, shardings.replace(frozen={}))
  unstack_frozen = run_lib.jitted(stacked.unstack, shardings.frozen)

  def parts(state):
    moving, frozen = state.replace(frozen={}), state.frozen
    for index in range(count):
      own = frozen if shared else unstack_frozen(frozen, index)
      yield unstack(moving, index).replace(frozen=own)

  name = f"step of {count}, reference {'shared' if shared else 'of each'}"
  hparams = stacked.stack([run.hparams for run in runs])
  return Program(setup.once(name, build), state, hparams, parts)


def _same(trees):
  """Whether all hold the very same arrays."""
  first, *others = (jax.tree.leaves(tree) for tree in trees)
  return all(
    a is b for other in others for a, b in zip(first, other, strict=True)
  )


def _stack(trees, mesh):
  """Placed trees as one, each array sharded as it was."""
  shardings = jax.tree.map(
    lambda x: NamedSharding(mesh, PartitionSpec(None, *x.sharding.spec)),
    trees[0],
  )
  return run_lib.jitted(lambda *trees: stacked.stack(trees), shardings)(*trees)
