"""A config made into functions and data: what a run needs before it starts."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import algos, lookup, tree
from dpo_jax.algos import base
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import rows, sources, tokenize
from dpo_jax.models import axes, transformer
from dpo_jax.models import config as model_config
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.train import checkpoint, optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


class Run(NamedTuple):
  """Everything a config builds, before the first step.

  Attributes:
    config: the locked ConfigDict.
    mesh, mode: where and how the step runs.
    model: transformer.Model.
    tokenizer: tokenize.Tokenizer.
    loader: of the training data; `about` describes it in a line.
    total: updates of the run.
    algorithm: base.Algorithm.
    optimizer: optim.Optimizer.
    hparams: traced scalars.
    identity: the config and a fingerprint of the data, as plain values: what a
      run that resumes must share.
  """

  config: Any
  mesh: jax.sharding.Mesh
  mode: str
  model: transformer.Model
  tokenizer: tokenize.Tokenizer
  loader: loader_lib.Loader
  about: str
  total: int
  algorithm: base.Algorithm
  optimizer: optim.Optimizer
  hparams: dict
  identity: dict


def prepare(config):
  """Builds the Run of a config; reads data, allocates no parameters.

  Raises: ValueError for what the user can mend.
  """
  check_values(config)
  jax.config.update("jax_default_matmul_precision", config.precision)
  mode = lookup.lookup(run_lib.MODES, config.mesh.mode, "mesh.mode")
  mesh = mesh_lib.make(config.mesh)
  if mode == "pmap" and config.mesh.fsdp * config.mesh.tensor > 1:
    raise ValueError("mesh.mode = 'pmap' needs mesh.fsdp = mesh.tensor = 1")
  if mode == "pmap" and jax.process_count() > 1:
    raise ValueError("mesh.mode = 'pmap' runs in one process; use 'jit'")
  model, tokenizer = build_model(config)
  rows_at_once = mesh_lib.row_parallelism(mesh) * config.train.accumulation
  loader, about = build_loader(
    config,
    tokenizer,
    config.data.train,
    training=True,
    row_multiple=rows_at_once,
  )
  total = total_steps(config, loader.size)
  make_algorithm = lookup.lookup(algos.ALGOS, config.algo, "algo")
  optimizer = optim.make(config.optim, total)
  check_freeze(config.optim.freeze, model, optimizer)
  return Run(
    config=config,
    mesh=mesh,
    mode=mode,
    model=model,
    tokenizer=tokenizer,
    loader=loader,
    about=about,
    total=total,
    algorithm=make_algorithm(config, model.apply),
    optimizer=optimizer,
    hparams=hyper_params(config),
    identity=config.to_dict() | {"data_fingerprint": loader.fingerprint},
  )


# Fields that may be None, and the smallest value of those that may be below 1.
_OPTIONAL = {
  *("init_from", "head_chunk", "model.window", "optim.clip_norm"),
  *("data.train", "data.eval", "data.max_row_length"),
  *("train.steps", "mesh.data"),
}
_LOWEST = {
  **dict.fromkeys(("init_seed", "data.seed", "optim.warmup"), 0),
  **dict.fromkeys(("model.rotary_dim", "optim.weight_decay"), 0),
}


def check_values(config):
  """Refuses numbers that no field can have.

  Whole numbers are at least 1 and others above 0 but for `_LOWEST`; what is
  not in `_OPTIONAL` is not None. Losses check their own fields.
  """
  for path, value in checkpoint.flatten(config.to_dict()).items():
    if value is None and path not in _OPTIONAL:
      raise ValueError(f"{path} = None: it needs a value")
    if isinstance(value, bool | str | tuple | None) or path.startswith("loss."):
      continue
    low = _LOWEST.get(path, 1 if isinstance(value, int) else None)
    if not (value > 0 if low is None else value >= low):
      bound = "above 0" if low is None else f"at least {low}"
      raise ValueError(f"{path} = {value} must be {bound}")
  if config.data.max_row_length is not None and not config.data.packed:
    raise ValueError("data.max_row_length has no effect with data.packed=False")


def check_freeze(freeze, model, optimizer):
  """Refuses a pattern of optim.freeze that matches nothing, or everything."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  paths = [path for path, _ in tree.named(shapes)]
  for pattern in freeze:
    if not any(tree.matches([pattern], path) for path in paths):
      raise ValueError(
        f"optim.freeze: {pattern!r} matches no parameter"
        f"{lookup.nearest(pattern, paths)}"
      )
  if not any(map(optimizer.trains, paths)):
    raise ValueError(f"optim.freeze = {tuple(freeze)} leaves nothing to train")


def build_model(config):
  """(transformer.Model, tokenize.Tokenizer) of a config."""
  tokenizer = tokenize.load(config.tokenizer)
  shape = model_config.ModelConfig(**config.model.to_dict())
  longest = config.data.max_prompt_length + config.data.max_completion_length
  if longest > shape.max_positions:
    raise ValueError(
      f"data.max_prompt_length + data.max_completion_length = {longest} is "
      f"more than model.max_positions = {shape.max_positions}"
    )
  return transformer.build(shape, tokenizer.vocab_size), tokenizer


