"""What stages will take, told from their configs before any of them starts.

Nothing is fetched, allocated or compiled. Of a stage

    examples  rows of the data, or prompts, that its batches ask for
    tokens    those it trains on or scores, and those it draws
    FLOPs     needed: models.config.step_flops of its updates; one pass forward
              of a reference, of a reward model of another stage, and of every
              drawn token
    memory    of a device: parameters, gradients and a copy of them, moments
              and reference; where it draws, keys and values too. Activations
              come on top: a run says what it chose when it is built
    hours     FLOPs / (devices · peak · mfu); of drawing with `sampling` for mfu

A source has as many records, of such lengths, as `config.plan.records` says;
one that it does not name is as long as data.max_…_length allows. Held-out
evaluation, scorers of torch and the loading of data are not counted.
"""

from typing import NamedTuple

from ml_collections import config_dict

from dpo_jax import algos
from dpo_jax.models import config as model_config
from dpo_jax.plan import held
from dpo_jax.plan import known as known_lib
from dpo_jax.run import build, feeds


class Stage(NamedTuple):
  """A stage of a config.

  Attributes:
    verb, name: what is done, and its name.
    config: of one run; of a sweep, what its points share.
    points: runs of it.
  """

  verb: str
  name: str
  config: config_dict.ConfigDict
  points: int


class Row(NamedTuple):
  """What a stage takes.

  Attributes:
    stage: Stage.
    examples, tokens: of all its points.
    flops: needed by what is trained and scored.
    drawing: FLOPs needed by what is drawn.
    memory: bytes of a device.
    updates: of each point.
    unknown: why nothing is told; else None.
  """

  stage: Stage
  examples: int = 0
  tokens: int = 0
  flops: float = 0.0
  drawing: float = 0.0
  memory: float = 0.0
  updates: int = 0
  unknown: str | None = None


def rows(stages, options):
  """The Row of each of some Stages.

  Args:
    stages: list of Stage, in their order.
    options: config.plan, see configs/common.py.
  """
  named = {source: tuple(sizes) for source, *sizes in options.records}
  folders = {s.config.get("workdir"): s.config for s in stages}
  known = known_lib.Known(folders, named, options.devices)
  return [_row(stage, known) for stage in stages]


def _row(stage, known):
  if stage.verb not in ("train", "sweep", "sample"):
    return Row(stage)
  if "model" not in stage.config:  # such as a tokenizer's
    return Row(stage)
  try:
    model = known_lib.model_of(stage.config, known)
    if stage.verb == "sample":
      return _sampled(stage, model, known, measured=False)
    row = _trained(stage, model, known)
    if stage.verb == "train" or stage.config.sample.prompts is None:
      return row
    one = _sampled(stage, model, known, measured=True)
    # The reference too is measured on its samples.
    times = stage.points * _checkpoints(stage.config, row.updates) + 1
    more = {
      name: getattr(row, name) + times * getattr(one, name)
      for name in ("tokens", "flops", "drawing")
    }
    return row._replace(**more)
  except ValueError as error:
    return Row(stage, unknown=str(error))


def _checkpoints(config, updates):
  """How many policies of a run are sampled: the last, or all that are kept."""
  if not config.sample.checkpoints:
    return 1
  return min(config.checkpoint.keep, -(-updates // config.checkpoint.every))


def _trained(stage, model, known):
  """The Row of runs that train."""
  c, points = stage.config, stage.points
  algorithm = algos.make(c, apply=None)
  reference = build.reference_of(c, algorithm)
  of = known_lib.data(c.data.train, "data.train", c, known)
  if c.train.steps is None:
    of = known_lib.counted(of, c.data.train)
  if algorithm.data == "prompts":
    return _on_policy(stage, model, known, of, algorithm, reference.in_step)
  completions = 1 if algorithm.data == "sft" else of.completions
  steps = feeds.total_steps(c, of.examples)
  batch = of._replace(
    examples=steps * c.data.batch_size, completions=completions
  )
  flops = points * _updates(c, model, batch, algorithm, reference.in_step)
  if reference.cached:  # of each record once, for all points
    records = batch.examples if of.examples is None else of.examples
    flops += model.forward(batch._replace(examples=records))
  return Row(
    stage,
    examples=points * batch.examples,
    tokens=points * round(batch.tokens),
    flops=flops,
    memory=held.state(c, model, steps, known.devices),
    updates=steps,
  )


def _updates(config, model, batch, algorithm, reference):
  return model_config.step_flops(
    *(*model, batch.counts(model.config, head=algorithm.logps)),
    on_base=config.lora is not None,
    reference=reference,
  )


def _on_policy(stage, model, known, of, algorithm, reference):
  """The Row of runs that train on what they draw."""
  c, points, r = stage.config, stage.points, stage.config.rollout
  minibatches = r.epochs * (r.prompts // c.data.batch_size)
  size = None if of.examples is None else of.examples * r.epochs
  iterations = -(-feeds.total_steps(c, size) // minibatches)
  batch = known_lib.Batch(
    iterations * r.prompts,
    of.prompt if r.prefix is None else sum(r.prefix) / 2,
    c.data.max_completion_length,
    r.draws,
  )
  seen = batch._replace(examples=r.epochs * batch.examples)
  forward = model.forward(batch)
  flops = _updates(c, model, seen, algorithm, reference)
  if algorithm.advantages is not None:  # of policy and reference, once
    flops += 2 * forward
  flops += _scored((r.scorer,), batch, known)
  updates = iterations * minibatches
  state = held.state(c, model, updates, known.devices)
  return Row(
    stage,
    examples=points * batch.examples,
    tokens=points * round(batch.tokens + seen.tokens),
    flops=points * flops,
    drawing=points * forward,
    memory=state + held.cache(model, r.batch_size, batch, known.devices),
    updates=updates,
  )


def _sampled(stage, model, known, *, measured):
  """The Row of draws for `sample.prompts`, of one policy."""
  c, s = stage.config, stage.config.sample
  batch = known_lib.asked(c, known)
  drawing = model.forward(batch)
  flops = _scored(s.scorers, batch, known)
  if measured and s.temperature == 1 and s.top_p == 1:
    flops += 2 * drawing  # the KL, of policy and reference
  return Row(
    stage,
    examples=batch.examples,
    tokens=round(batch.tokens),
    flops=flops,
    drawing=drawing,
    memory=held.drawing(c, model, s.batch_size, batch, known.devices),
  )


def _scored(scorers, batch, known):
  """FLOPs of the scorers that are stages; the others run elsewhere."""
  total = 0.0
  for spec in scorers:
    kind, _, folder = spec.partition(":")
    stage = known.of(folder) if kind == "reward" else None
    if stage is not None:
      total += known_lib.model_of(stage, known).forward(batch, head=False)
  return total
