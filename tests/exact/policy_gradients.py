"""Policy gradients where every answer can be listed: the expectation is a sum.

Texts of up to two letters behind a prompt, as in `language`, through rows,
transformer and the `policy_gradient` algorithm. A batch holds all answers, or
all groups of K of them, each weighted with its probability, so that what is
the mean over samples in a run is the exact expectation here.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import base as base_config
from configs import common
from dpo_jax import tree
from dpo_jax.algos import base, policy_gradient
from dpo_jax.data.batch import rows
from dpo_jax.data.tokens import comparisons
from dpo_jax.eval import rollouts
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder
from dpo_jax.ops import reduce
from dpo_jax.ops.rl import advantages as advantages_lib
from dpo_jax.run import trained
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib
from tests import worlds
from tests.exact import world as world_lib

LETTERS, END, LONGEST = (0, 1), 2, 2
# Each of both letters: of one alone, all states behind it would be the same.
PROMPTS = ([0, 1, 1], [1, 0])
ANSWERS = [
  [*letters, *[END] * (length < LONGEST)]
  for length in range(LONGEST + 1)
  for letters in itertools.product(LETTERS, repeat=length)
]
MASK = np.arange(LONGEST) < np.asarray([[len(a)] for a in ANSWERS])
# Whether two answers begin alike, up to token t: bool[answer, t, answer].
ALIKE = np.asarray(
  [
    [[b[:t] == a[:t] and len(b) > t for b in ANSWERS] for t in range(LONGEST)]
    for a in ANSWERS
  ]
)
BETA = 0.5
REWARDS = np.random.default_rng(0).normal(size=(len(PROMPTS), len(ANSWERS)))
LAYOUT = rows.Layout(False, True, 1, None)


def config(name, **changes):
  """A config of an estimator, of one step an iteration; sums of completions.

  **changes: of config.loss and of config.rollout, by their names.
  """
  c = base_config.get_config()
  c.loss, c.rollout = common.policy_gradient(name), common.rollout(name)
  c.loss.beta, c.loss.average, c.loss.whiten = BETA, "sums", "none"
  if name == "ppo":
    c.rollout.critic = "copy"  # so that its loss leaves the policy alone
  if name == "grpo":
    c.loss.scale = "none"
  c.rollout.prompts = c.data.batch_size = len(PROMPTS)
  c.rollout.epochs = 1
  for field, value in changes.items():
    with c.ignore_type():
      section = c.loss if field in c.loss else c.rollout
      section[field] = value
  return c


class Groups(NamedTuple):
  """All that can be drawn for the prompts.

  Attributes:
    batch: of rows, a group each.
    prompt: i32[B] of PROMPTS.
    members: i32[B, K] of ANSWERS.
  """

  batch: dict
  prompt: np.ndarray
  members: np.ndarray


def groups(count):
  """Groups of `count` answers: all tuples; None is one group of them all."""
  everything = range(len(ANSWERS))
  each = [tuple(everything)]
  if count is not None:
    each = list(itertools.product(everything, repeat=count))
  return of_members(
    np.repeat(np.arange(len(PROMPTS)), len(each)),
    np.asarray(each * len(PROMPTS)),
  )


def of_members(prompt, members):
  """The Groups of some answers, i32[B, K]."""
  examples = [
    comparisons.Example(
      *(number, 0, PROMPTS[x], tuple(ANSWERS[y] for y in group), ()),
      scores=tuple(float(REWARDS[x, y]) for y in group),
      ended=tuple(ANSWERS[y][-1] == END for y in group),
    )
    for number, (x, group) in enumerate(zip(prompt, members, strict=True))
  ]
  return Groups(
    worlds.batch(examples, packed=False), np.asarray(prompt), members
  )


@functools.cache
def model():
  """(decoder.Model, parameters of the reference)."""
  built = decoder.build(model_config.PRESETS["micro"], END + 1)
  return built, worlds.noisy(jax.jit(built.init)(jax.random.key(0)), 1)


def initial(algorithm, seed=2):
  """Parameters of a policy that is not the reference, with heads and copies."""
  built, ref = model()
  whole = trained.with_heads(
    trained.whole(keeps_reference=True),
    algorithm.heads,
    built.config.embed,
    algorithm.copies,
  )
  params = whole.init(worlds.noisy(ref, seed, 0.05), jax.random.key(0))
  if "value" in params:  # a critic that says something
    params["value"] = worlds.noisy(params["value"], seed + 1, 0.3)
  return params


def policy():
  """The policy of `initial`, whatever it is trained with."""
  return initial(algorithm_of(config("reinforce")))


def policy_of(params):
  """The model's parameters."""
  return params["model"] if "value" in params else params


