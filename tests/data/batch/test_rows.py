"""The batch layout against the examples it holds, and its planner."""

import itertools

import numpy as np
import pytest

from dpo_jax.data.batch import loader, planner, rows
from dpo_jax.data.tokens import comparisons

LAYOUTS = pytest.mark.parametrize(
  ("packed", "shared"), list(itertools.product((True, False), repeat=2))
)


def random_examples(rng, count, longest=7, completions=4):
  """Examples of 1 to `completions` completions with random soft pairs."""

  def ids():
    return rng.integers(1, 1000, rng.integers(1, longest + 1)).tolist()

  items = []
  for number in range(count):
    texts = tuple(ids() for _ in range(rng.integers(1, completions + 1)))
    every = list(itertools.permutations(range(len(texts)), 2))
    kept = rng.permutation(len(every))[: rng.integers(0, len(every) + 1)]
    pairs = tuple((*every[k], float(rng.uniform(0.1, 1))) for k in kept)
    items.append(
      comparisons.Example(number + 100, number % 3, ids(), texts, pairs)
    )
  return items


def arrange(items, layout, extra=0):
  """(rows of indices, Shape), the shape with `extra` room on each side."""
  need = rows.needs(items, layout)
  assigned = rows.assign(need.length, layout)
  shape = rows.needed_shape(need, assigned)
  branches = 1 if layout.packed or layout.shared else shape.completions
  if extra:
    shape = shape._replace(
      length=shape.length + extra * branches,
      scored=shape.scored + extra,
      per_row=shape.per_row + extra,
      tile=shape.tile + extra,
      pairs=shape.pairs + extra,
    )
  return assigned, shape


class World:
  """One built batch and what it was built from."""

  def __init__(self, packed, shared, seed, extra):
    rng = np.random.default_rng(seed)
    self.shared = shared
    self.layout = rows.Layout(packed, shared, 2, 40 if packed else None)
    self.items = random_examples(rng, int(rng.integers(1, 12)))
    self.assigned, self.shape = arrange(self.items, self.layout, extra)
    self.rows = [[self.items[i] for i in row] for row in self.assigned]
    self.batch = self.build(self.assigned)

  def build(self, assigned, extras=None):
    return rows.build(self.items, assigned, self.shape, self.layout, extras)

  def examples(self):
    """(row, place in the row, example) of every example."""
    for r, row in enumerate(self.rows):
      for p, example in enumerate(row):
        yield r, p, example

  def branch(self, r, p, branch):
    """The row positions of one branch of one example, in order."""
    inside = self.batch["segment_ids"][r] == p + 1
    return np.flatnonzero(inside & (self.batch["branch_ids"][r] == branch))


@pytest.fixture(params=range(4))
def seed(request):
  return request.param


@pytest.fixture(params=[0, 3], ids=["exact", "roomy"])
def extra(request):
  return request.param


@pytest.fixture
def world(packed, shared, seed, extra):
  return World(packed, shared, seed, extra)


@LAYOUTS
def test_every_token_of_every_example_is_there_and_nothing_else(world):
  count = 0
  for r, p, example in world.examples():
    tokens = world.batch["tokens"][r]
    branches = [example.prompt, *example.completions]
    if not world.shared:
      branches = [[], *(example.prompt + c for c in example.completions)]
    for branch, ids in enumerate(branches):
      assert tokens[world.branch(r, p, branch)].tolist() == ids
      count += len(ids)
  assert np.sum(world.batch["segment_ids"] > 0) == count


@LAYOUTS
def test_positions_restart_at_each_example_and_continue_from_the_prompt(world):
  for r, p, example in world.examples():
    positions, start = world.batch["positions"][r], len(example.prompt)
    if world.shared:
      assert positions[world.branch(r, p, 0)].tolist() == list(range(start))
    for c, ids in enumerate(example.completions):
      first = start if world.shared else 0
      want = list(range(first, start + len(ids)))
      assert positions[world.branch(r, p, c + 1)].tolist() == want


