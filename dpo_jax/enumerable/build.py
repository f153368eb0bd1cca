"""The configs of a study as what its programs take."""

import json

import jax
import numpy as np

from dpo_jax import algos
from dpo_jax.algos import base
from dpo_jax.config import load, saved
from dpo_jax.enumerable import language as language_lib
from dpo_jax.enumerable import programs
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder
from dpo_jax.run import checks, feeds
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import optim

# What decides a run of a study; any other field would have no effect in it.
DECIDES = (
  *("algo", "loss", "ref", "model", "optim", "precision", "workdir"),
  *("language", "study", "train.steps", "data.batch_size", "data.packed"),
  *("rollout.scorer", "rollout.prompts", "rollout.draws", "rollout.epochs"),
  *("rollout.kl_target", "rollout.kl_horizon", "rollout.critic"),
)
SCORERS = ("learned", "true")


def check(config, plain):
  """Refuses what no run of a study can have.

  Args:
    config: of one point.
    plain: {field: its value where nobody sets it}.
  Raises: ValueError naming the field.
  """
  checks.values(config)
  flat = saved.flatten(config.to_dict())
  for name, value in flat.items():
    own = any(name == x or name.startswith(f"{x}.") for x in DECIDES)
    if not own and value != plain[name]:
      raise ValueError(
        f"{name} = {value!r} has no effect in a study of an enumerable "
        f"language: leave it at {plain[name]!r}"
      )
  if config.train.steps is None:
    raise ValueError("train.steps = None: a study needs a number of steps")
  algorithm = algos.make(config, apply=None)
  if algorithm.data != "prompts":
    return
  if config.rollout.scorer not in SCORERS:
    raise ValueError(
      f"rollout.scorer = {config.rollout.scorer!r}: in a study it is one of "
      f"{', '.join(SCORERS)}"
    )
  if algorithm.advantages is None or config.rollout.kl_target is None:
    raise ValueError(
      f"algo = {config.algo!r} with rollout.kl_target = None: a study has "
      "policy gradients with a target KL, set it and rollout.kl_horizon"
    )
  span = config.rollout.epochs * (
    config.rollout.prompts // config.data.batch_size
  )
  if config.train.steps % span:
    raise ValueError(
      f"train.steps = {config.train.steps} is no multiple of the {span} steps "
      "of an iteration"
    )


def language_of(config):
  """The language.Language of a config."""
  return language_lib.make(**config.language.to_dict())


def asked(config):
  """What a report reads of a config, as plain values."""
  return {
    "options": config.study.to_dict(),
    "language": config.language.to_dict(),
  }


def options_of(config):
  """config.study as plain values."""
  return load.plain(config.study)


def programs_of(config, language, made):
  """The programs.Programs of a config.

  Args:
    made: {what is compiled into them: Programs}, those there are already;
      gets what is new. Methods that differ in traced numbers share theirs.
  """
  traced = {"optim.learning_rate", "rollout.kl_target", "rollout.scorer"}
  if config.algo != "policy_gradient":  # its coefficient starts as a constant
    traced |= {f"loss.{name}" for name in base.numeric_fields(config.loss)}
  flat = saved.flatten(config.to_dict())
  key = json.dumps({k: v for k, v in flat.items() if k not in traced})
  if key not in made:
    made[key] = programs.make(_method(config, language))
  return made[key]


def samples_for_truth(config):
  """Whether a method samples for r*, and not for what is learned of it."""
  return config.rollout is not None and config.rollout.scorer == "true"


def _method(config, language):
  shape = model_config.ModelConfig(**config.model.to_dict())
  model = decoder.build(shape, language.words)
  algorithm = algos.make(config, model.apply)
  samples = algorithm.data == "prompts"
  trained = trained_lib.with_heads(
    trained_lib.whole(keeps_reference=samples),
    *(algorithm.heads, model.config.embed, algorithm.copies),
  )
  drawing, count = None, config.data.batch_size
  if samples:
    drawing, count = _drawing(config, algorithm), config.rollout.prompts
  draws = config.rollout.draws if samples else config.study.draws
  said = np.zeros((count, draws, language.length), np.int32)
  examples = language_lib.examples_of(np.arange(count) % language.prompts, said)
  pairs = 0 if samples else draws * (draws - 1) // 2
  return programs.Method(
    algorithm=algorithm,
    optimizer=optim.make(config.optim, config.train.steps, algorithm.rests),
    trained=trained,
    apply=model.apply,
    init=model.init,
    language=language,
    batch=jax.tree.map(
      jax.numpy.asarray, language_lib.batch_of(examples, pairs)
    ),
    drawing=drawing,
    steps=config.train.steps,
  )


def _drawing(config, algorithm):
  rollout = config.rollout
  return programs.Drawing(
    draws=rollout.draws,
    epochs=rollout.epochs,
    minibatches=rollout.prompts // config.data.batch_size,
    controller=algorithm.update.keywords["controller"],
  )


def hparams_of(config):
  """The traced numbers of a point: {name: f32}."""
  hparams = feeds.hyper_params(config)
  if config.rollout is not None:
    hparams["kl_target"] = jax.numpy.float32(config.rollout.kl_target)
  return hparams
