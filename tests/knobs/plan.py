"""What a config decides, in parts that can be compared; nothing is compiled.

A part is made by the code that a verb runs, up to where it would compute: the
jaxpr of a step without its dead code, the batches of the loader; those of
dry.py. A field that changes no part of a config has no effect in it.
"""

import re
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.interpreters import partial_eval

from dpo_jax import tree
from dpo_jax.algos import base
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build, critic
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import step as step_lib
from tests import worlds
from tests.knobs import drawn


class Plan(NamedTuple):
  """A config and what was made of it.

  Attributes:
    config: locked ConfigDict.
    cache: what was made once, by name.
    before: the Plan that this one is a change of, or None.
  """

  config: Any
  cache: dict
  before: Any = None

  def once(self, name, make):
    """What `make(self)` returned, or raised, the first time."""
    if name not in self.cache:
      try:
        self.cache[name] = make(self), None
      except ValueError as error:
        self.cache[name] = None, error
    made, error = self.cache[name]
    if error is not None:
      raise error
    return made


def _prepared(plan, name, prepare):
  """(what `prepare` makes of the config, matmul precision that it set)."""

  def make(plan):
    before = jax.config.jax_default_matmul_precision
    try:
      made = prepare(plan.config)
      return made, jax.config.jax_default_matmul_precision
    finally:
      jax.config.update("jax_default_matmul_precision", before)

  return plan.once(name, make)


def setup_of(plan):
  """(build.Setup, matmul precision)."""
  return _prepared(plan, "its setup", build.prepare_model)


def run_of(plan):
  """(build.Run, matmul precision)."""
  return _prepared(plan, "its run", build.prepare)


digest = drawn.digest


def traced(fn, *args):
  """(jaxpr as text, constants, paths of the arguments that it reads).

  Without what no result depends on.
  """
  closed = jax.make_jaxpr(fn)(*args)
  jaxpr, used = partial_eval.dce_jaxpr(
    closed.jaxpr, [True] * len(closed.jaxpr.outvars)
  )
  reads = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
  reads |= set(map(id, jaxpr.outvars))
  consts = [
    digest(x)
    for v, x in zip(jaxpr.constvars, closed.consts, strict=True)
    if id(v) in reads
  ]
  paths = [path for path, _ in tree.named(args)]
  read = [path for path, reads in zip(paths, used, strict=True) if reads]
  return re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr)), consts, read


def layout(plan):
  """How arrays lie on the devices."""
  setup, _ = setup_of(plan)
  return mesh_lib.sizes(setup.mesh), setup.mode


def model(plan):
  """The forward pass, and the parameters."""
  setup, precision = setup_of(plan)
  params, batch = (
    trained_lib.model_shapes(setup),
    worlds.batch(worlds.examples(8)),
  )

  def apply(params, batch):
    hidden, head = setup.model.apply(params, batch)
    return hidden, head.kernel, head.bias, head.softcap

  with jax.set_mesh(setup.mesh), jax.default_matmul_precision(precision):
    return traced(apply, params, batch), _about(params)


def _about(values):
  return [
    (path, x.shape, str(x.dtype), str(x.sharding.spec))
    for path, x in tree.named(values)
  ]


def _initial_state(plan):
  """Function () -> TrainState at step 0, to be traced."""
  run, _ = run_of(plan)
  setup = run.setup
  if setup.source.spec is not None:  # files are read, not traced
    kept = plan.once("its base", lambda _: trained_lib.initial(setup))
    setup = setup._replace(base=kept)

  def initial_state():
    with mock.patch.object(critic, "started", lambda *args: begun(*args)):
      return build.initial_state(run, trained_lib.initial(setup))

  def begun(setup, base, params):
    """As files of a reward model say, which are read and not traced."""
    read = plan.once("its critic", lambda _: _read_critic(setup))
    return {**params, "critic": read["critic"], "value": read["value"]}

  return initial_state


def _read_critic(setup):
  """What critic.started makes of zeros."""
  with jax.ensure_compile_time_eval():
    zeros = jax.tree.map(
      lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
      trained_lib.trained_shapes(setup),
    )
    return _STARTED(setup, None, zeros)


_STARTED = critic.started


def _state(plan):
  """The TrainState at step 0, abstract."""
  run, _ = run_of(plan)
  return trained_lib.sharded(run.setup, jax.eval_shape(_initial_state(plan)))


