"""The feed of what a policy samples while it is trained.

    an iteration   completions of some prompts, drawn from the policy as it is,
                   scored, and measured by the training pass
    its steps      epochs × minibatches of them, each epoch in another order

Everything is a pure function of the iteration's number and the state at its
start, so a run that starts again there is given the same batches.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.algos import base
from dpo_jax.data.batch import loader as loader_lib
from dpo_jax.data.batch import order, rows
from dpo_jax.data.tokens import comparisons, tokenize
from dpo_jax.eval import comparing, generate, rewards
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import feed as feed_lib
from dpo_jax.run import forward


class Rollouts(NamedTuple):
  """What was drawn for an iteration, B prompts with K completions each.

  Attributes:
    drawn: list of B·K generate.Draw.
    examples: list of B comparisons.Example, with scores once they are `scored`.
    logps: list of B f32[scored tokens of it] in nats, as they were sampled.
    mask: bool[B, K, N], which tokens there are.
    raw: f64[B, K], what the scorer says of them, once they are `scored`.
  """

  drawn: list
  examples: list
  logps: list
  mask: np.ndarray
  raw: np.ndarray | None = None


class Source(NamedTuple):
  """Where rollouts come from.

  Attributes:
    setup: base.Setup whose `sample` says how to draw.
    prompts: list of (text, ids).
    scorer: rewards.Scorer.
    options: the fields of config.rollout.
    batch_size: prompts of a step.
    room: tokens of the longest prompt.
    layout: rows.Layout.
    shape: the one rows.Shape of all batches.
    measure: compiled (params, frozen, extra, batch) -> {name: f32[R, S]}; None
      where nothing is needed of the tokens.
    advantages: of the algorithm, compiled; or None.
    compares: of the algorithm.
    of_rows: of a scorer of rows, compiled: batch -> f32[R, P, C]; else None.
  """

  setup: object
  prompts: list
  scorer: object
  options: NamedTuple
  batch_size: int
  room: int
  layout: rows.Layout
  shape: rows.Shape
  measure: Callable | None
  advantages: Callable | None
  compares: str | None
  of_rows: Callable | None


def feed(setup, algorithm, options, batch_size, accumulation, hparams):
  """The feed.Feed of an algorithm whose `data` are prompts.

  Args:
    setup: base.Setup; its `data.train` are the prompts.
    algorithm: base.Algorithm of what is trained.
    options: the fields of config.rollout.
    batch_size: prompts of a step.
    accumulation: microbatches of a step.
    hparams: traced scalars of a step.
  Raises: ValueError for what cannot be drawn or scored, before anything is.
  """
  source = _source(setup, algorithm, options, batch_size, accumulation, hparams)
  steps = options.epochs * (options.prompts // batch_size)
  held = {}  # the Loader of the iteration under way

  def batch(number, state):
    iteration, step = divmod(number, steps)
    if step == 0:
      held["loader"] = loader_of(source, state, iteration)
    return feed_lib.place(held["loader"], step, setup.mesh, setup.mode)

  return feed_lib.Feed(
    batch=batch,
    ahead=0,
    boundary=lambda done: done % steps == 0,
    about=(
      f"{setup.data.train}: {len(source.prompts)} prompts; an iteration draws "
      f"{options.draws} for each of {options.prompts}, scored by "
      f"{source.scorer.name}, and has {steps} steps of {batch_size} prompts"
    ),
    shapes=[source.shape],
    fingerprint=_fingerprint(source.prompts),
    epoch=len(source.prompts) * options.epochs,
  )


def _source(setup, algorithm, options, batch_size, accumulation, hparams):
  """The Source of a feed; compiles nothing. Args and Raises: see `feed`."""
  data = setup.data
  drawing = setup.sample._replace(
    prompts=data.train,
    prefix=options.prefix,
    count=np.iinfo(np.int32).max,
    draws=options.draws,
    max_new_tokens=data.max_completion_length,
    temperature=options.temperature,
    top_p=1.0,
    template=None,
    shots=0,
    shots_from=None,
    stop=(),
    batch_size=options.batch_size,
    seed=options.seed,
  )
  setup = setup._replace(sample=drawing)
  prompts = generate.prompts(setup)
  scorer = rewards.load(options.scorer)
  generate.check(setup, [scorer], prompts)
  _try(scorer, setup.tokenizer, prompts)
  if len(prompts) < options.prompts:
    raise ValueError(
      f"rollout.prompts = {options.prompts}, but {data.train} has only "
      f"{len(prompts)} distinct prompts; lower it"
    )
  ways = mesh_lib.row_parallelism(setup.mesh) * accumulation
  layout = rows.Layout(False, data.shared, ways, None)
  kind = comparing.KINDS.get(algorithm.compares)
  room = max(len(ids) for _, ids in prompts)
  shape = rows.limits_shape(
    layout,
    rows=batch_size,
    per_row=1,
    completions=options.draws,
    prompt=room,
    completion=data.max_completion_length,
    pairs=kind.count(options) if kind else 0,
    compared=kind.compared(options) if kind else 2,
    multiple=data.shape_multiple,
  )
  measure = advantages = None
  if algorithm.advantages is not None:
    fn = functools.partial(measured, algorithm, hparams)
    measure = run_lib.forward(fn, setup.mesh)
    advantages = jax.jit(algorithm.advantages)
  where = room, layout, shape, measure, advantages
  of = setup, prompts, scorer, options, batch_size
  of_rows = scorer.rows and run_lib.forward(scorer.rows, setup.mesh)
  return Source(*of, *where, algorithm.compares, of_rows)


def measured(algorithm, hparams, params, frozen, extra, batch):
  """What the training pass says of drawn tokens, {name: f32[R, S]}.

  The same function as a step's, so that the ratio of the first step is 1. An
  iteration of one step is measured too, though its ratio is 1 by itself: what
  it learns from are rewards less β · (log π − log π_ref), and values, that must
  be there before the step. The sampler's log-probs would not do, they are off
  by "sampling/gap"; and without β and a critic one forward pass of the policy
  would be saved, for another program and no gap.
  """
  batch = algorithm.prepare(batch, frozen, extra)
  rng = base.rng_of(0)
  moving, fixed = algorithm.features(params, frozen, batch, hparams, rng)
  renamed = {"old_logps": moving["logps"]}
  renamed["ref_token_logps"] = fixed["ref_token_logps"]
  return renamed | {k: moving[k] for k in ("values",) if k in moving}


def loader_of(source, state, iteration):
  """The Loader of an iteration: its rollouts, ready for its steps."""
  setup, options = source.setup, source.options
  rollouts = scored(source, draw(source, state, iteration))
  examples, compared = rollouts.examples, {}
  if source.compares is not None:
    made = comparing.with_comparisons(examples, source.compares, options)
    examples, compared = made
  seed = np.random.SeedSequence([setup.data.seed, iteration])
  loader = _loader(source, examples, int(seed.generate_state(1)[0]))
  if source.measure is None:
    loader.set_extras({"old_logps": rollouts.logps, **compared})
    return loader
  trees = state.params, state.frozen, state.extra
  tokens = forward.of_examples(setup, source.measure, loader.in_order(), trees)
  drawn = {name: padded_of(x, rollouts.mask) for name, x in tokens.items()}
  learned = source.advantages(
    rewards_of(options, rollouts),
    drawn,
    rollouts.mask,
    jax.device_get(state.extra),
  )
  learned = {
    k: flat_of(np.asarray(x), rollouts.mask) for k, x in learned.items()
  }
  sampled = padded_of(rollouts.logps, rollouts.mask)
  gaps = np.abs(sampled - drawn["old_logps"]).max(axis=-1)
  loader.set_extras({**tokens, **learned, "gaps": gaps})
  return loader


def _loader(source, examples, seed):
  """The Loader of examples in batches of the one shape; seed None: in order."""
  options, steps = source.options, None
  if seed is not None:
    steps = options.epochs * (options.prompts // source.batch_size)
  return loader_lib.Loader(
    examples,
    source.layout,
    batch_size=source.batch_size,
    seed=seed,
    budget=1,
    multiple=source.setup.data.shape_multiple,
    steps=steps,
    windows=source.setup.model.config.windows,
    shapes=[source.shape],
  )


def draw(source, state, iteration):
  """The Rollouts of an iteration, under the policy of a TrainState."""
  setup, options = source.setup, source.options
  start = iteration * options.prompts
  chosen = order.stream(
    start, options.prompts, len(source.prompts), setup.data.seed
  )
  policy = setup.trained.model(state.frozen.get("base"), state.params)
  given = [source.prompts[i] for i in chosen]
  batches = generate.draws(setup, policy, given, first=start, room=source.room)
  drawn = [one for batch in batches for one in batch]
  groups = [
    drawn[i : i + options.draws] for i in range(0, len(drawn), options.draws)
  ]
  examples = [
    comparisons.Example(
      *(number, 0, group[0].prompt_ids),
      completions=tuple(one.ids for one in group),
      pairs=(),
      ended=tuple(one.finished for one in group),
    )
    for number, group in enumerate(groups, start)
  ]
  logps = [np.concatenate([one.logps for one in group]) for group in groups]
  lengths = np.asarray([[len(one.ids) for one in group] for group in groups])
  mask = np.arange(setup.data.max_completion_length) < lengths[..., None]
  return Rollouts(drawn, examples, logps, mask)


def scored(source, rollouts):
  """The Rollouts with scores, and what a missing end costs in them."""
  options, examples = source.options, rollouts.examples
  if source.of_rows is None:
    scores = rewards.of_draws(source.scorer, rollouts.drawn)
  else:
    rows_scored = forward.of_completions(
      source.setup, source.of_rows, _loader(source, examples, None)
    )
    scores = rewards.finite(source.scorer.name, np.concatenate(rows_scored))
  raw = np.asarray(scores).reshape(len(examples), options.draws)
  by_prompt = _with_ends(options, raw, rollouts.drawn).tolist()
  return rollouts._replace(
    raw=raw,
    examples=[
      example._replace(scores=tuple(each))
      for example, each in zip(examples, by_prompt, strict=True)
    ],
  )


def rewards_of(options, rollouts):
  """f32[B, K]: the scores that advantages are made of, of `scored` Rollouts.

  With rollout.centre = "prompt", r − the mean of the prompt's K: the paper's
  E[r] = 0 for every prompt, of the policy that drew. A constant for a missing
  end is then the same distance from what every prompt can get. As each r is in
  its own mean, (K − 1) / K of the differences is learned from. The metrics keep
  the scores as they are: centred, their mean would say nothing.
  """
  raw = rollouts.raw
  if options.centre == "prompt":
    raw = raw - raw.mean(axis=1, keepdims=True)
  return _with_ends(options, raw, rollouts.drawn).astype(np.float32)


def _with_ends(options, scores, drawn):
  """Scores f64[B, K] with what a missing end costs."""
  missing = ~np.asarray([one.finished for one in drawn]).reshape(scores.shape)
  if options.missing_end == "replace":
    return np.where(missing, options.missing_score, scores)
  if options.missing_end == "subtract":
    return scores - np.where(missing, options.missing_score, 0.0)
  return scores


def padded_of(flat, mask):
  """f32[B, K, N] of a list of B f32[tokens of all K]; 0 behind the end."""
  out = np.zeros(mask.shape, np.float32)
  out[mask] = np.concatenate(flat)
  return out


def flat_of(padded, mask):
  """The inverse of `padded_of`."""
  ends = np.cumsum(mask.sum(axis=(1, 2)))[:-1]
  return np.split(padded[mask], ends)


def _fingerprint(prompts):
  """What a run that resumes must find again of its prompts."""
  digest = hashlib.blake2b(repr(prompts).encode(), digest_size=8).hexdigest()
  return f"{len(prompts)} prompts, {digest}"


def _try(scorer, tokenizer, prompts):
  """Refuses a scorer that cannot score, before anything is drawn."""
  if scorer.rows is not None:
    return
  drawn = []
  for number, (text, ids) in enumerate(prompts[:2]):
    again = ids[-1:]  # a completion of one token
    more = tokenize.continuation(tokenizer, ids, again)
    drawn.append(generate.Draw(number, text, ids, more, again, False, [0.0]))
  rewards.of_draws(scorer, drawn)
