"""Thin functions for a notebook: a config or arrays in, plain values out."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_dict

from dpo_jax import algos, report, store, sweeps
from dpo_jax.algos import base
from dpo_jax.config import load
from dpo_jax.data.read import fields, files, records, sources
from dpo_jax.data.tokens import chat
from dpo_jax.eval import completions, evaluation, generate, prompting, rewards
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build as build_lib
from dpo_jax.run import recorder, trained
from dpo_jax.train import checkpoint, health
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
  if run.feed.loader is None:
    raise ValueError(
      f"the batches of {run.algorithm.data!r} depend on the policy as it is "
      "trained: `fit` makes them"
    )
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
  heads = algos.make(config, apply=None).heads
  spec = trained.partition_spec(mode, heads)
  state = run_lib.place(state, mesh_lib.shardings(mesh, state, spec))
  place = functools.partial(run_lib.place_batch, mesh=mesh, mode=mode)
  return run_lib.parallelize(step, mesh, mode, state), state, place


def sweep(config, overrides, workdir):
  """Trains and evaluates every point of a sweep, and writes its report.

  Args: as `sweeps.sweep`; config may be the spec of one too, "dpo:smoke", and
    a point may then set its argument: {"arg": "loss=simpo", "loss.beta": 2.0}.
  Returns: report.Table, a list of dicts that shows itself as the table; with
    page, the path of report.html, and figures.
  Raises: ValueError as `sweeps.sweep`, and for points that are no dicts;
    KeyboardInterrupt if a signal stopped it: the same call goes on.
  """
  at, overrides = None, list(overrides)
  if not all(isinstance(point, dict) for point in overrides):
    raise ValueError(
      "the points of a sweep are a list of dicts, [{'loss.beta': 0.05}, "
      "{'loss.beta': 0.1}]"
    )
  if isinstance(config, str):
    source = load.load(config, ())
    config, at = source.config, source.at
  code = sweeps.sweep(config, overrides, workdir, at=at)
  if code > 1:  # 1 is of points that failed, which the table shows as they are
    raise health.Stopped(code)
  return report.made(workdir)


@dataclasses.dataclass(frozen=True, repr=False)
class Folder:
  """A run folder; what is asked for is read once.

  Attributes:
    workdir: its path.
  """

  workdir: epath.Path

  @functools.cached_property
  def config(self):
    """The locked config that it was trained with."""
    return load.load_config(str(self.workdir / "config.json"))

  @functools.cached_property
  def metrics(self):
    """The rows of metrics.jsonl, see recorder.history."""
    return recorder.history(self.workdir)

  @functools.cached_property
  def evaluation(self):
    """What evaluation.json holds; None if it was not evaluated."""
    path = self.workdir / "evaluation.json"
    return store.read_json(path) if path.exists() else None

  @functools.cached_property
  def samples(self):
    """The samples of the evaluation, a dict each; else those of `sample`.

    The rows of samples.jsonl or completions.jsonl; [] without either.
    """
    names = ("samples.jsonl", "completions.jsonl")
    paths = [self.workdir / name for name in names]
    path = next((path for path in paths if path.exists()), None)
    rows = [] if path is None else [row for _, row in files.jsonl(path)]
    return [row for row in rows if isinstance(row, dict)]

  @functools.cached_property
  def policy(self):
    """(apply, params) of the last checkpoint, on one device, as of `build`.

    An adapter is grafted onto its base.
    """
    setup = _setup(self.config)
    return setup.model.apply, _restored(setup, self.workdir)

  @property
  def figures(self):
    """{"curves": report.Picture}: the training; {} if nothing was logged."""
    return report.training(self.workdir.name, self.metrics)

  def __repr__(self):
    step = max(checkpoint.steps(self.workdir), default=None)
    names = ("metrics", "evaluation", "samples")
    parts = [name for name in names if getattr(self, name)]
    about = f"step {step}" if step is not None else "no checkpoint"
    return f"<{', '.join([f'run {self.workdir}: {about}', *parts])}>"


def load_run(workdir):
  """What a run folder holds: config, metrics, evaluation, samples, policy.

  Args:
    workdir: folder of `fit`, of `dpo-jax train`, or of a point of a sweep.
  Returns: Folder.
  Raises: ValueError if it is none.
  """
  workdir = epath.Path(workdir)
  if (workdir / "sweep.json").exists():
    points = store.read_json(workdir / "sweep.json").get("points")
    points = points if isinstance(points, list) else []
    names = ", ".join(str(workdir / p["folder"]) for p in points)
    raise ValueError(
      f"{workdir} is the folder of a sweep: load one of its runs ({names}), or "
      "see them together by dj.report"
    )
  run = Folder(workdir)
  _ = run.config  # refuses a folder of nothing now
  return run


def sample(
  run,
  prompts,
  *,
  params=None,
  draws=None,
  max_new_tokens=None,
  temperature=None,
  top_p=None,
  seed=None,
):
  """Completions of prompts, drawn from a policy.

  Args:
    run: folder of a run, or what `load_run` or `fit` returned: the policy of
      its last checkpoint. Or a config: the policy that its run would start
      from.
    prompts: list of texts, or of conversations (lists of messages, {"role",
      "content"}), which the tokenizer's chat template writes; or of rows, as
      this function returns them.
    params: another policy's, as `build`, `load_run` and `train_step` have them.
    draws, max_new_tokens, temperature, top_p, seed: in the place of those of
      config.sample.
  Returns: list of dicts, `draws` for each prompt, in their order: "id" (number
    of the prompt), "prompt", "completion", "finished", "length" and "tokens";
    and "reward/NAME" of config.sample.scorers.
  Raises: ValueError for a prompt that cannot be continued.
  """
  if isinstance(prompts, str):
    raise ValueError(
      f"prompts = {prompts!r:.60} must be a list of prompts: [{prompts!r:.60}]"
    )
  asked = {
    "draws": draws,
    "max_new_tokens": max_new_tokens,
    "temperature": temperature,
    "top_p": top_p,
    "seed": seed,
  }
  point = {f"sample.{k}": v for k, v in asked.items() if v is not None}
  point |= {"sample.best_of": (), "sample.rank_by": None}  # of whole sources
  config, workdir = _named(run)
  setup = build_lib.prepare_model(load.at(config, point, "sample"))
  if not prompts:
    return []
  # A completion does not depend on the batch it is drawn in.
  options = setup.sample
  size = min(options.batch_size, len(prompts) * options.draws)
  setup = setup._replace(sample=options._replace(batch_size=size))
  scorers = rewards.load_all(options.scorers)
  template, policy = setup.tokenizer.apply_template, sources.Policy("error")
  texts = []
  for number, prompt in enumerate(prompts):
    where = f"prompts[{number}]"
    row = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    record = records.make(row, "prompt", where)
    with fields.at(where):
      texts.append((chat.prompt(record, template), record))
  given = prompting.encoded(setup, texts, policy)
  generate.check(setup, scorers, given)
  params = _policy(setup, workdir, params)
  bos, rows = setup.tokenizer.bos_id, []
  for batch in generate.draws(setup, params, given):
    ended = prompting.stopped(setup, batch)
    rows += completions.describe(ended, scorers, options.draws, bos)
  return rows


def evaluate(run, overrides=None, *, params=None):
  """Held-out comparisons, rewards and KL of a policy.

  Args:
    run, params: as of `sample`; params are what is trained: all parameters, or
      with config.lora the adapter.
    overrides: fields of the config, {"data.eval": "held_out.jsonl"}.
  Returns: dict, the content of evaluation.json: "comparisons" ({metric: mean
    of data.eval}) and, where sample.prompts is set, "means" ({"mean", "se"} of
    rewards, KL and length). The policy of a folder leaves the file there.
  Raises: ValueError if the config names nothing to evaluate on.
  """
  config, workdir = _named(run)
  config = load.at(config, overrides or {}, "evaluate")
  measured = build_lib.prepare_measured(config)
  setup = measured.setup
  base = trained.initial(setup)
  if workdir is not None and params is None:
    params = trained.restored(setup, base, workdir)
    meta = checkpoint.check_run(workdir, config.to_dict(), base)
    made = evaluation.made_of(
      *(meta["step"], meta["data_fingerprint"], base, meta["identity"])
    )
    return evaluation.evaluate(measured, params, base, workdir, made)
  if params is None:
    params = setup.trained.init(base, jax.random.key(setup.source.seed))
  with tempfile.TemporaryDirectory() as folder:
    params = _placed(setup, params)
    return evaluation.evaluate(measured, params, base, folder, {})


def _named(run):
  """(config, folder or None) of what names a run."""
  if isinstance(run, config_dict.ConfigDict):
    return run, None
  folder = load_run(getattr(run, "workdir", run))
  return folder.config, folder.workdir


def _restored(setup, workdir):
  """Parameters of the policy of a folder's last checkpoint."""
  base = trained.initial(setup) if setup.trained.on_base else None
  return setup.trained.model(base, trained.restored(setup, base, workdir))


def _policy(setup, workdir, params):
  """Parameters of the policy that `sample` is asked for."""
  if params is None and workdir is not None:
    return _restored(setup, workdir)
  if params is None:
    return trained.initial(setup)
  own = jax.tree.structure(trained.trained_shapes(setup))
  params = _placed(setup, params)
  if jax.tree.structure(params) != own:  # a policy, grafted already
    return params
  base = trained.initial(setup) if setup.trained.on_base else None
  return setup.trained.model(base, params)


def _placed(setup, params):
  """Parameters on every device of the mesh."""
  return jax.device_put(params, NamedSharding(setup.mesh, PartitionSpec()))
