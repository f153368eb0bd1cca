"""Damaged, vanished and unwritable checkpoints: never silent, never fatal."""

import gc
import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from dpo_jax.train import checkpoint, intact
from tests.train import test_checkpoint as small

OLDER, NEWER = (small.make_state(step=s, seed=s) for s in (1, 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The folder of a run with steps 1 and 2."""
  folder = tmp_path_factory.mktemp("saved")
  small.save(folder, OLDER, NEWER)
  return folder


def files_of(folder, step=2):
  """Files of a step, as paths in the run folder."""
  paths = sorted((folder / "checkpoints" / str(step)).rglob("*"))
  return [path.relative_to(folder) for path in paths if path.is_file()]


def flipped(content, at, bit=0x10):
  changed = bytearray(content)
  changed[at] ^= bit
  return bytes(changed)


def damages(content):
  """{name: what becomes of a file}; None is deleted."""
  found = {"half": content[: len(content) // 2], "nothing": b"", "gone": None}
  for at in sorted({0, len(content) // 3, len(content) // 2, len(content) - 1}):
    if content:
      found[f"byte {at}"] = flipped(content, at)
  return found


def put(path, content):
  path.unlink() if content is None else path.write_bytes(content)


def check_restored(folder):
  """Restores; which step it is, once it proved to be that bit for bit."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    got = small.restore(folder)
  step = int(got.step)
  want = {1: OLDER, 2: NEWER}[step]
  for field in ("params", "opt_state", "extra", "skipped"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(got, field), getattr(want, field)
    )
  lines = [str(w.message) for w in said if "trying an older" in str(w.message)]
  assert len(lines) == (step == 1), lines
  return step


def check_loaded(folder):
  """As `check_restored`, of what reads a policy alone, and of its identity."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    got = checkpoint.load_params(folder, OLDER.params)
    about = checkpoint.identity(folder)
  step = about["step"]
  jax.tree.map(
    np.testing.assert_array_equal, got, {1: OLDER, 2: NEWER}[step].params
  )
  assert checkpoint.latest_step(folder) == step
  lines = [str(w.message) for w in said if "trying an older" in str(w.message)]
  assert len(lines) == (step == 1), lines
  return step


KINDS = ("state/manifest.ocdbt", "state/_METADATA", "meta/metadata", "state/d/")


@pytest.mark.parametrize("check", [check_restored, check_loaded])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_damage_is_exact_or_falls_back(
  kind, check, saved, tmp_path
):
  """R8, one file of each kind, for a resume and for a policy that is read."""
  file = next(x for x in files_of(saved) if kind in str(x))
  content, steps = (saved / file).read_bytes(), []
  for number, after in enumerate(damages(content).values()):
    folder = shutil.copytree(saved, tmp_path / str(number))
    put(folder / file, after)
    steps.append(check(folder))
  assert 1 in steps  # the damage was done to something that is read


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_restored, check_loaded])
def test_every_file_of_the_newest_step_may_be_damaged_in_every_way(
  check, saved, tmp_path, caplog
):
  """R8, the whole matrix."""
  count = 0
  for file in files_of(saved):
    content = (saved / file).read_bytes()
    for after in damages(content).values():
      folder = shutil.copytree(saved, tmp_path / str(count))
      put(folder / file, after)
      check(folder)
      shutil.rmtree(folder)
      count += 1
  assert count > 80
  gc.collect()  # asyncio tells then of reads that nobody waited for
  assert not [r for r in caplog.records if r.name == "asyncio"]


def test_no_changed_character_of_the_metadata_is_taken_for_another_config(
  saved, tmp_path
):
  """R8: a flipped bit in the JSON is damage, and not the user's mistake."""
  folder = shutil.copytree(saved, tmp_path / "run")
  path = folder / "checkpoints" / "2" / "meta" / "metadata"
  content, exact = path.read_bytes(), json.loads(path.read_bytes())
  with intact.manager(folder / "checkpoints") as manager:
    want = intact.metadata(manager, 2)
    for at in range(len(content)):
      path.write_bytes(flipped(content, at, bit=0x01))
      try:
        assert intact.metadata(manager, 2) == want
      except intact.Damaged:
        continue
  del exact["checksum"]  # as checkpoints were before
  path.write_text(json.dumps(exact))
  assert check_restored(folder) == 2


def test_an_empty_folder_of_a_step_is_no_checkpoint(saved, tmp_path):
  """R8: nor does it stand in the way of that step when it is due."""
  folder = shutil.copytree(saved, tmp_path / "run")
  (folder / "checkpoints" / "10").mkdir()
  assert checkpoint.steps(folder) == [1, 2]
  assert checkpoint.latest_step(folder) == 2
  assert check_loaded(folder) == 2
  with pytest.warns(UserWarning, match="checkpoint 10: its folder is empty"):
    assert int(small.restore(folder).step) == 2
  small.save(folder, small.make_state(step=10, seed=3))
  assert checkpoint.latest_step(folder) == 10


@pytest.mark.parametrize(
  "error",
  [
    MemoryError("no room"),
    OSError(24, "too many open files"),
    ValueError("RESOURCE_EXHAUSTED: out of memory"),
  ],
)
def test_running_out_of_memory_damages_no_checkpoint(
  error, saved, tmp_path, monkeypatch
):
  """R8: what is wrong with the machine moves no checkpoint away."""
  folder = shutil.copytree(saved, tmp_path / "run")

  def short(*_, **__):
    raise error

  with checkpoint.Checkpointer(folder, keep=2) as manager:
    monkeypatch.setattr(manager._manager, "restore", short)
    with pytest.raises(type(error)):
      manager.restore(OLDER, small.CONFIG)
  assert not (folder / "damaged").exists()
  assert check_restored(folder) == 2


def test_a_step_that_is_asked_for_is_never_replaced_by_another(saved, tmp_path):
  """R8: nor is a policy that does not fit."""
  folder = shutil.copytree(saved, tmp_path / "run")
  (folder / "checkpoints" / "2" / "meta" / "metadata").write_bytes(b"")
  with pytest.raises(ValueError, match="step 2: unreadable"):
    checkpoint.load_params(folder, OLDER.params, step=2)
  shutil.rmtree(folder / "checkpoints" / "1")
  with pytest.raises(ValueError, match="step 2: unreadable"):
    checkpoint.load_params(folder, OLDER.params)


def test_what_was_damaged_and_is_saved_anew_is_read_again(saved, tmp_path):
  """R8, in one process, as in a notebook."""
  folder = shutil.copytree(saved, tmp_path / "run")
  for file in files_of(folder):
    if "/d/" in str(file):
      put(folder / file, None)
  assert check_loaded(folder) == 1
  assert check_restored(folder) == 1
  small.save(folder, NEWER)
  assert checkpoint.latest_step(folder) == 2
  assert check_loaded(folder) == 2


@pytest.mark.parametrize("lost", ["all", "newest"])
def test_steps_that_vanished_are_refused_with_what_to_do(lost, saved, tmp_path):
  """R9: no silent fresh start, and no silent step back."""
  folder = shutil.copytree(saved, tmp_path / "run")
  gone = folder / "checkpoints"
  kept = gone if lost == "all" else gone / "2"
  moved = kept.rename(tmp_path / "elsewhere")
  with pytest.raises(ValueError, match=r"step 2 was saved here and is gone"):
    small.restore(folder)
  shutil.rmtree(gone) if lost == "all" else None
  moved.rename(kept)
  assert check_restored(folder) == 2
  shutil.rmtree(kept)
  (folder / "saved.json").unlink()  # as the message says
  got = small.restore(folder)
  assert got is None if lost == "all" else int(got.step) == 1


def test_a_run_killed_before_its_first_save_starts_again(tmp_path):
  """R9: metrics alone are no sign of a loss."""
  (tmp_path / "metrics.jsonl").write_text('{"step": 3, "kind": "train"}\n')
  assert small.restore(tmp_path) is None


def test_a_step_that_was_set_aside_as_damaged_is_not_missed(saved, tmp_path):
  """R9: nor if nothing was saved since."""
  folder = shutil.copytree(saved, tmp_path / "run")
  put(folder / "checkpoints" / "2" / "meta" / "metadata", b"")
  assert check_restored(folder) == 1
  assert int(small.restore(folder).step) == 1


def test_a_damaged_record_of_what_was_saved_is_mended(saved, tmp_path):
  """R9: it is a hint, and must not cost a run."""
  folder = shutil.copytree(saved, tmp_path / "run")
  (folder / "saved.json").write_bytes(b"\xff{")
  with pytest.warns(UserWarning, match="written anew"):
    assert int(small.restore(folder).step) == 2
  assert json.loads((folder / "saved.json").read_text()) == {"step": 2}
