"""What all methods of a seed start from: reference, comparisons, rewards."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.algos import base, reward
from dpo_jax.enumerable import language as language_lib
from dpo_jax.enumerable import programs

TRUE = "true"  # the labels of methods that sample for r*
_HELD_OUT = 4000  # pairs on which a reward model is measured


class World(NamedTuple):
  """A seed's.

  Attributes:
    seed: of everything in it.
    params: of the reference.
    log_ref: f32[X, A].
    data: {labels: {name of a batch: [G, …]}} of the comparisons.
    scores: {labels: f32[X, A]} of the reward model that learned from them, and
      of r*, "true"; mean 0 for each prompt and spread 1 under the reference.
    accuracy: {labels: share of fresh pairs that the reward model orders as r*
      does}.
  """

  seed: int
  params: dict
  log_ref: np.ndarray
  data: dict
  scores: dict
  accuracy: dict


def blocks(items, size):
  """Yields (`size` items, how many of them count): the last is filled up."""
  for start in range(0, len(items), size):
    block = list(items[start : start + size])
    yield block + block[:1] * (size - len(block)), len(block)


def stacked(trees):
  """One tree whose leaves have an axis of lanes."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def lane(tree, number):
  """The tree of one lane."""
  return jax.tree.map(lambda x: x[number], tree)


