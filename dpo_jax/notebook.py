"""Thin functions for a notebook: a config or arrays in, plain values out."""

import functools

import jax
import jax.numpy as jnp

from dpo_jax import algos, lookup
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build as build_lib
from dpo_jax.run import trained
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


def build(config):
  """(apply, params) of a config, on one device.

  apply(params, batch) is a pure function to (hidden [R, T, D], Head). params
  are what a run starts from: random ones, or those of init_from.
  """
  mesh = mesh_lib.of_devices(jax.devices()[:1])
  model, tokenizer = trained.build_model(config)
  setup = build_lib.Setup(config, mesh, "jit", model, tokenizer, {})
  return model.apply, trained.initial(setup)


def batches(config):
  """Yields the batches of a config's training data, as dicts of arrays."""
  model, tokenizer = trained.build_model(config)
  mesh = mesh_lib.make(config.mesh)
  loader, _ = build_lib.build_loader(
    config,
    tokenizer,
    model.config,
    config.data.train,
    training=True,
    row_multiple=mesh_lib.row_parallelism(mesh) * config.train.accumulation,
  )
  for number in range(build_lib.total_steps(config, loader.size)):
    batch, _ = loader.batch(number)
    yield jax.tree.map(jnp.asarray, batch)


def _algorithm(config, apply):
  if config.lora is not None:
    raise ValueError(
      "these functions train all parameters: set config.lora = None, or use "
      "dj.fit, which trains adapters"
    )
  return lookup.lookup(algos.ALGOS, config.algo, "algo")(config, apply)


def objective(config, apply):
  """The objective of a config, which prepares its batch itself.

  Returns: pure function (params, frozen, batch, hparams) -> algos.base.Terms.
  """
  algorithm = _algorithm(config, apply)

  def terms(params, frozen, batch, hparams):
    extra = algorithm.extra(frozen.get("ref", params))
    batch = algorithm.prepare(batch, frozen, extra)
    return algorithm.objective(params, frozen, batch, hparams, extra)

  return terms


def train_step(config, apply, params):
  """The train step of a config, not yet compiled, and its first state.

  Args:
    config: reads algo, loss, ref, optim, train and mesh.mode.
    apply, params: of `build`. With ref = "frozen" they are the reference too.
  Returns: (step, state); step is a pure function (state, batch, hparams) ->
    (state, metrics); hparams holds "learning_rate" and the loss's numbers.
  """
  total = config.train.steps
  if total is None:
    raise ValueError("set train.steps: the schedule of a train step needs it")
  optimizer = optim.make(config.optim, total)
  algorithm = _algorithm(config, apply)
  step = step_lib.make(
    algorithm,
    optimizer,
    accumulation=config.train.accumulation,
    axis_name=run_lib.axis_name(config.mesh.mode),
  )
  frozen = {"ref": params} if config.ref == "frozen" else {}
  extra = algorithm.extra(params)
  return step, state_lib.create(params, optimizer, frozen, extra)


def parallelize(config, step, state):
  """The step over the devices of `config.mesh`.

  Args:
    config: reads mesh.
    step, state: of `train_step`.
  Returns: (step, state, place): the compiled step, which donates its state; the
    state on the mesh, a copy; and the function that puts a batch there.
  """
  mesh = mesh_lib.make(config.mesh)
  mode = lookup.lookup(run_lib.MODES, config.mesh.mode, "mesh.mode")
  spec = trained.partition_spec(mode)
  state = run_lib.place(state, mesh_lib.shardings(mesh, state, spec))
  place = functools.partial(run_lib.place_batch, mesh=mesh, mode=mode)
  return run_lib.parallelize(step, mesh, mode, state), state, place