def algorithm_of(c):
  return policy_gradient.make(c, model()[0].apply)


def numbers(c):
  """hparams of a config."""
  values = base.numeric_fields(c.loss)
  return {name: jnp.float32(value) for name, value in values.items()}


# ── From rows to answers and back ────────────────────────────────────────────


def places(of):
  """(i32[B, K, N] into the scored tokens of a row; mask of those)."""
  mask = MASK[of.members]
  order = np.cumsum(mask.reshape(len(mask), -1), axis=1) - 1
  return np.where(mask, order.reshape(mask.shape), 0), mask


def padded(values, of):
  """f32[B, K, N] of f32[R, S]."""
  index, mask = places(of)
  taken = jnp.take_along_axis(values, index.reshape(len(index), -1), axis=1)
  return jnp.where(mask, taken.reshape(index.shape), 0.0)


def flat(values, of):
  """f32[R, S] of f32[B, K, N]: the inverse."""
  index, mask = places(of)
  out = np.zeros(of.batch["target_slot"].shape, int)
  for row, places_of, there in zip(out, index, mask, strict=True):
    row[places_of[there]] = np.flatnonzero(there)
  taken = jnp.take_along_axis(values.reshape(len(out), -1), out, axis=1)
  return jnp.where(base.scored_mask(of.batch), taken, 0.0)


def log_policy(params, temperature=None):
  """log π f32[X, Y] of all answers, differentiable."""
  everything = groups(None)
  hidden, head = model()[0].apply(params, everything.batch)
  head = head.replace(temperature=temperature)
  logps = base.head_logps((hidden, head), everything.batch)
  return jnp.sum(padded(logps, everything), axis=-1)


# ── An iteration, as the feed makes it ───────────────────────────────────────


def exact_values(rewards, logps):
  """V of the tokens of all answers f32[X, Y, N]: the mean of what follows."""
  to_go, _ = advantages_lib.reinforce(rewards, MASK[None], gamma=1.0)
  share = ALIKE * jnp.exp(logps)[:, None, None]  # [X, Y, N, Y]
  total = jnp.einsum("xyns,xsn->xyn", share, to_go)
  return total / jnp.maximum(share.sum(-1), 1e-30)


def learned_from(algorithm, hparams, params, ref, extra, of, exact=False):
  """The batch of a step: log-probs, advantages, and probabilities as weights.

  Args:
    of: Groups.
    exact: the values are those of the policy, instead of the critic's.
  """
  trees = params, {"ref": ref}, extra
  tokens = rollouts.measured(algorithm, hparams, *trees, of.batch)
  drawn = {name: padded(x, of) for name, x in tokens.items()}
  mask, scores = places(of)[1], jnp.float32(REWARDS)
  logps = jnp.sum(drawn["old_logps"], axis=-1)
  if exact:  # `of` is everything, in the order of the answers
    rewards = advantages_lib.token_rewards(
      *(scores, drawn["old_logps"], drawn["ref_token_logps"], mask),
      beta=extra["coefficient"],
    )
    drawn["values"] = exact_values(rewards, logps)
    tokens = {**tokens, "values": flat(drawn["values"], of)}
  scores = scores[of.prompt[:, None], of.members]
  made = algorithm.advantages(scores, drawn, mask, extra)
  weights = jnp.exp(logps)
  if of.members.shape[1] != len(ANSWERS):  # of the tuple
    weights = jnp.broadcast_to(
      jnp.prod(weights, axis=1, keepdims=True), weights.shape
    )
  return {
    **of.batch,
    **tokens,
    **{name: flat(x, of) for name, x in made.items()},
    "scores": scores[:, None],
    "gaps": jnp.zeros_like(weights)[:, None],
    "completion_weights": weights[:, None],
  }


