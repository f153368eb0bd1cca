"""What is known of models and data before either is there."""

import dataclasses
from typing import NamedTuple

from dpo_jax.data.read import sources
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import config as model_config
from dpo_jax.run import model as model_lib


class Batch(NamedTuple):
  """Some examples of one length.

  Attributes:
    examples: prompts.
    prompt, completion: tokens of each.
    completions: of each prompt.
  """

  examples: float
  prompt: float
  completion: float
  completions: int

  @property
  def tokens(self):
    return self.examples * (self.prompt + self.completions * self.completion)

  def counts(self, config, *, head=True):
    """(tokens, scored, visible), as models.config.matmul_flops takes them."""
    scored = self.examples * self.completions * self.completion
    prompt, whole = (_seen(config, n) for n in (self.prompt, self.whole))
    visible = self.examples * (prompt + self.completions * (whole - prompt))
    return self.tokens, scored if head else 0, visible

  @property
  def whole(self):
    return self.prompt + self.completion


def _seen(config, length):
  """Keys that all queries of a causal sequence see, in all layers."""
  near = [length if w is None else min(length, w) for w in config.windows]
  return sum(n * (n + 1) / 2 + (length - n) * n for n in near)


class Model(NamedTuple):
  """A shape, its vocabulary, and what else a stage's work depends on.

  Attributes:
    config: ModelConfig.
    vocab_size: real tokens.
  """

  config: model_config.ModelConfig
  vocab_size: int

  def forward(self, batch, *, head=True):
    """FLOPs of one pass forward over a Batch."""
    counts = batch.counts(self.config, head=head)
    return sum(model_config.matmul_flops(*self, *counts))


class Known(NamedTuple):
  """What is known beside a stage's own config.

  Attributes:
    stages: {workdir: config} of all stages.
    records: {source: (records, prompt tokens, completion tokens)}.
    devices: how many there are.
  """

  stages: dict
  records: dict
  devices: int

  def of(self, folder):
    """The config of the stage that a folder is of, or of a sweep's point."""
    parent = str(folder).rpartition("/")[0]
    return self.stages.get(folder) or self.stages.get(parent)


def model_of(config, known):
  """The Model of a stage; ValueError if its shape is out of reach."""
  fields = config.model.to_dict()
  if set(fields) - set(model_config.RUNTIME):
    shape = model_config.ModelConfig(**fields)
    return Model(shape, _vocabulary(config.tokenizer, known))
  earlier = config.init_from and known.of(config.init_from)
  if earlier:
    own, vocab_size = model_of(earlier, known)
  else:
    own, vocab_size = model_lib.known_shape(config.init_from)
  fields["unroll"] = min(fields["unroll"], own.periods)
  return Model(dataclasses.replace(own, **fields), vocab_size)


def _vocabulary(name, known):
  """Tokens of a tokenizer, also of one that a stage will train."""
  stage = known.of(name)
  if stage and "vocab_size" in stage:
    return stage.vocab_size
  if name.startswith("hf:"):
    return model_lib.known_shape(name)[1]
  return tokenize.load(name).vocab_size


def data(spec, field, config, known):
  """The Batch of a data set of comparisons; examples are None if not known."""
  parts = sources.parse(spec, field)
  sizes = [(w, _part(source, config, known)) for w, source in parts]
  longest = config.data.max_prompt_length, config.data.max_completion_length
  counts = [part.examples for _, part in sizes]
  if None in counts:
    return sizes[0][1]._replace(examples=None)
  total = sum(w * n for (w, _), n in zip(sizes, counts, strict=True))

  def mean(name, most):
    values = (w * x.examples * getattr(x, name) for w, x in sizes)
    return min(most, sum(values) / total)

  return Batch(
    round(total),
    mean("prompt", longest[0]),
    mean("completion", longest[1]),
    sizes[0][1].completions,
  )


def _part(source, config, known):
  """The Batch of a source that is no mixture."""
  limits = config.data.max_prompt_length, config.data.max_completion_length
  folder, _, file = source.rpartition("/")
  stage = known.of(folder) if file == "pairs.jsonl" else None
  if stage is not None:
    return asked(stage, known)
  if source in known.records:
    records, *lengths = known.records[source]
    return Batch(records, *lengths, 2)
  about = sources.identity(source) if sources.is_here(source) else None
  return Batch(about and about.rows, *limits, 2)


def asked(config, known):
  """The Batch that config.sample asks for: its draws have the full length."""
  s = config.sample
  of = data(s.prompts, "sample.prompts", config, known)
  count = s.count if of.examples is None else min(s.count, of.examples)
  prompt = of.prompt if s.prefix is None else sum(s.prefix) / 2
  prompt += s.shots * (of.prompt + of.completion)
  prompt = min(prompt, config.data.max_prompt_length)
  return Batch(count, prompt, s.max_new_tokens, s.draws)


def counted(batch, spec):
  """The Batch; ValueError if the number of its examples is not known."""
  if batch.examples is None:
    raise ValueError(
      f"how many records {spec} has is not known before it is read: name it in "
      "config.plan.records, or set train.steps"
    )
  return batch