@LAYOUTS
def test_branches_stand_in_order_and_without_gaps_inside_an_example(world):
  for r, p, _ in world.examples():
    inside = world.batch["segment_ids"][r] == p + 1
    assert np.all(np.diff(world.batch["branch_ids"][r][inside]) >= 0)
    if world.layout.packed or world.shared:
      assert np.all(np.diff(np.flatnonzero(inside)) == 1)


@LAYOUTS
def test_targets_are_the_tokens_of_each_completion_in_order(world):
  completions = world.shape.completions
  for r, p, example in world.examples():
    for c, ids in enumerate(example.completions):
      here = world.batch["target_slot"][r] == p * completions + c
      target = world.batch["target_index"][r][here]
      assert world.batch["tokens"][r][target].tolist() == ids
      assert target.tolist() == world.branch(r, p, c + 1)[-len(ids) :].tolist()
  real = world.batch["target_slot"] < world.shape.per_row * completions
  scored = sum(len(c) for e in world.items for c in e.completions)
  assert np.sum(real) == scored


@LAYOUTS
def test_the_source_is_the_only_visible_position_one_before_the_target(world):
  batch = world.batch
  padding = world.shape.per_row * world.shape.completions
  for r in range(len(world.rows)):
    segment, branch = batch["segment_ids"][r], batch["branch_ids"][r]
    position = batch["positions"][r]
    for s in np.flatnonzero(batch["target_slot"][r] < padding):
      i = batch["target_index"][r, s]
      visible = (segment == segment[i]) & np.isin(branch, (0, branch[i]))
      before = np.flatnonzero(visible & (position == position[i] - 1))
      assert batch["source_index"][r, s] == before
      assert before < i


@LAYOUTS
def test_the_first_token_is_predicted_by_the_last_of_the_prompt(world):
  for r, p, example in world.examples():
    for c in range(len(example.completions)):
      slot = p * world.shape.completions + c
      first = np.flatnonzero(world.batch["target_slot"][r] == slot)[0]
      source = world.batch["source_index"][r, first]
      assert world.batch["tokens"][r, source] == example.prompt[-1]
      prompt = world.branch(r, p, 0 if world.shared else c + 1)
      assert source == prompt[len(example.prompt) - 1]


@LAYOUTS
def test_example_index_lists_exactly_the_positions_of_its_example(world):
  length = world.shape.length
  for r, index in enumerate(world.batch["example_index"]):
    for p, listed in enumerate(index):
      inside = np.flatnonzero(world.batch["segment_ids"][r] == p + 1)
      assert listed[: len(inside)].tolist() == inside.tolist()
      assert np.all(listed[len(inside) :] == length)


@LAYOUTS
def test_comparisons_and_weights_are_those_of_the_examples(world):
  completions = world.shape.completions
  for r, row in enumerate(world.rows):
    want = [
      (p * completions + winner, p * completions + loser, weight)
      for p, example in enumerate(row)
      for winner, loser, weight in example.pairs
    ]
    n = len(want)
    pairs, weights = world.batch["pairs"][r], world.batch["weights"][r]
    assert pairs[:n].tolist() == [[winner, loser] for winner, loser, _ in want]
    # Weights are stored in f32: exact after the same cast.
    assert weights[:n].tolist() == [np.float32(weight) for _, _, weight in want]
    nothing = world.shape.per_row * completions
    assert np.all(pairs[n:] == nothing)
    assert not weights[n:].any()


@LAYOUTS
def test_completion_weights_and_identity_are_those_of_the_examples(world):
  batch = world.batch
  weights = np.zeros_like(batch["completion_weights"])
  identity, source = np.zeros_like(batch["example_id"]), 0 * batch["source"]
  for r, p, example in world.examples():
    weights[r, p, : len(example.completions)] = 1
    identity[r, p], source[r, p] = example.example_id, example.source
  np.testing.assert_array_equal(batch["completion_weights"], weights)
  np.testing.assert_array_equal(batch["example_id"], identity)
  np.testing.assert_array_equal(batch["source"], source)