def data(plan):
  """Which examples come when, and as which arrays."""
  run, _ = run_of(plan)
  if run.feed.loader is None:
    return [run.total, drawn_of(plan)[0]]
  parts = [run.total, _batches(run.feed.loader)]
  if plan.config.data.eval is not None:
    parts.append(_batches(run.held_out.loader()[0]))
  return parts


def drawn_of(plan):
  """(what rollouts draw and learn from, the first batch of it)."""
  run, _ = run_of(plan)
  return plan.once("drawn", lambda _: drawn.of_run(plan.config, run))


def _batches(loader):
  made = []
  for number in (0, loader.steps - 1):
    batch, stats = loader.batch(number)
    names = sorted(batch)
    made.append((names, digest(*(batch[name] for name in names)), stats))
  return loader.shapes, loader.size, made


def step(plan):
  """The train step, with the values that it reads of the config."""
  run, precision = run_of(plan)
  setup, state = run.setup, _state(plan)
  call = run.step
  batch = run_lib.place_batch(_batch(plan), setup.mesh, setup.mode)
  args = state, batch, run.hparams
  with jax.default_matmul_precision(precision):
    if setup.mode == "pmap":
      found = traced(call, *args)
    else:
      moving = state.replace(frozen={})
      with jax.set_mesh(setup.mesh):
        found = traced(call.compiled, moving, state.frozen, *args[1:])
  return found, _values_read(run, found), _about(state)


def _batch(plan):
  """A batch, with log-probs of a cached reference where the step needs them."""
  run, _ = run_of(plan)
  if run.feed.loader is None:
    return drawn_of(plan)[1]
  batch, _ = run.feed.loader.batch(0)
  if not run.reference.cached:
    return batch
  shape = batch["target_index"].shape
  return {**batch, "ref_token_logps": np.zeros(shape, np.float32)}


def _features(plan):
  """Function (state, batch) -> (moving, fixed): what the loss reads."""
  algorithm = run_of(plan)[0].algorithm

  def features(state, batch):
    batch = algorithm.prepare(batch, state.frozen, state.extra)
    options = state.params, state.frozen, batch, {}, base.rng_of(0)
    return algorithm.features(*options)

  return features


def features(plan):
  """What the loss reads of policy, reference and batch."""
  _, precision = run_of(plan)
  with jax.default_matmul_precision(precision):
    return traced(_features(plan), _state(plan), _batch(plan))


def _read_by_loss(plan):
  """(moving, fixed), abstract."""
  return jax.eval_shape(_features(plan), _state(plan), _batch(plan))


def peaks(plan):
  """Names of the metrics of which a step logs the largest value."""
  run, _ = run_of(plan)
  extra = _state(plan).extra
  args = *_read_by_loss(plan), extra, run.hparams
  return sorted(jax.eval_shape(run.algorithm.combine, *args).peaks)


def gradient(plan):
  """The gradient of the loss for the log-probs, and the values it reads."""
  run, _ = run_of(plan)
  of_features = run.algorithm._replace(
    features=lambda moving, frozen, fixed, *_: (moving, fixed),
    prepare=lambda fixed, frozen, extra: fixed,
  )

  def gradient(moving, fixed, state, hparams):
    options = moving, state, fixed, hparams, 1, None
    return step_lib.gradients(of_features, lambda x: x, *options)[0]

  found = traced(gradient, *_read_by_loss(plan), _state(plan), run.hparams)
  return found, _values_read(run, found)


def _values_read(run, found):
  names = {path.rpartition("/")[2] for path in found[2]}
  return {k: float(v) for k, v in run.hparams.items() if k in names}


def loss_values(plan):
  """Values of config.loss that the gradient before the change reads."""
  _, read = (plan.before or plan).once("gradient", gradient)
  return _values(plan, read)


def rate(plan):
  """The learning rate, if the step before the change reads it."""
  _, read, _ = (plan.before or plan).once("step", step)
  return _values(plan, read)["learning_rate"]


def _values(plan, names):
  run, _ = run_of(plan)
  return {k: float(v) for k, v in run.hparams.items() if k in names}


def optimizer(plan):
  """The update of the trained parameters, and the schedule."""
  run, _ = run_of(plan)
  state = _state(plan)
  trained, _ = tree.split(state.params, run.optimizer.trains)

  def update(grads, opt_state, step):
    done = run.optimizer.tx.update(grads, opt_state, grads)
    return done, run.optimizer.factor(step)

  return traced(update, trained, state.opt_state, state.step)


def initial(plan):
  """The parameters at step 0, trained and frozen."""
  return traced(_initial_state(plan))
