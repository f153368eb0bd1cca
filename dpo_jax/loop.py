"""The run as one page: build, restore, step, evaluate, save."""

import functools
import itertools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from dpo_jax import algos, lookup, tree
from dpo_jax.algos import preference as preference_algo
from dpo_jax.data import loader as loader_lib
from dpo_jax.data import rows, sources, tokenize
from dpo_jax.eval import preference
from dpo_jax.models import axes, transformer
from dpo_jax.models import config as model_config
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run
from dpo_jax.train import checkpoint, health, log, optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


class Result(NamedTuple):
  """What a run leaves in memory.

  Attributes:
    state: the last TrainState.
    evaluation: metrics of the last evaluation, or None.
    exit_code: 0, or the code of the signal that stopped it.
  """

  state: state_lib.TrainState
  evaluation: dict | None
  exit_code: int


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
  _, numeric = preference_algo.split_fields(config.loss)
  numeric["learning_rate"] = config.optim.learning_rate
  return {k: jnp.float32(v) for k, v in numeric.items()}


def initial_state(config, model, optimizer, mesh):
  """A placed TrainState at step 0, born sharded."""
  spec = axes.spec
  if config.mesh.mode == "pmap":
    spec = lambda *_: jax.sharding.PartitionSpec()  # noqa: E731
  rng = jax.random.key(config.init_seed)

  def create(rng):
    params = model.init(rng)
    frozen = {"ref": params} if config.ref == "frozen" else {}
    return state_lib.create(params, optimizer, frozen)

  shardings = mesh_lib.shardings(mesh, jax.eval_shape(create, rng), spec)
  state = run.create(create, shardings, rng)
  if config.init_from is not None:
    params = checkpoint.load_params(config.init_from, state.params)
    frozen = state.frozen
    if "ref" in frozen:
      frozen = {"ref": run.place(params, shardings.frozen["ref"])}
    state = state.replace(params=params, frozen=frozen)
  return state


def step_flops(config, model, stats):
  """FLOPs that a step needs: 3 forward passes of work, 1 for the reference."""
  passes = 3 + (config.ref == "frozen")
  return passes * model_config.matmul_flops(
    model.config, model.vocab_size, stats.tokens, stats.scored, stats.visible
  )


def save_config(config, workdir):
  """Writes the resolved config beside the run."""
  path = epath.Path(workdir) / "config.json"
  path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def fit(config, workdir):
  """Trains as `config` says, resuming what `workdir` holds.

  Args:
    config: locked ConfigDict with the fields of configs/base.py.
    workdir: run folder; gets config.json, metrics.jsonl and checkpoints/.
  Returns: Result.
  Raises: ValueError for what the user can mend, before anything is written
    over.
  """
  with health.lock(workdir), health.stop_on_signal() as stop:
    return _fit(config, workdir, stop)


def _fit(config, workdir, stop):
  jax.config.update("jax_default_matmul_precision", config.precision)
  mode = lookup.lookup(run.MODES, config.mesh.mode, "mesh.mode")
  mesh = mesh_lib.make(config.mesh)
  if mode == "pmap" and config.mesh.fsdp * config.mesh.tensor > 1:
    raise ValueError("mesh.mode = 'pmap' needs mesh.fsdp = mesh.tensor = 1")
  model, tokenizer = build_model(config)
  devices = mesh_lib.row_parallelism(mesh)
  accumulation = config.train.accumulation
  loader, about = build_loader(
    config,
    tokenizer,
    config.data.train,
    training=True,
    row_multiple=devices * accumulation,
  )
  total = total_steps(config, loader.size)
  algorithm = lookup.lookup(algos.ALGOS, config.algo, "algo")(
    config, model.apply
  )
  optimizer = optim.make(config.optim, total)
  state = initial_state(config, model, optimizer, mesh)
  hparams = hyper_params(config)
  plain = config.to_dict()

  checkpoints = checkpoint.Checkpointer(workdir, keep=config.checkpoint.keep)
  restored = checkpoints.restore(state, plain)
  state = state if restored is None else restored
  start = int(state.step)
  logger = log.Logger(
    workdir,
    every=config.log.every,
    total=total,
    start=start,
    loud=jax.process_index() == 0,
  )
  save_config(config, workdir)
  logger.say(about)
  logger.say(
    f"{tree.size(state.params):,} parameters on {mesh.devices.size} "
    f"{jax.devices()[0].platform} device(s), mesh {mesh_lib.sizes(mesh)}, "
    f"{mode}; steps {start} to {total}"
  )
  name = run.axis_name(mode)
  step = run.parallelize(
    step_lib.make(
      algorithm, optimizer, accumulation=accumulation, axis_name=name
    ),
    mesh,
    mode,
    state,
  )
  evaluate = _evaluator(config, tokenizer, algorithm, mesh, mode, logger)

  def make_batch(number):
    rows_of = functools.partial(mesh_lib.local_rows, mesh)
    batch, stats = loader.batch(number, rows_of)
    return run.place_batch(batch, mesh, mode), stats

  evaluation = None
  batches = loader_lib.prefetch(make_batch, range(start, total))
  for number, (batch, stats) in zip(itertools.count(start + 1), batches):
    state, metrics = step(state, batch, hparams)
    logged = logger.step(
      number, metrics, stats, step_flops(config, model, stats)
    )
    if logged and logged["skipped"] >= config.train.max_skipped:
      raise FloatingPointError(
        f"{logged['skipped']:.0f} updates in a row were not finite; the last "
        f"checkpoint is kept in {workdir}"
      )
    last = number == total or bool(stop)
    if number % config.checkpoint.every == 0 or last:
      checkpoints.save(state, plain, wait=last)
    if evaluate and (number % config.eval.every == 0 or number == total):
      evaluation = evaluate(state, hparams, number)
    if stop:
      break
  logger.flush()
  checkpoints.close()
  if stop:
    logger.say(
      f"stopped at step {number} of {total}, saved; the same command resumes"
    )
    return Result(state, evaluation, stop.exit_code)
  logger.say(f"done: {total} steps in {workdir}")
  return Result(state, evaluation, 0)


def _evaluator(config, tokenizer, algorithm, mesh, mode, logger):
  """Function (state, hparams, step) -> metrics, or None without data.eval."""
  if config.data.eval is None:
    return None
  loader, about = build_loader(
    config,
    tokenizer,
    config.data.eval,
    training=False,
    row_multiple=mesh_lib.row_parallelism(mesh),
  )
  logger.say(f"eval {about}")
  sums = run.evaluator(
    step_lib.sums(algorithm, axis_name=run.axis_name(mode)), mesh, mode
  )

  def evaluate(state, hparams, number):
    logger.flush()
    rows_of = functools.partial(mesh_lib.local_rows, mesh)
    batches = (
      run.place_batch(loader.batch(n, rows_of)[0], mesh, mode)
      for n in range(loader.steps)
    )
    values = preference.evaluate(sums, state, hparams, batches)
    logger.write("eval", number, values)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    logger.say(f"eval at {number}: {shown}")
    return values

  return evaluate