@LAYOUTS
def test_padding_has_the_documented_values(world):
  batch, shape = world.batch, world.shape
  empty = batch["segment_ids"] == 0
  for name in ("tokens", "positions", "branch_ids"):
    assert not batch[name][empty].any()
  padding = batch["target_slot"] == shape.per_row * shape.completions
  assert np.all(batch["target_slot"] >= 0)
  assert np.all(batch["target_slot"][~padding] < shape[3] * shape[4])
  for name in ("target_index", "source_index"):
    assert not batch[name][padding].any()
  used = [len(row) for row in world.rows]
  for r, count in enumerate(used):
    assert np.all(batch["example_index"][r, count:] == shape.length)
    assert batch["segment_ids"][r].max() == count


@LAYOUTS
def test_arrays_have_the_shapes_and_types_of_the_design(world):
  R, T, S, P, C, E, Q, K = world.shape
  shapes = {
    **dict.fromkeys(
      ("tokens", "positions", "segment_ids", "branch_ids"), (R, T)
    ),
    "example_index": (R, P, E),
    **dict.fromkeys(("target_index", "source_index", "target_slot"), (R, S)),
    "pairs": (R, Q, K),
    "weights": (R, Q),
    **dict.fromkeys(("completion_weights", "ended"), (R, P, C)),
    **dict.fromkeys(("example_id", "source"), (R, P)),
  }
  assert {k: v.shape for k, v in world.batch.items()} == shapes
  floats = {"weights", "completion_weights", "ended"}
  for name, array in world.batch.items():
    assert array.dtype == (np.float32 if name in floats else np.int32)


@LAYOUTS
def test_a_slice_of_the_rows_builds_the_same_slice_of_the_batch(world):
  half = len(world.rows) // 2
  part = world.build(world.assigned[half:])
  for name, array in part.items():
    np.testing.assert_array_equal(array, world.batch[name][half:])


