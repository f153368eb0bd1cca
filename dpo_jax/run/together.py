"""Several runs in one program: states, steps and folders, stacked.

The arrays of a stacked state have a first axis of runs; what is frozen has none
where all share it, so that the reference is computed once. `program` gives
one state and one step, `Recorders` one recorder: the loop sees a single run.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.parallel import run as run_lib


def stacked(trees):
  """One tree of arrays [points, …] of trees of arrays […]."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree, index):
  """Run `index` of a stacked tree."""
  return jax.tree.map(lambda x: x[index], tree)


def over_points(step, count, *, shared):
  """The step of `count` runs over one batch, from that of one.

  Args:
    shared: whether all have one frozen part; else it is stacked too.
  Returns: the same function of a stacked state and stacked hparams; metrics
    are a list, the dict of each run. What depends on the batch and on a
    shared frozen part alone, such as the reference's log-probs, is not stacked:
    vmap leaves it as it is.
  """

  def stacked_step(state, batch, hparams):
    def one(moving, frozen, hparams):
      state, metrics = step(moving.replace(frozen=frozen), batch, hparams)
      return state.replace(frozen={}), metrics

    every = jax.vmap(one, in_axes=(0, None if shared else 0, 0))
    moving, metrics = every(state.replace(frozen={}), state.frozen, hparams)
    metrics = [unstacked(metrics, index) for index in range(count)]
    return moving.replace(frozen=state.frozen), metrics

  return stacked_step


def stacked_shapes(tree, count):
  """`count` trees as one, abstract, each array sharded as in the given one."""

  def wider(x):
    spec = PartitionSpec(None, *x.sharding.spec)
    sharding = NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding)

  return jax.tree.map(wider, tree)


class Program(NamedTuple):
  """Several runs as one step.

  Attributes:
    step: (state, batch, hparams) -> (state, list of the metrics of each run);
      donates its state.
    state, hparams: stacked.
    parts: state -> iterator of the TrainState of each run.
  """

  step: Callable
  state: Any
  hparams: dict
  parts: Callable


def program(runs, states):
  """The Program of runs that differ in traced scalars and seeds alone.

  The list of their placed states is emptied, so that they are not kept beside
  the stacked one.
  """
  lead, count = runs[0], len(runs)
  own_frozen = run_lib.jitted(unstacked, states[0].frozen)
  own = run_lib.jitted(unstacked, states[0].replace(frozen={}))
  frozen = [state.frozen for state in states]
  shared = _same(frozen)
  moving = _placed([state.replace(frozen={}) for state in states])
  frozen = frozen[0] if shared else _placed(frozen)
  states.clear()

  def parts(state):
    moving, frozen = state.replace(frozen={}), state.frozen
    for index in range(count):
      mine = frozen if shared else own_frozen(frozen, index)
      yield own(moving, index).replace(frozen=mine)

  return Program(
    lead.stacked_step(count, shared),
    moving.replace(frozen=frozen),
    stacked([run.hparams for run in runs]),
    parts,
  )


def _same(trees):
  """Whether all hold the very same arrays."""
  return jax.tree.all(
    jax.tree.map(lambda first, *others: all(x is first for x in others), *trees)
  )


def _placed(trees):
  """Placed trees stacked, each array sharded as it was."""
  shapes = stacked_shapes(trees[0], len(trees))
  return run_lib.jitted(stacked, shapes)(trees)


class Recorders:
  """The recorders of several runs as one, see recorder.Recorder."""

  def __init__(self, recorders, parts):
    """Of a list of recorder.Recorder and the `parts` of a Program."""
    self._all, self._parts = recorders, parts

  @property
  def failed(self):
    """Whether none of the runs goes on."""
    return all(each.failed for each in self._all)

  def describe(self, state, start):
    """As of the first, whose data and model are those of all."""
    self._all[0].describe(state, start, count=len(self._all))

  def trace(self, start):
    """As of the first."""
    return self._all[0].trace(start)

  def step(self, number, metrics, stats):
    for each, own in zip(self._all, metrics, strict=True):
      each.step(number, own, stats)

  def pause(self, number, state, *, evaluates, saves, last):
    """As of each; what happens inside counts as training time of none."""
    with contextlib.ExitStack() as paused:
      for each in self._all:
        paused.enter_context(each.paused())
      for each, part in zip(self._all, self._parts(state), strict=True):
        each.at(number, part, evaluates=evaluates, saves=saves, last=last)

  def end(self, number, state, stop):
    """list of the Result of each."""
    ended = zip(self._all, self._parts(state), strict=True)
    return [each.end(number, part, stop) for each, part in ended]

  def close(self):
    for each in self._all:
      each.close()
