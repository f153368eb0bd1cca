"""A config made into functions and data, once: what a run is before it starts.

    prepare_model   a model on its devices, and what is trained of it
    prepare         and the data, the algorithm, the optimiser: a Run

After this only what saves the config reads it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from dpo_jax import algos, lookup
from dpo_jax.algos import base
from dpo_jax.config import code as code_lib
from dpo_jax.config import load, origin, saved
from dpo_jax.models import decoder, lora, sample
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import base as plain
from dpo_jax.run import (
  checks,
  critic,
  feed,
  feeds,
  forward,
  gain,
  held_out,
  memory,
  rollouts,
  together,
)
from dpo_jax.run import model as model_lib
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


def check(config):
  """Refuses values that no run can have, before anything is built."""
  checks.values(config)
  rollouts.check(config, algos.make(config, apply=None))


def prepare_model(config):
  """The Setup of a config; allocates no parameters.

  Raises: ValueError for what the user can mend.
  """
  checks.values(config)
  jax.config.update("jax_default_matmul_precision", config.precision)
  return setup_on(config, *mesh_of(config))


def mesh_of(config):
  """(mesh, mode) of a config."""
  mode = lookup.lookup(run_lib.MODES, config.mesh.mode, "mesh.mode")
  mesh = mesh_lib.make(config.mesh)
  checks.pmap(config.mesh)
  return mesh, mode


def setup_on(config, mesh, mode):
  """The Setup of a config on a mesh, in a mode of parallel.run.MODES."""
  data, points = load.plain(config.data), config.sweep.together
  model, tokenizer = model_lib.build(
    config.model.to_dict(),
    config.init_from,
    config.tokenizer,
    data.max_prompt_length + data.max_completion_length,
  )
  model = decoder.with_kernel(model, mesh.devices.flat[0], data.shared, points)
  rows_at_most = -(-data.batch_size // mesh_lib.row_parallelism(mesh))
  asked = memory.Asked(config.model.remat, config.model.head_chunk, points)
  model = memory.forward_only(model, asked, rows_at_most)
  trained, source = trained_of(config, model)
  setup = plain.Setup(
    mesh=mesh,
    mode=mode,
    model=model,
    tokenizer=tokenizer,
    trained=trained,
    source=source,
    programs=None,
    data=data,
    sample=load.plain(config.sample),
    compute=asked,
    precision=config.precision,
    asked=config.to_dict(),
  )
  return _with_programs(setup)


def _with_programs(setup):
  """The Setup with the Programs of its model."""
  mesh, apply = setup.mesh, setup.model.apply
  programs = plain.Programs(
    init=run_lib.jitted(setup.model.init, trained_lib.model_shapes(setup)),
    token_logps=run_lib.forward(
      functools.partial(base.token_logps, apply), mesh
    ),
    token_kl=run_lib.forward(functools.partial(forward.kl, apply), mesh),
    rewards=run_lib.forward(functools.partial(forward.of_slots, apply), mesh),
    sample=sample.compiled(setup.model),
  )
  return setup._replace(programs=programs)


def trained_of(config, model):
  """What a config trains of a model: (trained.Trained, trained.Source)."""
  if config.lora is None:
    held = "float32"
    trained = trained_lib.whole(keeps_reference=config.ref == "frozen")
  else:
    held = lookup.lookup(lora.BASES, config.lora.base, "lora.base")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trained = trained_lib.adapter(shapes, load.plain(config.lora))
  algorithm = algos.make(config, apply=None)
  trained = trained_lib.with_heads(
    trained, algorithm.heads, model.config.embed, algorithm.copies
  )
  begun = config.rollout and config.rollout.get("critic_from")
  run = None  # that a base is of
  if config.init_from and origin.parse(config.init_from)[0] is None:
    run = _of_folder(config.init_from, model)
  return trained, trained_lib.Source(
    *(config.init_from, config.init_adapter, config.init_seed, held, run),
    critic=(begun, *_of_folder(begun, model)) if begun else None,
  )


def _of_folder(folder, model):
  """(Trained, Source, config as plain values) of another run of a model."""
  config = saved.saved_config(folder)
  return *trained_of(config, model), config.to_dict()


def prepare(config):
  """The Run of a config; reads data, allocates no parameters.

  Raises: ValueError for what the user can mend.
  """
  # ── Model and algorithm: both refuse what cannot be before data are read ───
  setup = prepare_model(config)
  algorithm = algorithm_of(config, setup)

  # ── Data: their shapes say what a step will need ───────────────────────────
  make_feed = lookup.lookup(feeds.FEEDS, algorithm.data, "the algorithm's data")
  source = make_feed(config, setup, algorithm)
  if config.ref == "cached" and source.loader is None:
    raise ValueError(
      "ref = 'cached' needs completions that are there before the run, and "
      f"algo = {config.algo!r} samples its own: set ref = 'frozen'"
    )
  total = feeds.total_steps(config, source.epoch)
  if config.train.steps is None:  # whole iterations
    total = next(filter(source.boundary, itertools.count(total)))
  checks.last_step(total, source.boundary, config.algo)
  optimizer = optim.make(config.optim, total, algorithm.rests)
  shapes = trained_lib.trained_shapes(setup)
  checks.freeze(config.optim.freeze, shapes, optimizer)

  # ── Memory: how the step is computed, so the model is another one now ──────
  largest = max(source.shapes, key=lambda shape: shape.length)
  setup, choice = memory.fitted(
    setup, optimizer, largest, config.train.accumulation, algorithm.extra
  )
  setup = _with_programs(setup)
  algorithm = algorithm_of(config, setup)

  # ── The step and what runs beside it: nothing is compiled before its call ──
  create, step, stacked_step = _compiled(config, setup, algorithm, optimizer)
  return plain.Run(
    setup=setup,
    feed=source,
    held_out=held_out_of(config, setup, algorithm),
    reference=reference_of(config, algorithm),
    about=(_about_loss(config, setup), f"{source.about}; {choice}"),
    total=total,
    algorithm=algorithm,
    optimizer=optimizer,
    hparams=feeds.hyper_params(config),
    identity=identity(config, source, algorithm),
    rhythm=rhythm_of(config),
    create=create,
    step=step,
    stacked_step=stacked_step,
    finish=gain.prepared(setup, load.plain(config.reward), source.loader),
  )


def prepare_measured(config):
  """The base.Measured of a config; reads no data of the training."""
  setup = prepare_model(config)
  algorithm = algorithm_of(config, setup)
  return plain.Measured(
    setup,
    held_out_of(config, setup, algorithm),
    reference_of(config, algorithm),
  )


def algorithm_of(config, setup):
  """The Algorithm of a config, of what is trained."""
  return base.on(algos.make(config, setup.model.apply), setup.trained.policy)


def held_out_of(config, setup, algorithm):
  """The HeldOut of a config; None if it names no data.eval."""
  if config.data.eval is None:
    return None
  checks.held_out(config, algorithm.held_out)
  rows = mesh_lib.row_parallelism(setup.mesh)
  read = functools.partial(
    *(feed.load, setup),
    algorithm._replace(data=algorithm.held_out_data or algorithm.data),
    *(config.data.eval, "data.eval", rows),
  )
  sums = step_lib.sums(algorithm, axis_name=run_lib.axis_name(setup.mode))
  return held_out.HeldOut(
    loader=functools.cache(read),
    algorithm=algorithm,
    hparams=feeds.hyper_params(config),
    sums=run_lib.evaluator(sums, setup.mesh, setup.mode),
  )


def reference_of(config, algorithm):
  """The Reference of a config; rollouts are measured by it once, when drawn."""
  return plain.Reference(
    cached=config.ref == "cached",
    store=config.ref_store,
    in_step=config.ref in ("frozen", "base", "ema")
    and algorithm.advantages is None,
    kept=config.ref != "none" or config.lora is not None,
  )


def rhythm_of(config):
  """The Rhythm of a config."""
  return plain.Rhythm(
    log=config.log.every,
    evaluate=config.eval.every,
    save=config.checkpoint.every,
    keep=config.checkpoint.keep,
    max_noise=config.train.max_noise,
    max_skipped=config.train.max_skipped,
    reports=load.plain(config.log),
  )


def step_of(config, algorithm):
  """(step body, Optimizer) of a config whose length needs no data."""
  if config.train.steps is None:
    raise ValueError("set train.steps: the schedule of a train step needs it")
  optimizer = optim.make(config.optim, config.train.steps, algorithm.rests)
  return _body(config, algorithm, optimizer), optimizer


def _body(config, algorithm, optimizer):
  return step_lib.make(
    algorithm,
    optimizer,
    accumulation=config.train.accumulation,
    axis_name=run_lib.axis_name(config.mesh.mode),
  )


def sharing(config, run):
  """The Run of a config that differs from another's in traced fields alone.

  And in init_seed. Data and compiled functions are shared.
  """
  if not run.feed.ahead:  # its batches are made with these fields
    anew = prepare(config)
    return anew._replace(setup=anew.setup._replace(base=run.setup.base))
  checks.values(config)
  setup, hparams = run.setup, feeds.hyper_params(config)
  measured = run.held_out and run.held_out._replace(hparams=hparams)
  return run._replace(
    setup=setup._replace(
      source=setup.source._replace(seed=config.init_seed),
      asked=config.to_dict(),
    ),
    held_out=measured,
    about=(_about_loss(config, setup), run.about[1]),
    hparams=hparams,
    identity=identity(config, run.feed, run.algorithm),
  )


def identity(config, source, algorithm):
  """What a run that resumes must share, the user's own code included."""
  code = {f"{code_lib.OF}{name}": x for name, x in algorithm.code.items()}
  return {**config.to_dict(), "data_fingerprint": source.fingerprint, **code}


