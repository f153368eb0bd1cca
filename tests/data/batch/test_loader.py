"""Batches by number: order, resuming, slices, counts and the worker thread."""

import itertools
import threading
import time

import numpy as np
import pytest

from dpo_jax.data.batch import loader, order, rows
from dpo_jax.data.tokens import comparisons
from dpo_jax.ops import attention
from tests import worlds

LAYOUTS = pytest.mark.parametrize(
  ("packed", "shared"), list(itertools.product((True, False), repeat=2))
)


def make(
  items,
  *,
  packed=True,
  shared=True,
  row_multiple=1,
  max_row=None,
  batch_size=4,
  seed=0,
  budget=3,
  multiple=8,
  steps=None,
  weights=None,
):
  layout = rows.Layout(packed, shared, row_multiple, max_row)
  return loader.Loader(
    items,
    layout,
    batch_size=batch_size,
    seed=seed,
    budget=budget,
    multiple=multiple,
    steps=steps,
    weights=weights,
  )


def of_lengths(lengths):
  """Examples whose two completions have these lengths."""
  return [
    comparisons.Example(n, 0, [1], ([2] * k, [3] * k), ((0, 1, 1.0),))
    for n, k in enumerate(lengths)
  ]


def ids_of(batch):
  """The sorted example ids of a batch; ids of padding left out."""
  real = batch["completion_weights"].any(axis=2)
  return sorted(batch["example_id"][real].tolist())


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name, array in one.items():
    assert array.dtype == other[name].dtype
    np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("seed", [0, 7, None])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_stream_is_one_permutation_after_another(size, seed):
  epochs = [order.stream(e * size, size, size, seed) for e in range(9)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(size))
  whole = np.concatenate(epochs)
  for start, count in itertools.product(range(3 * size), range(1, 5 * size)):
    part = order.stream(start, count, size, seed)
    np.testing.assert_array_equal(part, whole[start : start + count])


def test_the_stream_of_no_examples_is_empty():
  assert order.stream(5, 0, 3, 0).shape == (0,)


def test_the_order_changes_with_the_epoch_and_with_the_seed():
  orders = {
    tuple(order.stream(epoch * 50, 50, 50, seed))
    for epoch, seed in itertools.product(range(3), range(3))
  }
  assert len(orders) == 9