def order_of(groups, method, seed):
  """i32[steps, R]: the groups of each step, shuffled anew for each epoch."""
  rng = np.random.default_rng([seed, 1])
  size = method.batch["tokens"].shape[0]
  epochs = -(-method.steps * size // groups)
  order = np.concatenate([rng.permutation(groups) for _ in range(epochs)])
  return order[: method.steps * size].reshape(-1, size).astype(np.int32)


def hparams_of(many):
  """{name: f32[lanes]} of {name: number} of each lane."""
  return {k: jnp.asarray([each[k] for each in many]) for k in many[0]}


class Stage(NamedTuple):
  """What is trained before the methods: reference, or reward model.

  Attributes:
    programs: programs.Programs.
    hparams: {name: f32} of its config.
  """

  programs: programs.Programs
  hparams: dict


def make(language, stages, options, seeds):
  """The Worlds of seeds.

  Args:
    stages: {"reference": Stage, "reward": Stage}.
    options: of config.study.
  """
  references = _references(language, stages["reference"], options, seeds)
  compared = {
    (seed, labels): language_lib.compared(
      *(language, log_ref),
      groups=options.groups,
      draws=options.draws,
      labels=labels,
      scale=options.label_scale,
      seed=seed,
    )
    for seed, (_, log_ref) in zip(seeds, references, strict=True)
    for labels in options.labels
  }
  method = stages["reference"].programs.method
  data = _data(method, options, seeds, references, compared)
  worlds = []
  for seed, (params, log_ref) in zip(seeds, references, strict=True):
    own = {labels: data[seed, labels] for labels in options.labels}
    true = centred(language.reward, log_ref)
    worlds.append(World(seed, params, log_ref, own, {TRUE: true}, {}))
  for labels in options.labels:
    _learn_rewards(language, stages["reward"], options, worlds, labels)
  return worlds


def _references(language, stage, options, seeds):
  """[(params, log π_ref)] of seeds: fitted to demonstrations."""
  method, run = stage.programs.method, stage.programs
  init = jax.jit(jax.vmap(lambda seed: method.init(jax.random.key(seed))))
  out = []
  said = language_lib.answers(language.words, language.length)
  for block, count in blocks(seeds, options.lanes):
    data = []
    for seed in block:
      prompts, drawn = language_lib.draw(
        *(language, language.demonstrations, options.groups, options.draws),
        np.random.default_rng([seed, 0]),
      )
      tokens = _tokens(prompts, said[drawn])
      order = order_of(options.groups, method, seed)
      data.append({"tokens": tokens, "order": order})
    params = init(jnp.asarray(block))
    states = run.begin(params, jnp.asarray(block))
    hparams = hparams_of([stage.hparams] * len(block))
    states = run.advance(states, stacked(data), hparams, 0, method.steps)
    fitted = jax.device_get((states.params, run.log_policies(states)))
    out += [lane(fitted, number) for number in range(count)]
  return out


def _tokens(prompts, said):
  return language_lib.batch_of(language_lib.examples_of(prompts, said), 0)[
    "tokens"
  ]


def _data(method, options, seeds, references, compared):
  """{(seed, labels): arrays of all groups}, with the reference's log-probs."""
  out = {}

  def token_logps(params, batch, tokens):
    return base.token_logps(method.apply, params, batch | {"tokens": tokens})

  compiled = jax.jit(jax.vmap(token_logps, in_axes=(0, None, 0)))
  params = dict(zip(seeds, (params for params, _ in references), strict=True))
  first = options.labels[0]
  for block, count in blocks(seeds, options.lanes):
    groups = [compared[seed, first] for seed in block]
    batches = [
      language_lib.batch_of(language_lib.examples_of(g.prompts, g.said), 0)
      for g in groups
    ]
    tokens = np.stack([batch["tokens"] for batch in batches])
    ref = compiled(stacked([params[s] for s in block]), batches[0], tokens)
    for number, seed in enumerate(block[:count]):
      for labels in options.labels:
        groups = compared[seed, labels]
        out[seed, labels] = {
          "tokens": tokens[number],
          "ref_token_logps": np.asarray(ref[number]),
          "pairs": groups.pairs,
          "weights": groups.weights,
          "wins": _wins(groups, options.draws),
        }
  return out


def _wins(groups, draws):
  """f32[G, 1, K]: comparisons that each answer of a group won."""
  winner = groups.pairs[..., 0][..., None] == np.arange(draws)
  return np.sum(winner * groups.weights[..., None], axis=1)[:, None]


def data_of(method, world, labels):
  """What a lane's program takes of a World, see programs.advance."""
  if method.drawing is not None:
    rng = jax.random.key_data(jax.random.key(world.seed))
    return {"scores": world.scores[labels], "rng": np.asarray(rng)}
  given = world.data[labels]
  data = {k: v for k, v in given.items() if k != "wins"}
  if method.algorithm.data == "sft":
    data["completion_weights"] = given["wins"]
  order = order_of(len(data["tokens"]), method, world.seed)
  return data | {"order": order}


def centred(scores, log_ref):
  """Scores of mean 0 for each prompt, and of spread 1, under a reference."""
  p = np.exp(np.float64(log_ref))
  moved = scores - np.sum(p * scores, axis=-1, keepdims=True)
  spread = np.sqrt(np.sum(p * moved**2, axis=-1).mean())
  return np.float32(moved / spread)


def _learn_rewards(language, stage, options, worlds, labels):
  """Trains a reward model for each World, into its scores and accuracy."""
  method, run = stage.programs.method, stage.programs
  said = language_lib.answers(language.words, language.length)
  every = np.tile(said, (language.prompts, 1))
  prompts = np.repeat(np.arange(language.prompts), len(said))
  examples = language_lib.examples_of(prompts, every[:, None])
  batch = language_lib.batch_of(examples, 0)

  def scores(params):
    return reward.rewards(method.apply, params, batch).reshape(
      language.prompts, -1
    )

  scores = jax.jit(jax.vmap(scores))
  for block, count in blocks(worlds, options.lanes):
    params = stacked([world.params for world in block])
    seeds = jnp.asarray([world.seed for world in block])
    states = run.begin(params, seeds)
    data = stacked([data_of(method, world, labels) for world in block])
    hparams = hparams_of([stage.hparams] * len(block))
    states = run.advance(states, data, hparams, 0, method.steps)
    learned = np.asarray(scores(states.params))
    for world, own in zip(block[:count], learned, strict=False):
      world.scores[labels] = centred(own, world.log_ref)
      world.accuracy[labels] = _accuracy(language, world, own)


def _accuracy(language, world, scores):
  """Share of fresh pairs of the reference's that are ordered as r* does."""
  rng = np.random.default_rng([world.seed, 2])
  prompts, drawn = language_lib.draw(language, world.log_ref, _HELD_OUT, 2, rng)
  true, learned = (
    np.diff(values[prompts[:, None], drawn], axis=-1)[:, 0]
    for values in (language.reward, scores)
  )
  right = 0.5 * (1 + np.sign(true) * np.sign(learned))
  return float(right[true != 0].mean())
