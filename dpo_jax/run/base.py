"""What a config is built into: plain objects, made once by build.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dpo_jax.algos import base as algorithms
from dpo_jax.models import decoder
from dpo_jax.run import feed as feed_lib
from dpo_jax.run import held_out as held_out_lib
from dpo_jax.run import memory
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import optim


class Programs(NamedTuple):
  """Compiled functions of a model; each compiles when it is first called.

  Attributes:
    init: rng -> all parameters, born sharded.
    token_logps: (params, batch) -> f32[R, S], see run.forward.
    token_kl: (params, reference, batch) -> f32[R, S] three times.
    rewards: (params with a "reward" head, batch) -> f32[R, P, C].
    sample: of models.sample.
  """

  init: Callable
  token_logps: Callable
  token_kl: Callable
  rewards: Callable
  sample: Callable


class Setup(NamedTuple):
  """A model on its devices, before any data.

  Attributes:
    mesh, mode: where and how steps run.
    model: decoder.Model.
    tokenizer: tokenize.Tokenizer.
    trained: trained.Trained.
    source: trained.Source of its base.
    programs: Programs.
    data, sample: the fields of these sections of the config.
    compute: memory.Asked.
    precision: of f32 matmuls.
    asked: the whole config as plain values: what is saved, and compared.
    base: what the run starts from, where it is kept; else None.
  """

  mesh: jax.sharding.Mesh
  mode: str
  model: decoder.Model
  tokenizer: Any
  trained: trained_lib.Trained
  source: trained_lib.Source
  programs: Programs
  data: Any
  sample: Any
  compute: memory.Asked
  precision: str
  asked: dict
  base: Any = None


class Reference(NamedTuple):
  """What a run is compared with.

  Attributes:
    cached: whether its log-probs are computed once and kept on disk,
    store: in this folder, or that of the run where it is None.
    in_step: whether a step computes them.
    kept: whether what the run starts from must stay what it was.
  """

  cached: bool
  store: str | None
  in_step: bool
  kept: bool


class Rhythm(NamedTuple):
  """When a run reports and saves, and what ends it.

  Attributes:
    log, evaluate, save: steps between.
    keep: checkpoints that stay.
    max_noise: largest |reward| at step 0.
    max_skipped: updates in a row that are not finite and end the run.
    reports: the fields of config.log: trackers, and whether to trace.
  """

  log: int
  evaluate: int
  save: int
  keep: int
  max_noise: float
  max_skipped: int
  reports: Any


class Measured(NamedTuple):
  """What is needed to evaluate a policy, without the data it is trained on.

  Attributes: as of Run, which may stand in its place.
  """

  setup: Setup
  held_out: held_out_lib.HeldOut | None
  reference: Reference


class Run(NamedTuple):
  """Everything a config builds, before the first step.

  Attributes:
    setup: Setup.
    feed: feed_lib.Feed of the training data.
    held_out: held_out_lib.HeldOut, or None without data.eval.
    reference: Reference.
    about: lines that say what is trained, and on what.
    total: updates of the run.
    algorithm: algorithms.Algorithm of what is trained.
    optimizer: optim.Optimizer.
    hparams: traced scalars.
    identity: the config and a fingerprint of the data, as plain values: what a
      run that resumes must share.
    rhythm: Rhythm.
    create: compiled (base, rng) -> TrainState at step 0, without `frozen`.
    step: compiled (state, batch, hparams) -> (state, metrics); donates a state.
    stacked_step: (count, whether they share what is frozen) -> the same of
      several runs at once, see run.together; each is built once.
    finish: (trained parameters, frozen part of the state, steps done, folder)
      -> None, for what is left to do when the last step is done; or None.
  """

  setup: Setup
  feed: feed_lib.Feed
  held_out: held_out_lib.HeldOut | None
  reference: Reference
  about: tuple[str, str]
  total: int
  algorithm: algorithms.Algorithm
  optimizer: optim.Optimizer
  hparams: dict
  identity: dict
  rhythm: Rhythm
  create: Callable
  step: Callable
  stacked_step: Callable
  finish: Callable | None = None