def loss_gradient(c, of, *, exact=False, weights=None, term=None):
  """∇ of the loss for all that is trained, at a policy beside the reference.

  Args:
    c: config.
    of: Groups.
    exact: see `learned_from`.
    weights: f32[B, K] of the completions, instead of their probabilities.
    term: of the loss, by name; None is all of it.
  """
  algorithm, hparams = algorithm_of(c), numbers(c)
  ref, params = model()[1], initial(algorithm)

  @jax.jit
  def compute(params):
    extra = algorithm.extra(params)
    batch = learned_from(algorithm, hparams, params, ref, extra, of, exact)
    batch = jax.lax.stop_gradient(batch)
    if weights is not None:
      batch["completion_weights"] = jnp.asarray(weights)[:, None]

    def loss(params):
      prepared = algorithm.prepare(batch, {"ref": ref}, extra)
      terms = algorithm.objective(params, {}, prepared, hparams, extra)
      means = reduce.means(terms.losses)
      return sum(means.values()) if term is None else means[term]

    return jax.grad(loss)(params)

  return compute(params)


def policy_gradient_of(c, *args, **options):
  """`loss_gradient` for the policy's own parameters."""
  return policy_of(loss_gradient(c, *args, **options))


@functools.cache
def exact_gradient(temperature=None):
  """−∇(E[r] − β KL) at the same policy."""
  compute = jax.grad(lambda x: -exact_objective(x, model()[1], temperature))
  return jax.jit(compute)(policy())


def exact_objective(params, ref, temperature=None):
  """E[r] − β KL of the prompts, by enumeration."""
  logps, ref = (log_policy(x, temperature) for x in (params, ref))
  values = REWARDS - BETA * (logps - jax.lax.stop_gradient(ref))
  return jnp.sum(jnp.exp(logps) * values) / len(PROMPTS)


def distance(got, want):
  """‖got − want‖ / ‖want‖."""
  difference = jax.tree.map(jnp.subtract, got, want)
  return float(tree.norm(difference) / tree.norm(want))


# ── Training on the expectation ──────────────────────────────────────────────


def train(c, count, *, steps, rate, exact=False):
  """The policy's log π f64[X, Y] after training, and the last metrics.

  The run's own step; what its feed would draw is all there is to draw.
  """
  algorithm, hparams = algorithm_of(c), numbers(c)
  of, ref, params = groups(count), model()[1], initial(algorithm_of(c))
  options = common.optim("adamw")
  options.update({"warmup": 0, "schedule": "linear"})
  optimizer = optim.make(options, steps)
  state = state_lib.create(
    params, optimizer, {"ref": ref}, algorithm.extra(params)
  )
  body = step_lib.make(algorithm, optimizer, accumulation=1, axis_name=None)
  hparams["learning_rate"] = jnp.float32(rate)

  @functools.partial(jax.jit, donate_argnums=0)
  def iteration(state, frozen):
    state = state.replace(frozen=frozen)
    batch = learned_from(
      *(algorithm, hparams, state.params, ref, state.extra, of, exact)
    )
    state, metrics = body(state, batch, hparams)
    return state.replace(frozen={}), metrics

  frozen = state.frozen
  state = jax.tree.map(jnp.copy, state.replace(frozen={}))
  for _ in range(steps):
    state, metrics = iteration(state, frozen)
  return answer_logps(policy_of(state.params)), metrics


_answer_logps = jax.jit(log_policy)


def answer_logps(params):
  """`log_policy` as f64."""
  return np.asarray(_answer_logps(params), float)


@functools.cache
def log_ref():
  """log π_ref f64[X, Y]."""
  return answer_logps(model()[1])


def optimum(beta=BETA):
  """log π* = log π_ref + r/β − log Z, f64[X, Y]."""
  return world_lib.normalised(log_ref() + REWARDS / beta)