def build_loader(config, tokenizer, spec, *, training, row_multiple):
  """A Loader of one data set and a line that describes it."""
  policy = sources.Policy(config.data.bad_records)
  form = "sft" if config.algo == "sft" else "preference"
  field = "data.train" if training else "data.eval"
  records = sources.load(spec, form, policy, field)
  examples, changed = tokenize.encode(records, tokenizer, config.data, policy)
  layout = rows.Layout(
    config.data.packed,
    config.data.shared,
    row_multiple,
    config.data.max_row_length,
  )
  loader = loader_lib.Loader(
    examples,
    layout,
    batch_size=config.data.batch_size,
    seed=config.data.seed if training else None,
    budget=config.data.max_shapes,
    multiple=config.data.shape_multiple,
    steps=total_steps(config, len(examples)) if training else None,
    window=config.model.window,
  )
  notes = {**changed, **{f"skipped: {k}": n for k, n in policy.skipped.items()}}
  shapes = ", ".join(
    f"R{s.rows} T{s.length} S{s.scored} P{s.per_row} E{s.tile}"
    for s in loader.shapes
  )
  comparisons = sum(len(e.pairs) for e in examples)
  about = (
    f"{spec}: {len(examples)} examples, {comparisons} comparisons; shapes "
    f"{shapes}; fill {loader.fill:.2f}"
  )
  if notes:
    about += "; " + ", ".join(f"{n} {what}" for what, n in notes.items())
  return loader, about


def total_steps(config, size):
  """Updates of the run on `size` examples, from train.steps or train.epochs."""
  if config.train.steps is not None:
    return config.train.steps
  examples = round(config.train.epochs * size)
  return max(1, -(-examples // config.data.batch_size))


def hyper_params(config):
  """The traced scalars of a step; changing one never recompiles."""
  _, numeric = base.split_fields(config.loss)
  numeric["learning_rate"] = config.optim.learning_rate
  return {k: jnp.float32(v) for k, v in numeric.items()}


def initial_state(run):
  """A placed TrainState at step 0, born sharded."""
  config, mesh = run.config, run.mesh
  spec = axes.spec
  if run.mode == "pmap":
    spec = lambda *_: jax.sharding.PartitionSpec()  # noqa: E731
  rng = jax.random.key(config.init_seed)

  def create(rng):
    params = run.model.init(rng)
    frozen = {"ref": params} if config.ref == "frozen" else {}
    return state_lib.create(params, run.optimizer, frozen)

  shardings = mesh_lib.shardings(mesh, jax.eval_shape(create, rng), spec)
  state = run_lib.create(create, shardings, rng)
  if config.init_from is not None:
    params = checkpoint.load_params(config.init_from, state.params)
    frozen = state.frozen
    if "ref" in frozen:
      frozen = {"ref": run_lib.place(params, shardings.frozen["ref"])}
    state = state.replace(params=params, frozen=frozen)
  return state


def place_batch(run, loader, number):
  """Batch `number` of a loader on the mesh, and its Stats."""
  batch, stats = loader.batch(
    number, functools.partial(mesh_lib.local_rows, run.mesh)
  )
  return run_lib.place_batch(batch, run.mesh, run.mode), stats


def compile_step(run, state):
  """The train step over the mesh; donates its state."""
  step = step_lib.make(
    run.algorithm,
    run.optimizer,
    accumulation=run.config.train.accumulation,
    axis_name=run_lib.axis_name(run.mode),
  )
  return run_lib.parallelize(step, run.mesh, run.mode, state)


def step_flops(run, stats):
  """FLOPs that a step needs: 3 forward passes of work, 1 for the reference."""
  passes = 3 + (run.config.ref == "frozen")
  return passes * model_config.matmul_flops(
    run.model.config,
    run.model.vocab_size,
    stats.tokens,
    stats.scored,
    stats.visible,
  )


def build(config):
  """(apply, params) of a config, on one device, for a notebook.

  apply(params, batch) is a pure function to (hidden [R, T, D], Head).
  """
  model, _ = build_model(config)
  params = jax.jit(model.init)(jax.random.key(config.init_seed))
  return model.apply, params


def batches(config):
  """Yields the batches of a config's training data, as dicts of arrays."""
  _, tokenizer = build_model(config)
  loader, _ = build_loader(
    config, tokenizer, config.data.train, training=True, row_multiple=1
  )
  for number in range(total_steps(config, loader.size)):
    batch, _ = loader.batch(number)
    yield jax.tree.map(jnp.asarray, batch)


def objective(config, apply):
  """The objective of a config, which prepares its batch itself.

  Returns: pure function (params, frozen, batch, hparams) -> algos.base.Terms.
  """
  make_algorithm = lookup.lookup(algos.ALGOS, config.algo, "algo")
  algorithm = make_algorithm(config, apply)

  def terms(params, frozen, batch, hparams):
    batch = algorithm.prepare(batch, frozen, {})
    return algorithm.objective(params, frozen, batch, hparams)

  return terms
