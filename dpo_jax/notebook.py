"""Thin functions for a notebook: a config or arrays in, plain values out."""

import functools

import jax
import jax.numpy as jnp

from dpo_jax import algos
from dpo_jax.algos import base
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build as build_lib
from dpo_jax.run import trained
from dpo_jax.train import state as state_lib


def _setup(config):
  """The Setup of a config on one device."""
  mesh = mesh_lib.of_devices(jax.devices()[:1])
  return build_lib.setup_on(config, mesh, "jit")


def build(config):
  """(apply, params) of a config, on one device.

  apply(params, batch) is a pure function to (hidden [R, T, D], Head). params
  are what a run starts from: random ones, or those of init_from. With
  config.lora they are the base, on which the adapter adds nothing yet.
  """
  setup = _setup(config)
  return setup.model.apply, trained.initial(setup)


def batches(config):
  """Yields the batches of a config's training data, as dicts of arrays."""
  run = build_lib.prepare(config)
  for number in range(run.total):
    batch, _ = run.feed.loader.batch(number)
    yield jax.tree.map(jnp.asarray, batch)


def objective(config, apply):
  """The objective of a config, which prepares its batch itself.

  Args:
    config: locked ConfigDict.
    apply: of `build`.
  Returns: pure function (params, frozen, batch, hparams) -> algos.base.Terms.
    params are what is trained, and frozen is {"ref": params of `build`}, or
    {"base": …} with config.lora.
  """
  policy = _setup(config).trained.policy
  algorithm = base.on(algos.make(config, apply), policy)

  def terms(params, frozen, batch, hparams):
    reference = frozen.get("ref", params)
    extra = algorithm.extra(reference)
    batch = algorithm.prepare(batch, frozen, extra)
    return algorithm.objective(params, frozen, batch, hparams, extra)

  return terms


def train_step(config, apply, params):
  """The train step of a config, not yet compiled, and its first state.

  Args:
    config: reads algo, loss, ref, lora, optim, train and mesh.mode.
    apply, params: of `build`. They are the reference too, or the base of an
      adapter.
  Returns: (step, state); step is a pure function (state, batch, hparams) ->
    (state, metrics); hparams holds "learning_rate" and the loss's numbers.
  """
  setup = _setup(config)
  algorithm = base.on(algos.make(config, apply), setup.trained.policy)
  step, optimizer = build_lib.step_of(config, algorithm)
  start = setup.trained.init(params, jax.random.key(setup.source.seed))
  frozen, extra = setup.trained.frozen(params), algorithm.extra(start)
  return step, state_lib.create(start, optimizer, frozen, extra)


def parallelize(config, step, state):
  """The step over the devices of `config.mesh`.

  Args:
    config: reads mesh.
    step, state: of `train_step`.
  Returns: (step, state, place): the compiled step, which donates its state; the
    state on the mesh, a copy; and the function that puts a batch there.
  """
  mesh, mode = build_lib.mesh_of(config)
  spec = trained.partition_spec(mode)
  state = run_lib.place(state, mesh_lib.shardings(mesh, state, spec))
  place = functools.partial(run_lib.place_batch, mesh=mesh, mode=mode)
  return run_lib.parallelize(step, mesh, mode, state), state, place