def test_the_stream_far_from_its_start_costs_no_more():
  start = 10**12 + 3  # would not fit in memory if it were walked to
  got = order.stream(start, 6, 4, 0)
  epochs = [order.stream((start // 4 + k) * 4, 4, 4, 0) for k in range(3)]
  np.testing.assert_array_equal(got, np.concatenate(epochs)[3:9])


def parts(*sizes):
  """Examples of a mixture whose parts have these sizes."""
  source = np.repeat(range(len(sizes)), sizes).tolist()
  return [
    e._replace(source=s)
    for e, s in zip(worlds.examples(len(source)), source, strict=True)
  ]


def epochs_of(batches, count):
  """The example indices of the first epochs, i64[count, size]."""
  size = batches.size
  numbers = range(-(-count * size // 4) + 1)
  flat = np.concatenate([batches.indices(n) for n in numbers])
  return flat[: count * size].reshape(count, size)


MIXTURE = (0.5, 2.0, 1.5)  # of parts of 10, 3 and 8: 5 + 6 + 12 an epoch


def test_every_epoch_has_each_part_by_its_weight():
  batches = make(parts(10, 3, 8), weights=MIXTURE)
  assert batches.size == 23
  assert batches.steps == 6
  for epoch in epochs_of(batches, 12):
    seen = np.bincount(epoch, minlength=21)
    assert seen[:10].sum() == 5
    assert seen[:10].max() == 1
    assert seen[10:13].tolist() == [2, 2, 2]
    assert sorted(seen[13:]) == [1] * 4 + [2] * 4


def test_a_share_of_a_part_is_chosen_anew_each_epoch():
  batches = make(parts(10, 3, 8), weights=MIXTURE)
  chosen = [frozenset(e[e < 10].tolist()) for e in epochs_of(batches, 40)]
  assert len(set(chosen)) > 20
  # Each of the ten is in 20 of 40 epochs on average, ±3.2 (one σ).
  counts = [sum(k in c for c in chosen) for k in range(10)]
  assert min(counts) > 6
  assert max(counts) < 34


def test_the_parts_of_a_mixture_are_mixed():
  batches = make(parts(50, 50), weights=(2.0, 1.0))
  (epoch,) = epochs_of(batches, 1)
  first = (epoch[:75] < 50).sum()
  # 100 of 150 are of the first part: 50 of any 75, ±2.9 (one σ).
  assert 36 < first < 64


def test_a_mixture_depends_on_its_seed_and_on_nothing_else():
  items = parts(10, 3, 8)
  walked = make(items, weights=MIXTURE)
  indices = [walked.indices(n).tolist() for n in range(20)]
  for number in reversed(range(20)):  # straddles epochs: 23 is no multiple of 4
    fresh = make(items, weights=MIXTURE)
    assert fresh.indices(number).tolist() == indices[number]
  other = make(items, weights=MIXTURE, seed=1)
  assert [other.indices(n).tolist() for n in range(20)] != indices


def test_a_mixture_gives_bit_equal_batches_when_it_resumes():
  items = parts(10, 3, 8)
  walked = make(items, weights=MIXTURE)
  for number in range(8):
    batch, stats = walked.batch(number)
    again, same = make(items, weights=MIXTURE).batch(number)
    assert_same(batch, again)
    assert stats == same


def test_a_batch_says_which_part_an_example_is_of():
  batches = make(parts(10, 3, 8), weights=MIXTURE, batch_size=23)
  batch, _ = batches.batch(0)
  real = batch["completion_weights"].any(axis=2)
  assert np.bincount(batch["source"][real]).tolist() == [5, 6, 12]


def test_weights_of_one_are_the_order_without_weights():
  items = parts(10, 3, 8)
  plain, weighted = make(items), make(items, weights=(1.0, 1.0, 1.0))
  assert weighted.fingerprint == plain.fingerprint
  for number in range(20):
    np.testing.assert_array_equal(
      weighted.indices(number), plain.indices(number)
    )


def test_the_fingerprint_changes_with_the_weights():
  items = parts(10, 3, 8)
  tables = (None, (2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (0.5, 1.0, 1.0))
  found = {make(items, weights=weights).fingerprint for weights in tables}
  assert len(found) == 4


def test_a_weight_of_two_on_one_source_shows_it_twice_an_epoch():
  batches = make(worlds.examples(5), weights=(2.0,))
  for epoch in epochs_of(batches, 3):
    assert sorted(epoch) == sorted(list(range(5)) * 2)


def test_weights_in_evaluation_are_an_error():
  with pytest.raises(ValueError, match="leave them out of data"):
    make(parts(4, 4), weights=(1.0, 2.0), seed=None)
  assert make(parts(4, 4), weights=(1.0, 1.0), seed=None).size == 8


def test_a_weighted_mixture_can_be_read_once_in_order():
  """As the reference log-probs are."""
  once = make(parts(10, 3, 8), weights=MIXTURE).in_order()
  assert once.size == 21
  indices = np.concatenate([once.indices(n) for n in range(once.steps)])
  assert indices.tolist() == list(range(21))


@pytest.mark.parametrize("weights", [(0.04, 1.0), (1.0, 0.1)])
def test_a_part_that_its_weight_leaves_empty_is_an_error(weights):
  number = 1 + (weights[0] == 1)
  with pytest.raises(ValueError, match=f"part {number} of the mixture"):
    make(parts(10, 3), weights=weights)


@pytest.mark.parametrize("weight", [0, -1.5, float("nan"), float("inf")])
def test_a_weight_must_be_finite_and_above_zero(weight):
  with pytest.raises(ValueError, match="finite and above 0"):
    make(parts(4, 4), weights=(1.0, weight))


def test_batches_straddle_epochs_and_hold_each_example_once_an_epoch():
  batches = make(worlds.examples(10), batch_size=4)
  assert batches.steps == 3
  indices = [batches.indices(n) for n in range(15)]
  assert {len(i) for i in indices} == {4}
  epochs = np.concatenate(indices).reshape(6, 10)
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  for number, want in enumerate(indices):
    batch, _ = batches.batch(number)
    assert ids_of(batch) == sorted(want.tolist())


def test_a_batch_may_be_larger_than_the_epoch():
  batch, stats = make(worlds.examples(3), batch_size=7).batch(0)
  assert stats.examples == 7
  assert set(ids_of(batch)) == {0, 1, 2}


@LAYOUTS
def test_a_fresh_loader_gives_bit_equal_batches(packed, shared):
  items = worlds.examples(24, completions=4)
  walked = make(items, packed=packed, shared=shared)
  for number in range(walked.steps):
    batch, stats = walked.batch(number)
    fresh = make(items, packed=packed, shared=shared)
    again, same = fresh.batch(number)
    assert_same(batch, again)
    assert stats == same


# The first epoch, which the planner samples, spreads these lengths over its
# batches in one way; later ones bring the longest together.
UNEVEN = of_lengths([2, 3, 40, 2, 5, 29, 17, 2, 3, 5, 31, 4, 8])


def unplanned():
  """A loader whose planner saw one batch only."""
  return make(UNEVEN, batch_size=4, budget=1, multiple=1, steps=1)


def test_a_batch_that_fits_no_planned_shape_is_still_built():
  batches = unplanned()
  (planned,) = batches.shapes
  beyond = 0
  for number in range(40):
    batch, stats = batches.batch(number)
    beyond += batch["tokens"].shape[1] > planned.length
    assert ids_of(batch) == sorted(batches.indices(number).tolist())
    assert stats.tokens == np.sum(batch["segment_ids"] > 0)
  assert beyond


def test_a_fresh_loader_agrees_after_batches_that_fit_no_planned_shape():
  walked = unplanned()
  history = [walked.batch(number) for number in range(40)]
  for number, (batch, stats) in enumerate(history):
    again, same = unplanned().batch(number)
    assert_same(batch, again)
    assert stats == same


@LAYOUTS
def test_evaluation_keeps_file_order_and_its_last_batch_is_smaller(
  packed, shared
):
  items = worlds.examples(10, completions=4)
  batches = make(items, packed=packed, shared=shared, seed=None)
  assert batches.steps == 3
  seen = []
  for number, want in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])):
    batch, stats = batches.batch(number)
    assert batches.indices(number).tolist() == ids_of(batch) == want
    assert stats.examples == len(want)
    assert stats.comparisons == sum(len(items[i].pairs) for i in want)
    seen += ids_of(batch)
  assert seen == list(range(10))


@LAYOUTS
@pytest.mark.parametrize("row_multiple", [1, 2])
def test_evaluation_needs_no_shape_beyond_its_plan(
  packed, shared, row_multiple
):
  # Nine batches of 8 and one of 4, which unpacked has half the rows; as the
  # file grows longer line by line, its R·T lies among those of the others.
  batches = make(
    of_lengths(range(2, 78)),
    packed=packed,
    shared=shared,
    row_multiple=row_multiple,
    batch_size=8,
    seed=None,
    multiple=1,
  )
  built = [batches.batch(number)[0] for number in range(batches.steps)]
  shapes = {tuple(x.shape for x in batch.values()) for batch in built}
  assert len(shapes) <= 3


@pytest.mark.parametrize("seed", [0, None])
def test_a_limit_on_row_length_needs_no_shape_beyond_the_plan(seed):
  lengths = np.ceil(np.exp(np.random.default_rng(0).normal(2, 1, 160)))
  batches = make(
    of_lengths(lengths.astype(int)), max_row=64, batch_size=16, seed=seed
  )
  built = [batches.batch(number)[0] for number in range(batches.steps)]
  shapes = {tuple(x.shape for x in batch.values()) for batch in built}
  assert len(shapes) <= 3


@LAYOUTS
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_all_processes_are_the_whole_batch(
  packed, shared, processes
):
  items = worlds.examples(10, completions=4)
  layout = {"packed": packed, "shared": shared, "row_multiple": 4}

  def rows_of(process):
    return lambda count: slice(
      count // processes * process, count // processes * (process + 1)
    )

  # The last batch has two examples: some processes hold only padding.
  for number in range(3):
    whole, stats = make(items, seed=None, **layout).batch(number)
    parts = []
    for process in range(processes):
      own = make(items, seed=None, **layout)  # each process has its loader
      part, same = own.batch(number, rows_of(process))
      assert same == stats
      parts.append(part)
    joined = {k: np.concatenate([p[k] for p in parts]) for k in whole}
    assert_same(joined, whole)


@LAYOUTS
def test_stats_count_what_the_batch_holds(packed, shared):
  items = worlds.examples(18, seed=1, completions=4)
  batches = make(items, packed=packed, shared=shared, row_multiple=2)
  for number in range(batches.steps):
    batch, stats = batches.batch(number)
    slots = batch["completion_weights"][0].size
    mask = attention.visible(
      batch["positions"], batch["segment_ids"], batch["branch_ids"], None
    )
    tokens = int(np.sum(batch["segment_ids"] > 0))
    assert stats == loader.Stats(
      examples=int(np.sum(batch["segment_ids"].max(axis=1))),
      comparisons=int(np.sum(batch["weights"] > 0)),
      tokens=tokens,
      scored=int(np.sum(batch["target_slot"] < slots)),
      visible=int(np.sum(mask)),
      fill=tokens / batch["tokens"].size,
    )


def test_the_promised_fill_is_that_of_the_planned_batches():
  batches = make(worlds.examples(24), row_multiple=2, steps=12)
  built = [batches.batch(n)[0] for n in range(12)]
  tokens = sum(np.sum(b["segment_ids"] > 0) for b in built)
  # A ratio of two whole numbers, both exact: one division on each side.
  assert batches.fill == tokens / sum(b["tokens"].size for b in built)


def numbered(count):
  """Examples whose ids are not their indices, as after skipped records."""
  items = worlds.examples(count, seed=2, completions=4)
  return [e._replace(example_id=3 * e.example_id + 5) for e in items]


def codes_of(example):
  """One number a scored token: which example, completion and position."""
  return [
    10_000 * example.example_id + 100 * c + len(example.prompt) + k
    for c, ids in enumerate(example.completions)
    for k in range(len(ids))
  ]


def codes(batch, padding):
  """The same numbers for [R, S], from the arrays of the batch."""
  _, per_row, completions = batch["completion_weights"].shape
  slot, row = batch["target_slot"], np.arange(len(batch["tokens"]))[:, None]
  real = slot < per_row * completions
  p, c = np.divmod(np.where(real, slot, 0), completions)
  position = batch["positions"][row, batch["target_index"]]
  code = 10_000 * batch["example_id"][row, p] + 100 * c + position
  return np.where(real, code, padding)


@LAYOUTS
@pytest.mark.parametrize("seed", [0, None])
def test_unpack_gives_every_example_its_own_scored_positions(
  packed, shared, seed
):
  items = numbered(10)
  batches = make(items, packed=packed, shared=shared, row_multiple=3, seed=seed)
  for number in range(batches.steps):
    batch, _ = batches.batch(number)
    got = list(batches.unpack(number, codes(batch, padding=-1)))
    want = sorted(batches.indices(number).tolist())
    assert sorted(index for index, _ in got) == want
    for index, values in got:
      assert values.tolist() == codes_of(items[index])


@LAYOUTS
def test_in_order_yields_each_example_once_in_file_order(packed, shared):
  items = numbered(10)
  batches = make(items, packed=packed, shared=shared, seed=3)
  once = batches.in_order()
  assert once.fingerprint == batches.fingerprint
  assert (once.size, once.steps) == (10, 3)
  want = [e.example_id for e in items]
  for number in range(once.steps):
    batch, _ = once.batch(number)
    assert ids_of(batch) == want[4 * number : 4 * number + 4]


def test_counts_are_the_scored_tokens_of_each_example():
  items = numbered(10)
  want = [sum(map(len, e.completions)) for e in items]
  batches = make(items)
  assert batches.counts.tolist() == want
  assert batches.in_order().counts.tolist() == want


@LAYOUTS
def test_set_reference_puts_values_at_the_scored_positions(packed, shared):
  items = numbered(10)
  batches = make(items, packed=packed, shared=shared, row_multiple=3)
  plain, _ = batches.batch(0)
  assert not batches.has_reference
  assert "ref_token_logps" not in plain
  # f32 holds the codes exactly: they are whole and below 2²⁴.
  batches.set_reference([np.asarray(codes_of(e), np.float32) for e in items])
  assert batches.has_reference
  for number in range(2 * batches.steps):  # straddles epochs
    batch, _ = batches.batch(number)
    got = batch.pop("ref_token_logps")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, codes(batch, padding=0))
    if number == 0:
      assert_same(batch, plain)


def test_a_reference_of_another_number_of_examples_is_an_error():
  batches = make(numbered(4))
  with pytest.raises(ValueError, match="3 reference log-probs for 4 examples"):
    batches.set_reference([np.zeros(n) for n in batches.counts[:3]])


@pytest.fixture
def ended():
  """A function that waits for every thread the test started to end."""
  before = set(threading.enumerate())

  def wait():
    # The worker looks at its stop flag every 0.1 s.
    stop = time.monotonic() + 5
    while set(threading.enumerate()) - before:
      assert time.monotonic() < stop, "the worker is still there"
      time.sleep(0.01)

  return wait


def test_prefetch_yields_every_result_in_order(ended):
  def slow_when_even(number):
    time.sleep(0.002 * (number % 2 == 0))
    return number * number

  got = list(loader.prefetch(slow_when_even, range(30)))
  assert got == [n * n for n in range(30)]
  ended()


def test_prefetch_of_nothing_yields_nothing(ended):
  assert list(loader.prefetch(int, [])) == []
  ended()


def test_prefetch_may_yield_none(ended):
  assert list(loader.prefetch(lambda n: None, range(3))) == [None] * 3
  ended()


def test_prefetch_works_ahead_by_its_depth_and_no_more(ended):
  started = []
  results = loader.prefetch(started.append, itertools.count(), depth=3)
  next(results)
  time.sleep(0.3)
  # Yielded: 1; waiting in the queue: 3; prepared and waiting to enter it: 1.
  assert len(started) == 5
  results.close()
  ended()


def test_prefetch_raises_the_error_of_its_worker_in_its_place(ended):
  error = ValueError("my.jsonl:4: bad")

  def fails_at_3(number):
    if number == 3:
      raise error
    return number

  results = loader.prefetch(fails_at_3, itertools.count())
  assert [next(results) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(ValueError) as caught:
    next(results)
  assert caught.value is error
  ended()


def test_prefetch_raises_the_error_of_its_numbers(ended):
  def numbers():
    yield 0
    raise OSError("gone")

  results = loader.prefetch(int, numbers())
  assert next(results) == 0
  with pytest.raises(OSError, match="gone"):
    next(results)
  ended()


def test_prefetch_does_not_take_an_exhausted_iterator_for_its_end(ended):
  """A StopIteration of the worker must not end training in silence."""
  source = iter([0, 1])
  # Python itself turns a StopIteration raised by a generator into this.
  with pytest.raises(RuntimeError):
    list(loader.prefetch(lambda n: next(source), range(3)))
  ended()


@pytest.mark.parametrize("taken", [1, 5])
def test_the_worker_ends_when_the_consumer_stops_early(ended, taken):
  results = loader.prefetch(int, itertools.count())
  assert list(itertools.islice(results, taken)) == list(range(taken))
  results.close()
  ended()


def test_the_worker_ends_when_the_consumer_fails(ended):
  def consume():
    for number in loader.prefetch(int, itertools.count()):
      if number == 2:
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    consume()
  ended()


def test_prefetched_batches_equal_those_asked_for_directly(ended):
  items = worlds.examples(10)
  batches = make(items)
  results = loader.prefetch(make(items).batch, range(batches.steps))
  for number, (batch, stats) in enumerate(results):
    again, same = batches.batch(number)
    assert_same(batch, again)
    assert stats == same
  ended()
