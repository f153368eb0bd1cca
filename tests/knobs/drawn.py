"""What a config draws and learns from, but for the computing.

The sampler draws what its arguments say, and a token's log-probs are what its
id says; the prompts, the scorer, the advantages, the comparisons and the order
are the real ones.
"""

import hashlib
import types
from unittest import mock

import jax
import numpy as np

from dpo_jax.config import load
from dpo_jax.eval import rollouts
from dpo_jax.models import sample as sample_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import rollouts as rules

_ITERATIONS = 2


def digest(*values):
  """Of the content of arrays, or of bytes."""
  out = hashlib.blake2b(digest_size=8)
  for x in values:
    if not isinstance(x, bytes):
      x = np.asarray(x)
      out.update(f"{x.dtype}{x.shape}".encode())
      x = x.tobytes()
    out.update(x)
  return out.hexdigest()


def sampler(calls):
  """A sampler that writes down in `calls` what it is asked for."""

  def draw(params, tokens, lengths, numbers, key, **options):
    arrays = tokens, lengths, numbers, jax.random.key_data(key)
    calls.append((tokens.shape, options, digest(*arrays)))
    rng = np.random.default_rng(int(calls[-1][2], 16))
    shape = len(numbers), options["max_new_tokens"]
    letters = rng.integers(ord("a"), ord("z"), shape, np.int32)
    for row in letters:  # words that a scorer may know
      words = list(rng.choice([b" bad ", b" fun "]))
      row[: len(words)] = words[: shape[1]]
    ends = np.full(len(numbers), shape[1])
    return sample_lib.Samples(letters, ends, ends == 0, np.zeros(shape))

  return draw


def of_run(config, run):
  """(what is asked of the sampler, digests of all batches, the first batch).

  Args:
    config: of rollouts.
    run: base.Run of it.
  """
  rules.check(config, run.algorithm)
  calls, batches, first = [], [], None
  model = types.SimpleNamespace(model=lambda base, trained: None)
  programs = run.setup.programs._replace(sample=sampler(calls))
  setup = run.setup._replace(programs=programs, trained=model)
  options = load.plain(config.rollout)
  hparams = {k: float(v) for k, v in run.hparams.items()}
  with mock.patch.object(run_lib, "forward", _measured(run.algorithm)):
    source = rollouts._source(
      *(setup, run.algorithm, options, config.data.batch_size),
      *(config.train.accumulation, hparams),
    )
  extra = run.algorithm.extra({})
  state = types.SimpleNamespace(params=None, frozen={}, extra=extra)
  steps = options.epochs * (options.prompts // config.data.batch_size)
  with jax.disable_jit():
    for iteration in range(_ITERATIONS):
      loader = rollouts.loader_of(source, state, iteration)
      for number in range(steps):
        batch, stats = loader.batch(number)
        first = batch if first is None else first
        names = sorted(batch)
        batches.append((names, digest(*(batch[k] for k in names)), stats))
  ends = [run.feed.boundary(n) for n in range(3 * steps)]
  about = source.shape, run.feed.fingerprint, ends
  return [calls, batches, about], first


def _measured(algorithm):
  """Stands for run.forward: what the training pass would say of tokens."""
  names = ["old_logps", "ref_token_logps"]
  names += ["values"] if algorithm.heads else []

  def measure(params, frozen, extra, batch):
    ids = np.take_along_axis(
      np.asarray(batch["tokens"]), np.asarray(batch["target_index"]), axis=1
    )
    return {
      name: -np.float32(1 + ids % (7 + number)) / 7
      for number, name in enumerate(names)
    }

  return lambda fn, mesh: measure
