"""The store of the reference: the same bits back, or nothing and a warning."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings

import numpy as np
import pytest

from dpo_jax import store
from dpo_jax.run import reference

PARTS = {
  "data": "3 examples, 1f0e",
  "params": {"embed": 17, "head": 4},
  "model": {"layers": 2, "window": None, "pattern": ("full", "window")},
  "precision": "f32",
}
COUNTS = [3, 1, 4, 2, 2]  # of two, two and one example a block
VALUES = np.asarray(
  [-1.5, -0.0, 0.0, -1e-40, np.nan, -np.inf, -7.25, -0.1, -1, -2, -3, -4],
  np.float32,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(reference, "EXAMPLES_PER_BLOCK", 2)


def split(values=VALUES):
  return np.split(values, np.cumsum(COUNTS)[:-1])


def save(folder, parts=PARTS, values=VALUES):
  """Writes a whole entry; returns it and its checksums."""
  entry, values = reference.entry(folder, parts, COUNTS), split(values)
  store.describe(entry.path, entry.about)
  return entry, {
    number: reference.write(entry, number, [values[i] for i in span])
    for number, span in enumerate(entry.blocks)
  }


def found(folder, parts=PARTS):
  """The blocks that are there, after the check that a run makes."""
  entry = reference.entry(folder, parts, COUNTS)
  reference.check(entry)
  return reference.find(entry)


def files(entry):
  """{name: (bytes, time of the last change)}."""
  return {
    path.name: (path.read_bytes(), os.stat(path).st_mtime_ns)
    for path in entry.path.iterdir()
  }


@contextlib.contextmanager
def silent():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def assert_same_bits(got, want):
  assert [x.dtype for x in got] == [np.float32] * len(want)
  assert [x.tobytes() for x in got] == [x.tobytes() for x in want]


@pytest.fixture
def stored(tmp_path):
  """(Entry, checksums) of a store with one entry."""
  return save(tmp_path / "store")


def test_what_was_written_comes_back_bit_equal(stored):
  entry, checksums = stored
  with silent():
    assert reference.check(entry)
    assert reference.find(entry) == checksums
    assert_same_bits(reference.load(entry, checksums), split())


def test_blocks_are_whole_examples_in_order():
  counts = list(range(1, 301))
  entry = reference.entry("store", PARTS, counts)
  assert [i for span in entry.blocks for i in span] == list(range(300))
  # More than 64 files would be many open ones: blocks grow instead of that.
  assert {len(span) for span in entry.blocks} == {5}
  sizes = [entry.size(n) for n in range(len(entry.blocks))]
  assert sizes[:2] == [1 + 2 + 3 + 4 + 5, 6 + 7 + 8 + 9 + 10]
  assert sum(sizes) == sum(counts)


def test_values_are_views_of_the_mapped_files(stored):
  values = reference.load(*stored)
  for value in values:
    assert type(value) is np.ndarray
    assert isinstance(value.base.base, np.memmap)
    assert not value.flags.writeable
  assert values[0].base is values[1].base
  assert values[1].base is not values[2].base


def test_a_mapping_survives_the_removal_of_its_files(stored):
  values = reference.load(*stored)
  shutil.rmtree(stored[0].path)
  assert_same_bits(values, split())


def test_a_store_that_cannot_be_mapped_is_read(stored, monkeypatch):
  """As on gs://, whose files have no place in memory."""
  entry, checksums = stored
  local = entry.path

  class Remote(type(local)):
    def __str__(self):
      return f"gs:/{super().__str__()}"

  monkeypatch.setattr(np, "memmap", None)
  entry = entry._replace(path=Remote(local))
  assert "://" in str(entry.file(0, 0))
  assert reference.find(entry) == checksums
  assert_same_bits(reference.load(entry, checksums), split())


def test_values_of_more_precision_are_stored_as_f32(tmp_path):
  wide = np.linspace(-9, 0, len(VALUES), dtype=np.float64)
  got = reference.load(*save(tmp_path, values=wide))
  assert_same_bits(got, split(wide.astype(np.float32)))


def test_nothing_is_found_where_nothing_was_written(tmp_path):
  with silent():
    assert found(tmp_path) == found(tmp_path / "not there") == {}
  assert not (tmp_path / "not there").exists()


