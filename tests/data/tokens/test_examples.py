"""Examples as flat arrays: the same ones come back, and the same counts."""

import itertools

import numpy as np
import pytest

from configs import base
from dpo_jax.data.batch import loader, rows
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import comparisons, corpus, tokenize
from dpo_jax.data.tokens import examples as examples_lib
from tests import worlds


def of_every_kind():
  """Examples that have, and have not, what an example may have."""
  items = worlds.examples(9, seed=1, completions=4)
  many = items[0]
  return [
    *items,
    many._replace(scores=(1.5, -2.0, 0.1, 1e300)),
    many._replace(labels=(1.0, 0.0, 1.0, 1.0), ended=(True, False, True, True)),
    many._replace(ranking=(3, 0, 1, 2), pairs=((3, 0, 1, 2, 0.5),)),
    many._replace(pairs=((1, 1.0), (0, 0.25)), labels=(0.0, 1.0)),
    many._replace(pairs=(), labels=(), example_id=1 << 40, source=3),
    comparisons.Example(7, 0, [1], ([2],), ()),
  ]


@pytest.fixture(params=[1, 2, 100])
def small_parts(request, monkeypatch):
  """Chunks and steps that examples do, and do not, fill."""
  monkeypatch.setattr(examples_lib, "PER_CHUNK", request.param)
  monkeypatch.setattr(examples_lib, "_PER_STEP", request.param)


def test_what_goes_in_comes_back(small_parts):
  items = of_every_kind()
  found = examples_lib.of(items)
  assert len(found) == len(items)
  assert worlds.plain(found) == items
  behind = [found[k - len(items)] for k in range(len(items))]
  assert worlds.plain(behind) == items
  assert examples_lib.of(found) is found
  for index in (len(items), -len(items) - 1):
    with pytest.raises(IndexError):
      found[index]


def test_ids_come_back_as_views_and_all_else_as_python_numbers():
  found = examples_lib.of([of_every_kind()[9]])
  (example,) = found
  for ids in (example.prompt, *example.completions):
    assert np.shares_memory(ids, found._arrays["tokens"])
  assert {type(x) for x in example.scores} == {float}
  assert type(example.example_id) is type(example.pairs[0][0]) is int


def test_columns_are_what_is_counted_one_by_one(small_parts):
  items = of_every_kind()
  found = examples_lib.of(items).columns
  want = [
    (
      len(e.prompt),
      sum(map(len, e.completions)),
      max(map(len, e.completions)),
      len(e.completions),
      len(e.pairs),
      max((len(pair) - 1 for pair in e.pairs), default=2),
    )
    for e in items
  ]
  np.testing.assert_array_equal(np.transpose(found), want)
  assert {column.dtype for column in found} == {np.dtype(np.int32)}


def test_lengths_are_those_of_the_prompt_and_each_completion():
  items = of_every_kind()
  found = examples_lib.of(items)
  for index, e in enumerate(items):
    want = [len(e.prompt), *map(len, e.completions)]
    assert found.lengths(index).tolist() == want


def test_extras_are_what_all_examples_have():
  one, two = of_every_kind()[9:11]
  both = one._replace(labels=two.labels)
  assert list(examples_lib.of([one, both]).extras) == ["scores"]
  assert not examples_lib.of([one, two]).extras
  found = examples_lib.of([both, both._replace(labels=(1.0,))]).extras
  assert list(found) == ["labels", "scores"]
  for name, values in found.items():
    assert values[0].tolist() == list(getattr(both, name))
  assert found["labels"][1].tolist() == [1.0]


def test_ids_take_two_bytes_where_the_vocabulary_allows_it():
  items = [comparisons.Example(0, 0, [65535], ([0],), ())]
  chunks = examples_lib.chunks(items, examples_lib.token_dtype(1 << 16))
  found = examples_lib.in_memory(chunks)
  assert worlds.plain(found) == items
  assert found._arrays["tokens"].itemsize == 2
  assert examples_lib.token_dtype((1 << 16) + 1) == "<i4"


def of_toy(spec, kind="pairs"):
  options = base.get_config().data
  tokenizer, policy = tokenize.load("bytes"), sources.Policy("error")
  args = spec, "data.train", kind, False, tokenizer, options, policy
  return corpus.load(*args, loud=False).examples


def of_loader(examples, weights=None):
  return loader.Loader(
    examples,
    rows.Layout(True, True, 1, None),
    batch_size=4,
    seed=0,
    budget=1,
    multiple=8,
    weights=weights,
  )


@pytest.mark.parametrize(
  ("spec", "kind", "weights", "tokens", "all_"),
  [
    ("toy:24", "pairs", None, "1e17985dcbc9aa20", "94ef70cc40093a84"),
    ("toy:24", "mismatched", None, "21ba5e5359f5d27b", "affa3ab62d187b74"),
    (
      *("toy:12 + 0.5*toy:30", "pairs", (1.0, 0.5)),
      *("2a35fcef79d0a612", "0b9cdf7df193afdd"),
    ),
  ],
)
def test_fingerprints_are_those_of_earlier_versions(
  spec, kind, weights, tokens, all_
):
  """Run folders and reference stores hold them."""
  batches = of_loader(of_toy(spec, kind), weights)
  count = 42 if weights else 24
  assert batches.token_fingerprint == f"{count} examples, {tokens}"
  assert batches.fingerprint == f"{count} examples, {all_}"


def test_fingerprints_do_not_depend_on_the_chunks(small_parts):
  items = of_every_kind()
  found = examples_lib.of(items)
  assert found.token_fingerprint == "15 examples, " + found._digests[0]
  for parts in (None, ((15, 2.0),)):
    again = examples_lib.of(list(found)).fingerprint(parts)
    assert again == found.fingerprint(parts)
  one_less = [
    examples_lib.of([e for k, e in enumerate(items) if k != out]).fingerprint()
    for out in range(len(items))
  ]
  assert len({found.fingerprint(), *one_less}) == len(items) + 1


@pytest.mark.parametrize(
  ("packed", "shared"), list(itertools.product((True, False), repeat=2))
)
def test_needs_are_those_of_the_lists(packed, shared):
  items = of_every_kind()
  need = rows.needs(items, rows.Layout(packed, shared, 1, None))
  for index, e in enumerate(items):
    sizes = list(map(len, e.completions))
    n, want = len(e.prompt), sum(sizes)
    if shared:
      want += n
    elif packed:
      want += n * len(sizes)
    else:
      want = 4 * (n + max(sizes))
    assert need.length[index] == want