def _about_loss(config, setup):
  fields = saved.flatten(config.loss.to_dict())
  named = "".join(f", {k} {v}" for k, v in fields.items() if k != "name")
  what = "reward model, " if "reward" in setup.trained.heads else ""
  return f"{what}loss {config.loss.name}{named}; reference {config.ref}"


def initial_state(run, initial):
  """A TrainState at step 0, from what trained.initial returned.

  That is the frozen part where one is needed, and copied where it is trained,
  since a step donates what it trains.
  """
  state = run.create(initial, jax.random.key(run.setup.source.seed))
  if run.setup.source.critic is not None:
    params = critic.started(run.setup, initial, state.params)
    state = state.replace(params=params)
  return state.replace(frozen=run.setup.trained.frozen(initial))


def _compiled(config, setup, algorithm, optimizer):
  """(create, step, stacked_step) of a Run."""
  body, on = _body(config, algorithm, optimizer), (setup.mesh, setup.mode)

  def create(initial, rng):
    params = jax.tree.map(jnp.copy, setup.trained.init(initial, rng))
    return state_lib.create(params, optimizer, {}, algorithm.extra(params))

  start = trained_lib.base_shapes(setup), jax.random.key(0)
  state = trained_lib.sharded(setup, jax.eval_shape(create, *start))

  @functools.cache
  def stacked_step(count, shared):
    step = together.over_points(body, count, shared=shared)
    shapes = together.stacked_shapes(state, count)
    return run_lib.parallelize(step, *on, shapes)

  step = run_lib.parallelize(body, *on, state)
  return run_lib.jitted(create, state), step, stacked_step