OTHERS = {
  "tokens": {**PARTS, "data": "3 examples, 1f0f"},
  "weights": {**PARTS, "params": {"embed": 17, "head": 5}},
  "model": {**PARTS, "model": {**PARTS["model"], "window": 2}},
  "precision": {**PARTS, "precision": "bf16"},
  "a part less": {k: v for k, v in PARTS.items() if k != "precision"},
  "a part more": {**PARTS, "more": 1},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_an_entry_of_other_parts_is_not_found(stored, other):
  with silent():
    assert found(stored[0].path.parent, other) == {}


def test_entries_of_other_parts_stay_apart(stored):
  folder = stored[0].path.parent
  for k, parts in enumerate(OTHERS.values(), 1):
    save(folder, parts, VALUES - k)
  assert_same_bits(reference.load(*stored), split())
  for k, parts in enumerate(OTHERS.values(), 1):
    entry = reference.entry(folder, parts, COUNTS)
    got = reference.load(entry, reference.find(entry))
    assert_same_bits(got, split(VALUES - k))


def test_the_key_does_not_depend_on_the_order_of_the_parts(monkeypatch):
  def backwards(x):
    if not isinstance(x, dict):
      return x
    return {k: backwards(x[k]) for k in reversed(x)}

  def key(parts):
    return reference.entry("store", parts, COUNTS).path.name

  assert list(backwards(PARTS)) == list(PARTS)[::-1]
  assert key(backwards(PARTS)) == key(PARTS)
  keys = {key(parts) for parts in (PARTS, *OTHERS.values())}
  assert len(keys) == 1 + len(OTHERS)
  monkeypatch.setattr(reference, "_VERSION", reference._VERSION + 1)
  assert key(PARTS) not in keys


def test_an_entry_is_to_the_byte_that_of_earlier_versions(stored):
  """Its address too: what they computed is not computed again."""
  entry, _ = stored
  assert entry.path.name == "a3c37296239000eb7ffd01f9"
  digest = hashlib.blake2b(digest_size=8)
  for name, (content, _) in sorted(files(entry).items()):
    digest.update(name.encode() + content)
  assert digest.hexdigest() == "2ce2aee85724c4e0"


def test_the_description_says_what_the_key_was_made_of(stored):
  about = json.loads((stored[0].path / "entry.json").read_text())
  assert about.pop("version") == reference._VERSION
  model = {**PARTS["model"], "pattern": ["full", "window"]}
  assert about == {
    "made_of": {**PARTS, "model": model},
    "examples": 5,
    "scored_tokens": 12,
    "examples_per_block": 2,
  }


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda x: x.update(examples=6), "examples is 6 there, 5 here"),
    (lambda x: x.update(scored_tokens=11), "scored_tokens is 11 there, 12"),
    (lambda x: x.update(examples_per_block=1), "examples_per_block is 1 there"),
    (lambda x: x.pop("version"), "version is missing there, 3 here"),
    (lambda x: x.update(more=[1]), r"more is \[1\] there, missing here"),
    (
      lambda x: x["made_of"]["params"].update(head=5),
      "made_of.params.head is 5 there, 4 here",
    ),
    (lambda x: x.clear(), r"\(and \d+ more\)"),
  ],
)
def test_a_description_of_something_else_is_refused(stored, change, says):
  path = stored[0].path / "entry.json"
  about = json.loads(path.read_text())
  change(about)
  path.write_text(json.dumps(about))
  with pytest.raises(ValueError, match=says) as error:
    reference.check(stored[0])
  assert str(path) in str(error.value)
  assert f"delete the folder {stored[0].path}" in str(error.value)
  assert "ref_store" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}"])
def test_a_damaged_description_is_written_again(stored, content):
  """The blocks need it for nothing: their names prove them."""
  entry, checksums = stored
  path = entry.path / "entry.json"
  good = path.read_bytes()
  path.write_bytes(content)
  with pytest.warns(UserWarning, match="entry.json is damaged"):
    assert not reference.check(entry)
  store.describe(entry.path, entry.about)
  assert path.read_bytes() == good
  with silent():
    assert reference.check(entry)
    assert reference.find(entry) == checksums


