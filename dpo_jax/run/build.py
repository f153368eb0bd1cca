"""A config made into functions and data: what a run needs before it starts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import algos, lookup
from dpo_jax.algos import base
from dpo_jax.data.batch import loader as loader_lib
from dpo_jax.data.batch import order, rows
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import corpus, tokenize
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import checks, memory, trained
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


class Setup(NamedTuple):
  """A model on its devices, before any data.

  Attributes:
    config: the locked ConfigDict.
    mesh, mode: where and how steps run.
    model: decoder.Model.
    tokenizer: tokenize.Tokenizer.
    cache: what was built once and serves again, by name: compiled functions,
      the held-out loader. The points of a sweep share it.
  """

  config: Any
  mesh: jax.sharding.Mesh
  mode: str
  model: decoder.Model
  tokenizer: tokenize.Tokenizer
  cache: dict

  def once(self, name, make):
    """cache[name], made by `make()` the first time."""
    if name not in self.cache:
      self.cache[name] = make()
    return self.cache[name]


class Run(NamedTuple):
  """Everything a config builds, before the first step.

  Attributes:
    setup: Setup.
    loader: of the training data; `about` describes it in a line.
    total: updates of the run.
    algorithm: base.Algorithm.
    optimizer: optim.Optimizer.
    hparams: traced scalars.
    identity: the config and a fingerprint of the data, as plain values: what a
      run that resumes must share.
  """

  setup: Setup
  loader: loader_lib.Loader
  about: str
  total: int
  algorithm: base.Algorithm
  optimizer: optim.Optimizer
  hparams: dict
  identity: dict


def check(config):
  """Refuses values that no run can have, before anything is built."""
  checks.values(config)
  lookup.lookup(algos.ALGOS, config.algo, "algo")(config, apply=None)


def prepare_model(config):
  """The Setup of a config; allocates no parameters.

  Raises: ValueError for what the user can mend.
  """
  checks.values(config)
  jax.config.update("jax_default_matmul_precision", config.precision)
  mode = lookup.lookup(run_lib.MODES, config.mesh.mode, "mesh.mode")
  mesh = mesh_lib.make(config.mesh)
  if mode == "pmap" and config.mesh.fsdp * config.mesh.tensor > 1:
    raise ValueError("mesh.mode = 'pmap' needs mesh.fsdp = mesh.tensor = 1")
  if mode == "pmap" and jax.process_count() > 1:
    raise ValueError("mesh.mode = 'pmap' runs in one process; use 'jit'")
  model, tokenizer = trained.build_model(config)
  device = mesh.devices.flat[0]
  model = decoder.with_kernel(
    model, device, config.data.shared, config.sweep.together
  )
  rows_at_most = -(-config.data.batch_size // mesh_lib.row_parallelism(mesh))
  model = memory.forward_only(model, config, rows_at_most)
  return Setup(config, mesh, mode, model, tokenizer, {})


def prepare(config):
  """The Run of a config; reads data, allocates no parameters.

  Raises: ValueError for what the user can mend.
  """
  setup = prepare_model(config)
  trained_algorithm(setup)  # refuses what it cannot do before data are read
  rows_at_once = (
    mesh_lib.row_parallelism(setup.mesh) * config.train.accumulation
  )
  loader, about = build_loader(
    config,
    setup.tokenizer,
    setup.model.config,
    config.data.train,
    training=True,
    row_multiple=rows_at_once,
  )
  about += "; " + decoder.attention_line(
    *(config.model.attention, setup.model, setup.mesh.devices.flat[0]),
    *(config.data.shared, loader.shapes, (rows_at_once, config.mesh.tensor)),
  )
  total = total_steps(config, loader.size)
  optimizer = optim.make(config.optim, total)
  shapes = trained.trained_shapes(setup)
  checks.freeze(config.optim.freeze, shapes, optimizer)
  largest = max(loader.shapes, key=lambda shape: shape.length)
  setup, choice = memory.fitted(
    setup, optimizer, largest, config.train.accumulation
  )
  about += f"; {choice}"
  return Run(
    setup=setup,
    loader=loader,
    about=about,
    total=total,
    algorithm=trained_algorithm(setup),
    optimizer=optimizer,
    hparams=hyper_params(config),
    identity=config.to_dict() | {"data_fingerprint": loader.fingerprint},
  )


def make_algorithm(setup):
  """The Algorithm that `config.algo` names, of all parameters."""
  make = lookup.lookup(algos.ALGOS, setup.config.algo, "algo")
  return make(setup.config, setup.model.apply)


def trained_algorithm(setup):
  """The Algorithm of what is trained: of an adapter, where there is one."""
  algorithm = make_algorithm(setup)
  if setup.config.lora is None:
    return algorithm
  return base.on_adapter(algorithm, functools.partial(trained.policy, setup))


def build_loader(config, tokenizer, shape, spec, *, training, row_multiple):
  """A Loader of one data set and a line that describes it.

  Args:
    shape: ModelConfig, for its windows.
    spec: of the data.
    training: shuffled, endless; or one pass in order.
    row_multiple: of the rows of a batch.
  """
  policy = sources.Policy(config.data.bad_records)
  field = "data.train" if training else "data.eval"
  kind = algos.kind_of(config)
  weights = tuple(weight for weight, _ in sources.parse(spec, field))
  scored = "scores" in algos.needs_of(config)
  examples, changed, cached = corpus.load(
    *(spec, field, kind, scored, tokenizer, config.data, policy),
    loud=jax.process_index() == 0,
  )
  layout = rows.Layout(
    config.data.packed,
    config.data.shared,
    row_multiple,
    config.data.max_row_length,
  )
  size = order.epoch_size(order.mixture(examples.source, weights))
  loader = loader_lib.Loader(
    examples,
    layout,
    batch_size=config.data.batch_size,
    seed=config.data.seed if training else None,
    budget=config.data.max_shapes,
    multiple=config.data.shape_multiple,
    steps=total_steps(config, size) if training else None,
    windows=shape.windows,
    weights=weights,
  )
  notes = {**changed, **{f"skipped: {k}": n for k, n in policy.skipped.items()}}
  if size != len(examples):
    notes["examples per epoch"] = size
  shapes = ", ".join(
    f"R{s.rows} T{s.length} S{s.scored} P{s.per_row} E{s.tile}"
    for s in loader.shapes
  )
  about = (
    f"{spec}: {len(examples)} examples, {loader.comparisons} comparisons; "
    f"shapes {shapes}; fill {loader.fill:.2f}"
  )
  if notes:
    about += "; " + ", ".join(f"{n} {what}" for what, n in notes.items())
  if len(weights) > 1:
    named = enumerate(part for _, part in sources.parse(spec, field))
    about += "; " + ", ".join(f"source{k} is {part}" for k, part in named)
  if cached is not None:
    about += f"; tokens in {cached}"
  return loader, about


def total_steps(config, size):
  """Updates of the run on `size` examples, from train.steps or train.epochs."""
  if config.train.steps is not None:
    return config.train.steps
  examples = round(config.train.epochs * size)
  return max(1, -(-examples // config.data.batch_size))


def hyper_params(config):
  """The traced scalars of a step; changing one never recompiles."""
  numeric = base.numeric_fields(config.loss)
  numeric["learning_rate"] = config.optim.learning_rate
  return {k: jnp.float32(v) for k, v in numeric.items()}


def initial_state(run, initial):
  """A TrainState at step 0.

  Args:
    run: Run.
    initial: of trained.initial. It is the frozen part where that is needed, and
      copied where it is trained, since a step donates what it trains.
  """
  setup = run.setup

  def create(params):
    params = jax.tree.map(jnp.copy, params)
    extra = run.algorithm.extra(params)
    return state_lib.create(params, run.optimizer, {}, extra)

  def build():
    shapes = trained.sharded(setup, jax.eval_shape(create, params))
    return run_lib.jitted(create, jax.tree.map(lambda x: x.sharding, shapes))

  params = initial if setup.config.lora is None else trained.adapter(setup)
  state = setup.once("create", build)(params)
  return state.replace(frozen=frozen(setup, initial))


def frozen(setup, initial):
  """The part of a TrainState that is never trained nor saved."""
  if setup.config.lora is not None:
    return {"base": initial}
  return {"ref": initial} if setup.config.ref == "frozen" else {}


def place_batch(setup, loader, number):
  """Batch `number` of a loader on the mesh, and its Stats."""
  batch, stats = loader.batch(
    number, functools.partial(mesh_lib.local_rows, setup.mesh)
  )
  return run_lib.place_batch(batch, setup.mesh, setup.mode), stats


def train_step(run, state):
  """The compiled step over the mesh; donates its state."""
  setup = run.setup

  def build():
    return run_lib.parallelize(step_body(run), setup.mesh, setup.mode, state)

  return setup.once("step", build)


def step_body(run):
  """The step of one run, not yet compiled."""
  return step_lib.make(
    run.algorithm,
    run.optimizer,
    accumulation=run.setup.config.train.accumulation,
    axis_name=run_lib.axis_name(run.setup.mode),
  )


def held_out_sums(setup, algorithm, of):
  """The compiled (state, batch, hparams) -> sums of train.step.sums.

  Args:
    of: what the algorithm trains, "adapter" or "policy": each is compiled once.
  """

  def build():
    sums = step_lib.sums(algorithm, axis_name=run_lib.axis_name(setup.mode))
    return run_lib.evaluator(sums, setup.mesh, setup.mode)

  return setup.once(f"sums of {of}", build)


def held_out_loader(setup):
  """(Loader, line about it) of data.eval."""
  return setup.once(
    "held out",
    lambda: build_loader(
      setup.config,
      setup.tokenizer,
      setup.model.config,
      setup.config.data.eval,
      training=False,
      row_multiple=mesh_lib.row_parallelism(setup.mesh),
    ),
  )


def step_flops(run, stats):
  """FLOPs that a step needs, without an adapter's own.

  Of products with weights one pass forward, one to the activations, and one to
  the weights if they are trained; of attention three. One more of each for the
  reference.
  """
  config = run.setup.config
  by_weights, by_attention = model_config.matmul_flops(
    run.setup.model.config,
    run.setup.model.vocab_size,
    stats.tokens,
    stats.scored,
    stats.visible,
  )
  ref = config.ref in ("frozen", "base", "ema")
  passes = (2 if config.lora is not None else 3) + ref
  return passes * by_weights + (3 + ref) * by_attention
