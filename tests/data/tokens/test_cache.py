"""Tokens on disk: the same examples back, or nothing and a warning."""

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
from dpo_jax.data.batch import loader, rows
from dpo_jax.data.tokens import cache
from dpo_jax.data.tokens import examples as examples_lib
from tests import worlds

ITEMS = [
  e._replace(scores=tuple(range(len(e.completions))))
  for e in worlds.examples(7, completions=4)
]
NOTES = {"changed": {"completion cut": 3}, "skipped": {}, "first": {}}
MADE_OF = {"sources": [{"file": "1f0e"}], "tokenizer": "bytes"}


def chunks(items=ITEMS):
  return examples_lib.chunks(items, "<u2")


def write(folder, items=ITEMS, made_of=MADE_OF):
  entry = cache.entry(folder, made_of)
  return entry, cache.write(entry, chunks(items), lambda: NOTES)


@contextlib.contextmanager
def silent():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_what_was_written_is_mapped_and_the_same(tmp_path):
  entry, written = write(tmp_path)
  with silent():
    for found, notes in (written, cache.read(entry)):
      assert worlds.plain(found) == ITEMS
      assert notes == NOTES
      assert isinstance(found._arrays["tokens"].base, np.memmap)
      memory = examples_lib.of(ITEMS)
      assert found.fingerprint() == memory.fingerprint()
      assert found.token_fingerprint == memory.token_fingerprint


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_batches_of_mapped_examples_are_those_of_a_list(
  tmp_path, packed, shared
):
  _, (found, _) = write(tmp_path)

  def batches(items):
    made = loader.Loader(
      items,
      rows.Layout(packed, shared, 2, None),
      batch_size=3,
      seed=1,
      budget=2,
      multiple=8,
      windows=(None, 4),
    )
    return [made.batch(number) for number in range(5)]

  for (ours, stats), (theirs, same) in zip(
    batches(found), batches(ITEMS), strict=True
  ):
    assert stats == same
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
      np.testing.assert_array_equal(array, theirs[name])


def test_an_entry_is_to_the_byte_that_of_earlier_versions(
  tmp_path, monkeypatch
):
  """But for the version: what another one kept is tokenised again."""
  monkeypatch.setattr(cache, "_VERSION", 2)
  write(tmp_path)
  digest = hashlib.blake2b(digest_size=8)
  for name, content in sorted(files(tmp_path).items()):
    assert name.startswith("1eb8fd5e1cc508f5564f4833/")
    digest.update(name.encode() + content)
  assert digest.hexdigest() == "7def4e150a7c162d"


def test_an_entry_that_is_not_there_is_none(tmp_path):
  with silent():
    assert cache.read(cache.entry(tmp_path / "no", MADE_OF)) is None
  assert not (tmp_path / "no").exists()