def test_writing_leaves_no_partial_file(stored):
  entry, checksums = stored
  assert {path.name for path in entry.path.iterdir()} == {
    "entry.json",
    *(entry.file(*item).name for item in checksums.items()),
  }


def test_an_interrupted_write_costs_its_own_block_alone(stored, monkeypatch):
  entry, checksums = stored
  entry.file(1, checksums[1]).unlink()

  def killed(self, target):
    raise KeyboardInterrupt

  with monkeypatch.context() as context:
    context.setattr(type(entry.path), "replace", killed)
    context.setattr(store, "remove", lambda path: None)  # as after a kill
    with pytest.raises(KeyboardInterrupt):
      reference.write(entry, 1, split()[2:4])
  (partial,) = entry.path.glob("*.part")
  with silent():
    assert reference.find(entry).keys() == {0, 2}
  # Another run may be writing it; a day later none is.
  assert partial.exists()
  os.utime(partial, 2 * (time.time() - 86400,))
  assert reference.find(entry).keys() == {0, 2}
  assert not partial.exists()
  assert reference.write(entry, 1, split()[2:4]) == checksums[1]
  assert_same_bits(reference.load(entry, reference.find(entry)), split())


def assert_damaged(entry, checksums, number):
  """A block is not used, with a warning, and gone; the others are."""
  others = {k: v for k, v in checksums.items() if k != number}
  with pytest.warns(UserWarning, match=f"{number:05}-.*damaged; computing"):
    assert reference.find(entry) == others
  with silent():
    assert reference.find(entry) == others


def test_a_flipped_byte_anywhere_is_noticed(stored):
  entry, checksums = stored
  path = entry.file(1, checksums[1])
  good = path.read_bytes()
  for at in range(len(good)):
    for bits in (1, 0x80, 0xFF):
      bad = bytearray(good)
      bad[at] ^= bits
      path.write_bytes(bad)
      assert_damaged(*stored, 1)


def test_another_size_is_noticed(stored):
  entry, checksums = stored
  path = entry.file(1, checksums[1])
  good = path.read_bytes()
  for size in range(len(good)):
    path.write_bytes(good[:size])
    assert_damaged(*stored, 1)
  for more in (b"\0", good):
    path.write_bytes(good + more)
    assert_damaged(*stored, 1)


def test_a_block_of_another_place_or_entry_is_noticed(stored, tmp_path):
  entry, checksums = stored
  other, others = save(tmp_path / "other", OTHERS["weights"])
  # The same values, and so the same bytes, in the wrong folder.
  shutil.copy(other.file(0, others[0]), entry.file(0, others[0]))
  entry.file(0, checksums[0]).unlink()
  assert_damaged(*stored, 0)
  same = [split()[0], split()[1]]
  counts = [3, 1, 3, 1]
  twins = reference.entry(tmp_path / "twins", PARTS, counts)
  first = reference.write(twins, 0, same)
  twins.file(0, first).rename(twins.file(1, first))
  with pytest.warns(UserWarning, match="damaged"):
    assert reference.find(twins) == {}


def test_a_block_that_two_runs_wrote_is_found_once(stored):
  """At once, with batches of another size: equal up to rounding."""
  entry, checksums = stored
  second = reference.write(entry, 0, [x - 1e-6 for x in split()[:2]])
  assert second != checksums[0]
  with silent():
    assert reference.find(entry)[0] == min(second, checksums[0])
  assert_same_bits(reference.load(entry, checksums), split())


def test_what_vanishes_after_it_was_found_is_an_error(stored):
  entry, checksums = stored
  entry.file(2, checksums[2]).unlink()
  with pytest.raises(ValueError, match=r"00002-.* run this again"):
    reference.load(entry, checksums)


def test_other_files_in_the_folder_are_left_alone(stored):
  entry, checksums = stored
  more = ("README", "00001-nothex00.f32", f"00077-{checksums[0]:08x}.f32")
  for name in more:
    (entry.path / name).write_text("mine")
  before = files(entry)
  with silent():
    assert reference.find(entry) == checksums
  assert files(entry) == before
