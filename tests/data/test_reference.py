"""The store of the reference: the same bits back, or nothing and a warning."""

import contextlib
import shutil
import warnings

import numpy as np
import pytest

from dpo_jax.data import reference

PARTS = {
  "data": "3 examples, 1f0e",
  "params": {"embed": 17, "head": 4},
  "model": {"layers": 2, "window": None},
  "precision": "f32",
}
COUNTS = [3, 1, 4]
VALUES = np.asarray(
  [-1.5, -0.0, 0.0, -1e-40, np.nan, -np.inf, -7.25, -0.1], np.float32
)


def split(values=VALUES):
  return [values[:3], values[3:4], values[4:]]


def load(folder, parts=PARTS, counts=COUNTS):
  return reference.load(folder, parts, counts)


@contextlib.contextmanager
def silent():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def assert_same_bits(got, want):
  assert [x.dtype for x in got] == [np.float32] * len(want)
  assert [x.tobytes() for x in got] == [x.tobytes() for x in want]


def assert_damaged(folder, counts=COUNTS):
  """Nothing is found, with a warning; and saving repairs it."""
  with pytest.warns(UserWarning, match="damaged; computing it again"):
    assert load(folder, counts=counts) is None
  reference.save(folder, PARTS, split())
  with silent():
    assert_same_bits(load(folder), split())


@pytest.fixture
def folder(tmp_path):
  """A store with one entry."""
  reference.save(tmp_path / "store", PARTS, split())
  return tmp_path / "store"


def file_of(folder, suffix):
  (path,) = folder.glob(f"*{suffix}")
  return path


def test_what_was_saved_comes_back_bit_equal(folder):
  with silent():
    assert_same_bits(load(folder), split())


def test_values_of_more_precision_are_stored_as_f32(tmp_path):
  wide = [np.asarray([0.1, -1 / 3]), np.asarray([-2.0])]
  reference.save(tmp_path, PARTS, wide)
  assert_same_bits(
    load(tmp_path, counts=[2, 1]), [x.astype(np.float32) for x in wide]
  )


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
  with silent():
    assert load(tmp_path) is None
    assert load(tmp_path / "not there") is None


OTHERS = {
  "tokens": {**PARTS, "data": "3 examples, 1f0f"},
  "weights": {**PARTS, "params": {"embed": 17, "head": 5}},
  "model": {**PARTS, "model": {"layers": 2, "window": 2}},
  "precision": {**PARTS, "precision": "bf16"},
  "a part less": {k: v for k, v in PARTS.items() if k != "precision"},
  "a part more": {**PARTS, "more": 1},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_an_entry_of_other_parts_is_not_found(folder, other):
  with silent():
    assert load(folder, other) is None


def test_entries_of_other_parts_stay_apart(folder):
  shifted = {name: split(VALUES - k) for k, name in enumerate(OTHERS, 1)}
  for name, values in shifted.items():
    reference.save(folder, OTHERS[name], values)
  assert_same_bits(load(folder), split())
  for name, values in shifted.items():
    assert_same_bits(load(folder, OTHERS[name]), values)


def test_the_key_does_not_depend_on_the_order_of_the_parts():
  def backwards(x):
    if not isinstance(x, dict):
      return x
    return {k: backwards(x[k]) for k in reversed(x)}

  assert list(backwards(PARTS)) == list(PARTS)[::-1]
  assert reference.key(backwards(PARTS)) == reference.key(PARTS)
  keys = {reference.key(parts) for parts in (PARTS, *OTHERS.values())}
  assert len(keys) == 1 + len(OTHERS)


def test_saving_leaves_no_partial_file(folder):
  assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("complete", [(), (".npy",)])
def test_an_interrupted_save_is_not_found(folder, complete):
  for path in list(folder.iterdir()):
    if path.suffix not in complete:
      path.rename(f"{path}.part")
  with silent():
    assert load(folder) is None
  reference.save(folder, PARTS, split())
  assert_same_bits(load(folder), split())


def test_a_flipped_byte_anywhere_is_noticed(folder):
  path = file_of(folder, ".npy")
  good = path.read_bytes()
  for at in range(len(good)):
    for bits in (1, 0x80, 0xFF):
      bad = bytearray(good)
      bad[at] ^= bits
      path.write_bytes(bad)
      with pytest.warns(UserWarning, match="damaged"):
        assert load(folder) is None
  assert_damaged(folder)


def test_values_that_were_cut_short_are_noticed(folder):
  path = file_of(folder, ".npy")
  good = path.read_bytes()
  for size in range(len(good)):
    path.write_bytes(good[:size])
    with pytest.warns(UserWarning, match="damaged"):
      assert load(folder) is None
  assert_damaged(folder)


def test_missing_values_are_noticed(folder):
  file_of(folder, ".npy").unlink()
  assert_damaged(folder)


def test_values_of_another_entry_are_noticed(folder, tmp_path):
  """As a save over an entry leaves them that stops before its last file."""
  reference.save(tmp_path / "other", PARTS, split(VALUES - 1))
  shutil.copy(file_of(tmp_path / "other", ".npy"), file_of(folder, ".npy"))
  assert_damaged(folder)


@pytest.mark.parametrize(
  "text",
  ["", "{", "[]", "5", "null", "{}", '{"checksum": null}', '{"checksum": 1}'],
)
def test_a_description_that_is_not_one_is_noticed(folder, text):
  file_of(folder, ".json").write_text(text)
  assert_damaged(folder)


def test_a_description_that_is_not_text_is_noticed(folder):
  file_of(folder, ".json").write_bytes(b"\xff\xfe{}")
  assert_damaged(folder)


@pytest.mark.parametrize("counts", [[3, 1, 5], [3, 1], [3, 1, 3]])
def test_another_number_of_tokens_is_noticed(folder, counts):
  assert_damaged(folder, counts)
