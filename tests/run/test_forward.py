"""Log-probs and KL over data sets."""

import functools

import jax
import numpy as np
import pytest

from dpo_jax.config import load as load_lib
from dpo_jax.run import build, forward, trained
from tests import conftest, worlds

ITEMS = worlds.examples(22, seed=3, completions=4)
LENGTH = 24  # of prompt and completion, at most
CHUNKED_SPLIT = ("model.head_chunk=5", "mesh.fsdp=2", "mesh.tensor=2")
LAYOUTS = {
  "packed, shared": (),
  "packed, repeated": ("data.shared=False",),
  "unpacked, shared": ("data.packed=False",),
  "short rows": ("data.max_row_length=40",),
  "chunked head, spread": CHUNKED_SPLIT,
}


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  return load_lib.load_config(config, ("data.batch_size=16", *overrides))


@functools.cache
def prepared(*overrides):
  return build.prepare_model(load(*overrides))


@pytest.fixture(scope="module")
def setup():
  return prepared()


@pytest.fixture(scope="module")
def trees(setup):
  """The parameters of a policy and of its reference."""
  ref = worlds.noisy(jax.device_get(trained.initial(setup)), 1)
  return jax.device_get((worlds.noisy(ref, 2), ref))


@pytest.fixture(scope="module")
def alone(setup, trees):
  """By example: the log-softmax of each tree at its scored tokens, f64[S, V].

  Prompt and completion alone in one decode call, without the batch layout.
  """
  model = setup.model
  decode, cache = jax.jit(model.decode), model.init_cache(1, LENGTH)

  def rows(params, prompt, completion):
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(prompt) + len(completion)] = prompt + completion
    logits, _ = decode(params, ids, np.arange(LENGTH)[None], cache)
    logits = np.asarray(logits[0, :, : model.vocab_size], np.float64)
    top = logits.max(axis=-1, keepdims=True)
    norm = top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    start = len(prompt) - 1  # predicts the first scored token
    return (logits - norm)[start : start + len(completion)]

  return [
    [
      np.concatenate([rows(params, e.prompt, c) for c in e.completions])
      for params in trees
    ]
    for e in ITEMS
  ]


def picked(logps, example):
  """f64[S]: the entries of f64[S, V] of the scored tokens."""
  targets = np.concatenate(example.completions)
  return logps[np.arange(len(targets)), targets]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_each_example_alone(layout, trees, alone):
  setup = prepared(*LAYOUTS[layout])
  loader = forward.loader_of(setup, ITEMS)
  # The last batch is smaller; the first has more examples than rows.
  assert loader.steps == 2
  assert (loader.shapes[-1].per_row > 1) == setup.data.packed
  got = list(forward.token_logps(setup, trees[0], loader))
  assert sorted(index for index, _ in got) == list(range(len(ITEMS)))
  for index, logps in got:
    want = picked(alone[index][0], ITEMS[index])
    # Log-probs of order 5 after two f32 layers.
    np.testing.assert_allclose(logps, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [(), CHUNKED_SPLIT])
def test_kl_is_the_sum_over_the_whole_vocabulary(how, trees, alone):
  setup = prepared(*how)
  loader = forward.loader_of(setup, ITEMS)
  seen = []
  for index, kl, ours, theirs in forward.token_kl(setup, *trees, loader):
    logp, logq = alone[index]
    want = np.sum(np.exp(logp) * (logp - logq), axis=-1)
    # As above; the errors of 257 terms are averaged by π.
    np.testing.assert_allclose(kl, want, rtol=0, atol=1e-5)
    assert kl.min() > 0
    example = ITEMS[index]
    np.testing.assert_allclose(ours, picked(logp, example), rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs, picked(logq, example), rtol=0, atol=1e-5)
    seen.append(index)
  assert sorted(seen) == list(range(len(ITEMS)))


def test_the_kl_between_equal_policies_is_zero(setup, trees):
  loader = forward.loader_of(setup, ITEMS)
  for _, kl, ours, theirs in forward.token_kl(
    setup, trees[1], trees[1], loader
  ):
    # Two passes compiled apart; each log-prob is of order 5.
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