def spans_of(world, axis):
  """{(row, place): where the values of an example are in a row of an extra}."""
  completions, spans = world.shape.completions, {}
  for r, p, _ in world.examples():
    if axis == rows.TOKEN:
      slots = world.batch["target_slot"][r]
      spans[r, p] = np.flatnonzero(slots // completions == p)
    elif axis == rows.COMPARISON:
      winners = world.batch["pairs"][r, :, 0]
      spans[r, p] = np.flatnonzero(winners // completions == p)
    else:
      count = int(world.batch["completion_weights"][r, p].sum())
      spans[r, p] = p * completions + np.arange(count)
  return spans


@LAYOUTS
@pytest.mark.parametrize("name", rows.EXTRAS)
def test_an_extra_array_has_the_values_of_each_example_in_its_axes(world, name):
  """Each value once, in order; zero for padding."""
  spans = spans_of(world, rows.EXTRAS[name])
  place = {e.example_id: (r, p) for r, p, e in world.examples()}
  rng = np.random.default_rng(0)
  values = [
    rng.uniform(1, 2, len(spans[place[e.example_id]])).astype(np.float32)
    for e in world.items
  ]
  batch = world.build(world.assigned, {name: values})
  got = batch.pop(name)
  assert got.dtype == np.float32
  assert got.shape == world.batch[rows.EXTRAS[name]].shape
  flat = got.reshape(len(got), -1).copy()
  for e, want in zip(world.items, values, strict=True):
    r, p = place[e.example_id]
    np.testing.assert_array_equal(flat[r, spans[r, p]], want)
    flat[r, spans[r, p]] = 0
  assert not flat.any()
  for other, array in batch.items():
    np.testing.assert_array_equal(array, world.batch[other])


def test_a_row_of_the_table_is_all_that_a_new_extra_array_costs(monkeypatch):
  world = World(True, True, 0, 0)
  mine = {"mine": [[3.0] * len(e.completions) for e in world.items]}
  with pytest.raises(ValueError, match=r"extra array = 'mine' .*advantages"):
    world.build(world.assigned, mine)
  monkeypatch.setitem(rows.EXTRAS, "mine", rows.COMPLETION)
  batch = world.build(world.assigned, mine)
  np.testing.assert_array_equal(batch["mine"], 3 * batch["completion_weights"])


@LAYOUTS
@pytest.mark.parametrize("per_row", [1, 3])
def test_the_shape_of_limits_holds_all_that_keeps_to_them(
  packed, shared, seed, per_row
):
  """Up to the largest of it, without a look at the examples."""
  layout = rows.Layout(packed, shared, 2, None)
  per_row = per_row if packed else 1
  limits = {"prompt": 7, "completion": 7, "completions": 4, "pairs": 12}
  shape = rows.limits_shape(
    layout, rows=3, per_row=per_row, multiple=8, **limits
  )
  assert shape.rows == 4
  items = random_examples(np.random.default_rng(seed), 4 * per_row)
  every = [(*two, 1.0) for two in itertools.permutations(range(4), 2)]
  largest = comparisons.Example(0, 0, [1] * 7, ([2] * 7,) * 4, tuple(every))
  for several in (items, [largest] * len(items)):
    need = rows.needs(several, layout)
    assigned = np.arange(len(items)).reshape(4, per_row).tolist()
    needed = rows.needed_shape(need, assigned)
    assert shape.fits(needed)
    batch = rows.build(several, assigned, shape, layout)
    assert np.sum(batch["completion_weights"]) == need.completions.sum()
    assert np.sum(batch["weights"] > 0) == need.pairs.sum()
    assert np.sum(batch["segment_ids"] > 0) == sum(
      len(e.prompt) * (1 if shared else len(e.completions))
      + sum(map(len, e.completions))
      for e in several
    )
  # The largest leave no room but that of rounding.
  assert rows.rounded(needed, 8, layout)._replace(rows=4) == shape


def test_unpacked_unshared_rows_reshape_to_ordinary_sequences(seed, extra):
  world = World(False, False, seed, extra)
  R, C = world.shape.rows, world.shape.completions
  T = world.shape.length
  assert T % C == 0
  for r, p, example in world.examples():
    for c in range(len(example.completions)):
      assert world.branch(r, p, c + 1)[0] == c * T // C
  flat = {
    name: world.batch[name].reshape(R * C, T // C)
    for name in ("positions", "segment_ids", "branch_ids")
  }
  lengths = np.sum(flat["segment_ids"] > 0, axis=1)
  for n, length in enumerate(lengths):
    assert flat["positions"][n, :length].tolist() == list(range(length))
    assert np.all(flat["segment_ids"][n, :length] == 1)
    assert np.all(flat["branch_ids"][n, :length] == n % C + 1)


@pytest.mark.parametrize("multiple", [1, 8])
def test_planned_unpacked_unshared_rows_still_divide_by_the_branches(multiple):
  items = random_examples(np.random.default_rng(0), 40, completions=3)
  layout = rows.Layout(False, False, 4, None)
  batches = loader.Loader(
    items, layout, batch_size=8, seed=0, budget=2, multiple=multiple
  )
  for n in range(batches.steps):
    batch, _ = batches.batch(n)
    R, T = batch["tokens"].shape
    C = batch["completion_weights"].shape[2]
    assert T % C == 0
    branch = batch["branch_ids"].reshape(R, C, T // C)
    own = np.arange(1, C + 1)[:, None]
    assert np.all((branch == 0) | (branch == own))


def random_lengths(seed, count):
  rng = np.random.default_rng(seed)
  return np.ceil(np.exp(rng.normal(3, 1, count))).astype(int)


@pytest.mark.parametrize("limit", [None, 30, 200])
@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_assign_places_every_example_once_within_the_limits(
  count, multiple, limit
):
  lengths = random_lengths(count, count)
  layout = rows.Layout(True, True, multiple, limit)
  assigned = rows.assign(lengths, layout)
  assert sorted(sum(map(tuple, assigned), ())) == list(range(count))
  assert all(row == sorted(row) for row in assigned)
  assert len(assigned) % multiple == 0
  if limit is None:
    assert len(assigned) == multiple
  else:
    longest = max(sum(lengths[i] for i in row) for row in assigned)
    assert longest <= max(limit, lengths.max())


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_assign_gives_each_example_its_own_row_when_unpacked(multiple):
  lengths = random_lengths(0, 13)
  assigned = rows.assign(lengths, rows.Layout(False, True, multiple, None))
  assert assigned[:13] == [[i] for i in range(13)]
  assert not any(assigned[13:])
  assert len(assigned) == -(-13 // multiple) * multiple


def test_assign_is_a_pure_function_of_the_lengths(seed):
  lengths = random_lengths(seed, 50)
  before = lengths.copy()
  layout = rows.Layout(True, True, 4, 300)
  first = rows.assign(lengths, layout)
  np.testing.assert_array_equal(lengths, before)
  assert rows.assign(lengths.tolist(), layout) == first
  assert rows.assign(lengths.astype(np.int32), layout) == first


def random_shapes(rng, count, row_counts):
  def size(low, high):
    return int(rng.integers(low, high))

  return [
    rows.Shape(
      rows=int(rng.choice(row_counts)),
      length=size(10, 60),
      scored=size(5, 30),
      per_row=size(1, 5),
      completions=2,
      tile=size(5, 10),
      pairs=size(1, 5),
      compared=2,
    )
    for _ in range(count)
  ]


def planned_cost(needed, shapes, multiple):
  """Σ R·T, each batch in the planned shape that it gets."""
  fitted = [planner.fit_shape(s, shapes, PLAN, multiple) for s in needed]
  for shape, fit in zip(needed, fitted, strict=True):
    assert fit in shapes
    assert fit.fits(shape)
  return sum(s.rows * s.length for s in fitted)


def partitions(items, budget):
  """Every split of `items` into at most `budget` groups."""
  for labels in itertools.product(range(budget), repeat=len(items)):
    groups = [[] for _ in range(budget)]
    for item, label in zip(items, labels, strict=True):
      groups[label].append(item)
    yield [group for group in groups if group]


def cheapest(needed, budget, multiple):
  """The least Σ R·T by brute force, without adding rows to a batch."""
  sizes = [(s.rows, rows.round_up(s.length, multiple)) for s in needed]
  costs = []
  for groups in partitions(sizes, budget):
    if all(len({r for r, _ in group}) == 1 for group in groups):
      tops = [(len(g), g[0][0], max(t for _, t in g)) for g in groups]
      costs.append(sum(n * r * t for n, r, t in tops))
  return min(costs)


PLAN = rows.Layout(True, True, 1, None)
PLANS = pytest.mark.parametrize(
  ("budget", "multiple"), list(itertools.product((2, 3), (1, 8)))
)


@PLANS
def test_each_sampled_batch_fits_one_of_the_planned_shapes(budget, multiple):
  for seed in range(5):
    needed = random_shapes(np.random.default_rng(seed), 30, (4,))
    shapes = planner.plan_shapes(needed, PLAN, budget=budget, multiple=multiple)
    assert len(shapes) <= budget
    planned_cost(needed, shapes, multiple)
    for shape in shapes:
      assert shape.length % multiple == 0
      assert shape.scored % multiple == 0
      assert shape.tile % multiple == 0 or shape.tile == shape.length


@PLANS
def test_the_plan_is_the_cheapest_of_all_plans(budget, multiple):
  for seed in range(10):
    needed = random_shapes(np.random.default_rng(seed), 6, (4,))
    shapes = planner.plan_shapes(needed, PLAN, budget=budget, multiple=multiple)
    planned = planned_cost(needed, shapes, multiple)
    assert planned == cheapest(needed, budget, multiple)


def test_equal_batches_need_one_shape_whatever_the_budget():
  needed = random_shapes(np.random.default_rng(0), 1, (4,)) * 5
  shapes = planner.plan_shapes(needed, PLAN, budget=3, multiple=1)
  assert shapes == needed[:1]


def test_the_plan_of_many_different_sizes_wastes_little():
  """Above 256 sizes the search is over quantiles, no longer exact."""
  rng = np.random.default_rng(0)
  shape = random_shapes(rng, 1, (1,))[0]
  lengths = rng.permutation(np.arange(1000, 2000))
  needed = [shape._replace(length=int(t)) for t in lengths]
  shapes = planner.plan_shapes(needed, PLAN, budget=3, multiple=1)
  planned = planned_cost(needed, shapes, 1)
  # The best for sizes spread evenly over [a, b] is three tops evenly spaced.
  tops = np.repeat([1333, 1666, 1999], [334, 333, 333])
  # 256 quantiles of 1000 sizes are 4 apart: each top at most 4 too high.
  assert planned <= np.sum(tops + 4)


def test_a_batch_too_large_for_every_shape_gets_one_that_holds_it():
  """Beyond the plan sizes grow in eighths of the largest planned ones."""
  planned = random_shapes(np.random.default_rng(0), 1, (4,))[0]
  planned = planned._replace(length=800, scored=80)
  large = planned._replace(length=999, scored=10)
  shape = planner.fit_shape(large, [planned], PLAN, 8)
  assert shape.fits(large)
  assert (shape.length, shape.scored) == (1000, 80)
  again = planner.fit_shape(large._replace(length=905), [planned], PLAN, 8)
  assert again == shape


def lognormal(median, sigma, low, high):
  """Draws of whole numbers, log-normal, clipped to [low, high]."""
  return lambda rng, n: np.clip(
    np.round(median * np.exp(sigma * rng.normal(size=n))), low, high
  ).astype(int)


# name: draws of prompt lengths, draws of completion lengths, in tokens.
MIXES = {
  "short": (
    lambda rng, n: rng.integers(5, 21, n),
    lambda rng, n: rng.integers(5, 21, n),
  ),
  "balanced": (lognormal(120, 0.5, 8, 512), lognormal(150, 0.5, 8, 512)),
  "long tail": (lognormal(60, 1.0, 4, 1024), lognormal(100, 1.2, 4, 1024)),
  "TL;DR": (lognormal(350, 0.3, 100, 512), lognormal(40, 0.4, 8, 128)),
}


def loader_of(mix, count=64 * 40, **layout):
  """The planned batches of 64 pairs, as configs/base.py sets them."""
  rng = np.random.default_rng(0)
  prompts, completions = MIXES[mix]
  texts = zip(
    prompts(rng, count),
    completions(rng, count),
    completions(rng, count),
    strict=True,
  )
  items = [
    comparisons.Example(n, 0, [1] * p, ([2] * w, [3] * l), ((0, 1, 1.0),))
    for n, (p, w, l) in enumerate(texts)
  ]
  return loader.Loader(
    items, rows.Layout(**layout), batch_size=64, seed=0, budget=3, multiple=32
  )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("multiple", "goal"), [(1, 0.93), (8, 0.80)])
def test_packed_rows_are_full_with_three_shapes(mix, multiple, goal, shared):
  batches = loader_of(
    mix,
    packed=True,
    shared=shared,
    row_multiple=multiple,
    max_row_length=None,
  )
  tokens = positions = 0
  seen = set()
  for n in range(batches.steps):
    batch, stats = batches.batch(n)
    seen.add(tuple(x.shape for x in batch.values()))
    real = np.mean(batch["segment_ids"] > 0)
    # Both are ratios of whole numbers below 2^53; one division each.
    assert stats.fill == pytest.approx(real, rel=1e-12)
    tokens += real * batch["tokens"].size
    positions += batch["tokens"].size
  assert len(seen) <= 3
  assert tokens / positions >= goal
