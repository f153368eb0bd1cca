"""A language of three letters whose every answer can be listed.

Texts of up to two letters behind a prompt, through the project's tokenisation,
rows, transformer and `preference` algorithm: an answer is closed by the EOS or
cut at two tokens, so the answers are all there is and their probabilities sum
to one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from configs import base as base_config
from dpo_jax import tree
from dpo_jax.algos import base, preference
from dpo_jax.data.read import records
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder
from dpo_jax.ops import reduce
from tests import worlds

LETTERS = "abc"
EOS = len(LETTERS)
LONGEST = 2  # tokens of an answer, EOS included
PROMPTS = ("abc", "ca")
TEXTS = [
  "".join(letters)
  for length in range(LONGEST + 1)
  for letters in itertools.product(LETTERS, repeat=length)
]
TOKENIZER = tokenize.Tokenizer(
  encode=lambda texts: [[LETTERS.index(c) for c in text] for text in texts],
  decode=lambda ids: "".join(LETTERS[i] for i in ids if i != EOS),
  vocab_size=EOS + 1,
  bos_id=None,
  eos_id=EOS,
)


def config():
  """The run's config: DPO against a frozen reference."""
  c = base_config.get_config()
  c.data.max_completion_length = LONGEST
  return c


def batch(wins):
  """The batch of all answers, compared as wins f64[2, K, K] says."""
  every = tuple(itertools.permutations(range(len(TEXTS)), 2))
  found = tokenize.encode_each(
    [records.Record(p, tuple(TEXTS), every, "here") for p in PROMPTS],
    TOKENIZER,
    config().data,
  )
  examples = [
    made.example._replace(pairs=tuple((i, j, weight[i, j]) for i, j in every))
    for made, weight in zip(found, wins, strict=True)
  ]
  # A row each, so that row and prompt are one.
  return worlds.batch(examples, packed=False)


@functools.cache
def model():
  """(decoder.Model, parameters of a policy that has its preferences)."""
  built = decoder.build(model_config.PRESETS["micro"], TOKENIZER.vocab_size)
  return built, worlds.noisy(jax.jit(built.init)(jax.random.key(0)), 1)


def everything_compared():
  """wins f64[2, K, K]: each answer beats each other as often."""
  size = len(TEXTS)
  return np.full((len(PROMPTS), size, size), 1 / (size * (size - 1)))


def algorithm_of(built):
  """The Algorithm of `config` for a model."""
  return preference.make(config(), built.apply)


def log_policy(params, rows):
  """log π f64[2, K] of all answers, as the losses of `rows` read them."""
  algorithm = algorithm_of(model()[0])

  @jax.jit
  def features(params, rows):
    rows = algorithm.prepare(rows, {"ref": params}, {})
    moving, _ = algorithm.features(params, {}, rows, {}, base.rng_of(0))
    return moving["policy_logps"]

  pairs, found = rows["pairs"], np.asarray(features(params, rows), float)
  out = np.full((len(pairs), len(TEXTS)), np.nan)
  for row, of_row, logps in zip(out, pairs, found, strict=True):
    row[of_row] = logps
  return out


def answers_sum_to_one():
  """Σ over all answers of a prompt of exp(log π) = 1."""
  _, params = model()
  logps = log_policy(params, batch(everything_compared()))
  # f32 log-probs of two tokens: 1e-7 seen.
  assert np.abs(np.exp(logps).sum(-1) - 1).max() < 1e-5


def weights_shared():
  """One tree as policy and as reference: the gradient is the policy's alone."""
  built, params = model()
  rng = np.random.default_rng(0)
  rows = batch(rng.random(everything_compared().shape))
  algorithm = algorithm_of(built)
  hparams = {"beta": 0.5, "label_smoothing": 0.0}

  def loss(params, ref):
    prepared = algorithm.prepare(rows, {"ref": ref}, {})
    terms = algorithm.objective(params, {}, prepared, hparams)
    return reduce.means(terms.losses)["dpo"]

  @jax.jit
  def gradients(params):
    return jax.grad(lambda x: loss(x, x))(params), jax.grad(loss)(
      params, params
    )

  shared, apart = gradients(params)
  difference = tree.norm(jax.tree.map(jnp.subtract, shared, apart))
  assert tree.norm(apart) > 1e-3
  # The same sums in f32.
  assert difference < 1e-5 * tree.norm(apart)
