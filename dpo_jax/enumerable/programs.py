"""Many runs of one method in one program: a lane each, of a seed and a setting.

The step is that of every other run (train.step), on rows of the one layout; a
loop on the device replaces the feed. What differs between lanes is an argument:
states, data, hparams.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.algos import policy_gradient
from dpo_jax.enumerable import language as language_lib
from dpo_jax.eval import rollouts
from dpo_jax.ops import logprobs
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib


class Method(NamedTuple):
  """What is trained, and how.

  Attributes:
    algorithm: algos.base.Algorithm.
    optimizer: train.optim.Optimizer.
    trained: run.trained.Trained.
    apply: (params, batch) -> (hidden, Head).
    init: key -> parameters.
    language: language.Language.
    batch: rows of one step, or of one iteration: {name: [R, …]}.
    drawing: Drawing of a method that samples; else None.
    steps: of a run.
  """

  algorithm: object
  optimizer: object
  trained: object
  apply: object
  init: object
  language: language_lib.Language
  batch: dict
  drawing: object
  steps: int

  @property
  def span(self):
    """Steps between two states that can be measured."""
    return 1 if self.drawing is None else self.drawing.steps

  @property
  def tokens(self):
    """That are computed in `span` steps, those of sampling too."""
    size = self.batch["tokens"].size
    if self.drawing is None:
      return size
    # L passes draw, two measure, and each epoch learns.
    return size * (self.language.length + 2 + self.drawing.epochs)


class Programs(NamedTuple):
  """A Method with what is compiled of it, over lanes, when it is first called.

  Attributes: method, and see the functions of these names.
  """

  method: Method
  begin: Callable
  advance: Callable
  log_policies: Callable
  measure: Callable


def make(method):
  """The Programs of a Method."""
  log_policies_of = log_policies(method)
  measure_of = measure(method, log_policies_of)
  return Programs(
    method, begin(method), advance(method), log_policies_of, measure_of
  )


class Drawing(NamedTuple):
  """How a method samples.

  Attributes:
    draws: K completions of each prompt.
    epochs: passes over an iteration.
    minibatches: steps of a pass.
    controller: policy_gradient.Controller.
  """

  draws: int
  epochs: int
  minibatches: int
  controller: policy_gradient.Controller

  @property
  def steps(self):
    """Of an iteration."""
    return self.epochs * self.minibatches


def begin(method):
  """Compiles f(params, seeds) -> the TrainStates of lanes at step 0.

  Args of f: params of the references, with an axis of lanes; i32[lanes], of
  heads.
  """

  def create(params, seed):
    trained = method.trained.init(params, jax.random.key(seed))
    trained = jax.tree.map(jnp.copy, trained)  # a step donates it
    frozen = method.trained.frozen(params)
    extra = method.algorithm.extra(trained)
    return state_lib.create(trained, method.optimizer, frozen, extra)

  return jax.jit(jax.vmap(create))


def advance(method):
  """Compiles f(states, data, hparams, start, stop) -> states, over lanes.

  Args of f, the first three with an axis of lanes:
    states: TrainState; donated.
    data: of `offline`: {name of the batch: [G, …]} of all groups, and "order",
      i32[steps, R]: the groups of each step. Of methods that sample: "scores"
      f32[X, A], and "rng", the data of a key.
    hparams: {name: f32}; of methods that sample "kl_target" too.
    start, stop: steps done and to be done; of methods that sample, whole
      iterations.
  """
  one = _offline if method.drawing is None else _iteration
  span = method.span

  def run(state, data, hparams, start, stop):
    def body(number, state):
      return one(method, number, state, data, hparams)

    return jax.lax.fori_loop(start // span, stop // span, body, state)

  lanes = jax.vmap(run, in_axes=(0, 0, 0, None, None))
  return jax.jit(lanes, donate_argnums=0)


def _step(method, algorithm, state, batch, hparams):
  step = step_lib.make(
    algorithm, method.optimizer, accumulation=1, axis_name=None
  )
  return step(state, batch, hparams)[0]


def _offline(method, number, state, data, hparams):
  """The state after step `number` on groups that are there."""
  groups = data["order"][number]
  moving = {k: v[groups] for k, v in data.items() if k != "order"}
  batch = method.batch | moving
  return _step(method, method.algorithm, state, batch, hparams)


def _iteration(method, number, state, data, hparams):
  """The state after iteration `number`: answers are drawn and learned from."""
  drawing, algorithm = method.drawing, method.algorithm
  # The target is a number of the lane, where a run has it in its config.
  controller = drawing.controller._replace(target=hparams["kl_target"])
  algorithm = algorithm._replace(
    update=functools.partial(policy_gradient.follow, controller=controller)
  )
  rng = jax.random.fold_in(jax.random.wrap_key_data(data["rng"]), number)
  batch = _rolled_out(method, algorithm, state, data["scores"], hparams, rng)
  rows = batch["tokens"].shape[0]

  def minibatch(state, chosen):
    part = {name: values[chosen] for name, values in batch.items()}
    return _step(method, algorithm, state, part, hparams), None

  def permuted(epoch):
    return jax.random.permutation(jax.random.fold_in(rng, epoch), rows)

  order = jax.vmap(permuted)(1 + jnp.arange(drawing.epochs))
  order = order.reshape(drawing.steps, -1)
  return jax.lax.scan(minibatch, state, order)[0]


def _rolled_out(method, algorithm, state, scores, hparams, rng):
  """The rows of an iteration, and all that its steps read of them."""
  language, k = method.language, method.drawing.draws
  params = method.trained.model(state.frozen.get("base"), state.params)
  batch = sampled(method, params, rng)
  rows = batch["tokens"].shape[0]
  each = rows, k, language.length
  said = jnp.take_along_axis(batch["tokens"], batch["target_index"], axis=1)
  number = language_lib.number_of(said.reshape(each), language.words)
  scores = scores[batch["tokens"][:, :1], number]
  tokens = rollouts.measured(
    algorithm, hparams, state.params, state.frozen, state.extra, batch
  )
  learned = algorithm.advantages(
    scores,
    {name: values.reshape(each) for name, values in tokens.items()},
    jnp.ones(each, bool),
    state.extra,
  )
  learned = {name: x.reshape(rows, -1) for name, x in learned.items()}
  of_completions = {
    "scores": scores[:, None],
    "gaps": jnp.zeros((rows, 1, k)),
  }
  return batch | tokens | learned | of_completions


def sampled(method, params, rng):
  """The batch of an iteration with answers drawn from a policy, word by word.

  Four passes over rows of a few words cost less than a cache would.
  """
  batch, length = method.batch, method.language.length
  rows = jnp.arange(batch["tokens"].shape[0])[:, None]
  each = len(rows), method.drawing.draws, length
  places = batch["target_index"].reshape(each)
  sources = batch["source_index"].reshape(each)

  def word(t, tokens):
    hidden, head = method.apply(params, batch | {"tokens": tokens})
    at = jnp.take_along_axis(hidden, sources[..., t][..., None], axis=1)
    key = jax.random.fold_in(rng, t)
    drawn = jax.random.categorical(key, logprobs.logits(at, head))
    return tokens.at[rows, places[..., t]].set(drawn.astype(tokens.dtype))

  tokens = jax.lax.fori_loop(0, length, word, batch["tokens"])
  return batch | {"tokens": tokens}


def log_policies(method):
  """Compiles f(states) -> log π f32[lanes, X, A], over lanes."""
  batch = language_lib.prefixes(method.language)

  def log_policy(state):
    params = method.trained.model(state.frozen.get("base"), state.params)
    return language_lib.log_policy(method.language, method.apply, params, batch)

  return jax.jit(jax.vmap(log_policy))


def measure(method, log_policies_of):
  """Compiles f(states, log_ref) -> {"reward", "kl", "entropy"}, over lanes.

  Args of f: states and log_ref f32[X, A], with an axis of lanes.
  """
  reward = method.language.reward
  one = functools.partial(language_lib.measure, reward=reward)

  def of_states(states, log_ref):
    return jax.vmap(one)(log_policies_of(states), log_ref)

  return jax.jit(of_states)
