"""Arrays on disk: an address of what they are made of, complete or absent."""

import os
import time
import zlib

import numpy as np
import pytest

from dpo_jax import store

VALUES = np.arange(7, dtype="<i4")
SUM = zlib.crc32(VALUES)


@pytest.fixture
def path(tmp_path):
  """A file with VALUES, whose folder was not there."""
  path = store.address(tmp_path / "store", {"a": 1}) / "values.bin"
  store.write(path, VALUES.tobytes())
  return path


def test_the_address_is_of_the_content_and_not_of_its_order():
  one, same, other = (
    store.address("folder", made_of)
    for made_of in ({"a": 1, "b": (2, 3)}, {"b": [2, 3], "a": 1}, {"a": 1})
  )
  assert one == same != other
  assert one.parent == other.parent
  assert not one.parent.exists()


def test_a_local_file_is_mapped_and_any_other_read(path):
  found = store.read(path, "<i4", 28, SUM)
  np.testing.assert_array_equal(found, VALUES)
  assert type(found) is np.ndarray
  assert isinstance(found.base, np.memmap)


def test_a_file_without_values_is_an_empty_array(path):
  store.write(path, b"")
  assert store.read(path, "<f8", 0, 0).shape == (0,)


@pytest.mark.parametrize(
  ("size", "checksum", "start"),
  [(28, SUM + 1, 0), (24, SUM, 0), (28, SUM, 1)],
)
def test_another_size_checksum_or_place_is_damage(path, size, checksum, start):
  with pytest.raises(ValueError, match=r"checksum of .* does not"):
    store.read(path, "<i4", size, checksum, start)
  path.write_bytes(VALUES.tobytes()[:-1])  # not even whole values
  with pytest.raises(ValueError):
    store.read(path, "<i4", 27, SUM)


def test_what_cannot_be_written_leaves_what_was_there(path, monkeypatch):
  def full(self, content):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as context:
    context.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
      store.write(path, b"new")
  assert list(path.parent.iterdir()) == [path]
  np.testing.assert_array_equal(store.read(path, "<i4", 28, SUM), VALUES)


def test_of_two_folders_the_first_and_of_two_files_the_last_one_stays(path):
  folders = [store.partial(path.parent) for _ in range(2)]
  target = path.parent.parent / "folder"
  for name, folder in zip("ab", folders, strict=True):
    folder.mkdir()
    (folder / name).write_text(name)
    store.publish(folder, target)
  assert [x.name for x in target.iterdir()] == ["a"]
  store.write(target / "a", b"last")
  assert (target / "a").read_text() == "last"


def test_what_nobody_writes_any_more_is_removed(path):
  """A folder counts as written to while a file in it is."""
  old, young, busy = (store.partial(path) for _ in range(3))
  old.write_text("")
  young.write_text("")
  busy.mkdir()
  (busy / "values").write_text("")
  for left in (old, busy):
    os.utime(left, 2 * (time.time() - 86400,))
  store.remove_abandoned(path.parent)
  assert sorted(path.parent.iterdir()) == sorted([path, young, busy])
  os.utime(busy / "values", 2 * (time.time() - 86400,))
  os.utime(busy, 2 * (time.time() - 86400,))
  store.remove_abandoned(path.parent)
  assert sorted(path.parent.iterdir()) == sorted([path, young])


def test_the_description_comes_back_or_says_what_is_wrong(path):
  about = {"made_of": {"a": [1, None]}, "more": "…"}
  with pytest.raises(FileNotFoundError):
    store.described(path.parent)
  store.describe(path.parent, about)
  assert store.described(path.parent) == about
  for content in (b"", b"[]", b"\xff\xfe{}"):
    (path.parent / "entry.json").write_bytes(content)
    with pytest.raises(ValueError):
      store.described(path.parent)