def test_other_content_or_another_version_is_another_entry(
  tmp_path, monkeypatch
):
  entry, _ = write(tmp_path)
  assert cache.entry(tmp_path, dict(reversed(MADE_OF.items()))) == entry
  other = cache.entry(tmp_path, {**MADE_OF, "tokenizer": "other"})
  assert cache.read(other) is None
  monkeypatch.setattr(cache, "_VERSION", cache._VERSION + 1)
  assert cache.read(cache.entry(tmp_path, MADE_OF)) is None


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGES = {
  "a flipped bit": _flip,
  "cut short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
  "too long": lambda path: path.write_bytes(path.read_bytes() + b"1"),
  "gone": lambda path: path.unlink(),
  "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", ["entry.json", "tokens.bin", "ends.bin"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_noticed_and_made_again(tmp_path, name, damage):
  entry, _ = write(tmp_path)
  DAMAGES[damage](entry.path / name)
  with pytest.warns(UserWarning, match="damaged .* making them again") as seen:
    assert cache.read(entry) is None
  assert str(entry.path) in str(seen[0].message)
  assert len(seen) == 1
  assert not entry.path.exists()
  with silent():
    _, (found, _) = write(tmp_path)
  assert worlds.plain(found) == ITEMS


def test_what_cannot_be_read_is_kept_and_named(tmp_path, monkeypatch):
  """It may be another user's, or the disk's bad minute."""
  entry, _ = write(tmp_path)

  def refused(path, *args):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(store, "read", refused)
  says = r"data\.token_cache: .*Permission denied"
  with pytest.raises(ValueError, match=says):
    cache.read(entry)
  monkeypatch.undo()
  assert worlds.plain(cache.read(entry)[0]) == ITEMS


def test_what_is_interrupted_leaves_nothing(tmp_path):
  def interrupted():
    yield from chunks()
    raise KeyboardInterrupt

  entry = cache.entry(tmp_path, MADE_OF)
  with pytest.raises(KeyboardInterrupt):
    cache.write(entry, interrupted(), lambda: NOTES)
  assert list(tmp_path.iterdir()) == []


def test_of_two_runs_at_once_the_first_one_stays(tmp_path):
  first = []

  def slow():
    yield from chunks()
    first.append(write(tmp_path))

  entry = cache.entry(tmp_path, MADE_OF)
  with silent():
    found, _ = cache.write(entry, slow(), lambda: {"changed": "by the second"})
    assert cache.read(entry)[1] == NOTES
  assert worlds.plain(found) == worlds.plain(first[0][1][0]) == ITEMS
  assert [path.name for path in tmp_path.iterdir()] == [entry.path.name]


def test_mapped_examples_outlive_their_files(tmp_path):
  """Another run may find an entry damaged and remove it."""
  entry, (found, _) = write(tmp_path)
  shutil.rmtree(entry.path)
  assert worlds.plain(found) == ITEMS


def test_what_a_killed_run_left_is_removed_later(tmp_path):
  left = [tmp_path / f"{k}.part" for k in range(2)]
  for path in left:
    path.mkdir()
    (path / "tokens.bin").write_bytes(b"1")
  day = time.time() - 86400
  os.utime(left[0], (day, day))  # it may still be writing to its file
  os.utime(left[1], (day, day))
  os.utime(left[1] / "tokens.bin", (day, day))
  write(tmp_path)
  assert [path.exists() for path in left] == [True, False]


def test_a_folder_that_cannot_be_mapped_is_refused():
  with pytest.raises(
    ValueError, match=r"data\.token_cache = 'gs://a/b'.*folde"
  ):
    cache.entry("gs://a/b", MADE_OF)


def test_a_folder_that_cannot_be_written_to_names_the_field(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    ValueError, match=r"data\.token_cache: .*file/x cannot be"
  ):
    write(tmp_path / "file/x")


def test_errors_of_the_records_keep_their_names(tmp_path):
  def failing():
    yield from chunks()
    raise OSError("of the source")

  entry = cache.entry(tmp_path, MADE_OF)
  with pytest.raises(OSError, match="of the source"):
    cache.write(entry, failing(), lambda: NOTES)


def test_the_fingerprint_of_a_mixture_is_computed_once(tmp_path, monkeypatch):
  entry, (found, _) = write(tmp_path)
  tables = [((7, weight),) for weight in (2.0, 3.0)]
  want = [examples_lib.of(ITEMS).fingerprint(parts) for parts in tables]
  assert [found.fingerprint(parts) for parts in tables] == want
  monkeypatch.setattr(examples_lib, "_described", None)
  again, _ = cache.read(entry)
  assert [again.fingerprint(parts) for parts in tables] == want


def test_the_entry_says_what_it_was_made_of(tmp_path):
  entry, _ = write(tmp_path)
  about = json.loads((entry.path / "entry.json").read_text())
  assert about["made_of"] == {"version": cache._VERSION, **MADE_OF}
  before = files(tmp_path)
  assert cache.read(entry) is not None
  assert files(tmp_path) == before
