"""Checkpoints: exact, verified, and refusing what does not belong."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.train import checkpoint, health
from dpo_jax.train import state as state_lib

CONFIG = {"loss": {"beta": 0.1}, "train": {"steps": 4}, "optim": {"freeze": ()}}


def make_state(step=0, seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    "kernel": jax.random.normal(keys[0], (4, 8)).astype(dtype),
    "bias": jax.random.normal(keys[1], (8,)).astype(dtype),
  }
  return state_lib.TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state={"nu": jax.random.normal(keys[2], (4, 8))},
    frozen={"ref": {"kernel": jnp.ones((4, 8))}},
    extra={"delta": jnp.float32(step + 0.5)},
    skipped={k: jnp.int32(step % 2) for k in ("row", "longest", "total")},
  )


def save(workdir, *states, keep=2, config=CONFIG):
  with checkpoint.Checkpointer(workdir, keep=keep) as manager:
    for state in states:
      manager.save(state, config, wait=True)


def restore(workdir, state=None, config=CONFIG):
  with checkpoint.Checkpointer(workdir, keep=2) as manager:
    return manager.restore(state or make_state(seed=9), config)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
  state = make_state(step=3)
  save(tmp_path, state)
  got = restore(tmp_path)
  for field in ("step", "params", "opt_state", "extra", "skipped"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(got, field), getattr(state, field)
    )


def test_an_empty_folder_restores_nothing(tmp_path):
  assert restore(tmp_path) is None


def data_files(workdir, step):
  folder = workdir / "checkpoints" / str(step)
  files = [p for p in folder.rglob("*") if p.is_file()]
  return sorted(files, key=lambda p: -p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
  tmp_path, damage
):
  older, newer = make_state(step=1, seed=1), make_state(step=2, seed=2)
  save(tmp_path, older, newer)
  files = data_files(tmp_path, 2)
  if damage == "flip":
    stored = np.asarray(newer.params["kernel"])
    needle = stored.tobytes()[:4]
    for path in files:
      content = bytearray(path.read_bytes())
      for i in range(len(content)):
        content[i] ^= 0x10
      path.write_bytes(bytes(content))
    assert needle
  for path in files:
    if damage == "truncate":
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage in ("delete", "empty"):
      path.unlink()
  with pytest.warns(UserWarning, match="checkpoint 2"):
    got = restore(tmp_path)
  assert int(got.step) == 1
  np.testing.assert_array_equal(got.params["kernel"], older.params["kernel"])
  # Training goes on from there, and what it saves is not refused.
  assert (tmp_path / "damaged" / "2").exists()
  again = make_state(step=2, seed=4)
  save(tmp_path, again)
  np.testing.assert_array_equal(
    restore(tmp_path).params["kernel"], again.params["kernel"]
  )


def test_a_save_that_failed_in_the_background_is_replaced_by_the_next(
  tmp_path,
):
  with checkpoint.Checkpointer(tmp_path, keep=2) as manager:
    manager.save(make_state(step=1), CONFIG, wait=True)
    right = manager._manager.wait_until_finished
    errors = [OSError("no space left")]

    def fail_once():
      right()
      if errors:
        raise errors.pop()

    manager._manager.wait_until_finished = fail_once
    with pytest.warns(UserWarning, match="no space left"):
      manager.save(make_state(step=2), CONFIG, wait=True)
    assert manager.steps() == [2, 1]


def test_a_silently_changed_value_fails_its_checksum(tmp_path, monkeypatch):
  """A payload whose bytes read well but are not those that were saved."""
  older, newer = make_state(step=1, seed=1), make_state(step=2, seed=2)
  right = state_lib.fingerprint
  save(tmp_path, older)
  wrong = {k: v ^ 1 for k, v in right(state_lib.saved(newer)).items()}
  monkeypatch.setattr(
    state_lib,
    "fingerprint",
    lambda values: wrong if "opt_state" in values else right(values),
  )
  save(tmp_path, newer)
  monkeypatch.setattr(state_lib, "fingerprint", right)
  with pytest.warns(UserWarning, match="checksums do not match"):
    assert int(restore(tmp_path).step) == 1


def test_the_fingerprint_sees_every_single_bit_flip():
  x = np.random.default_rng(0).normal(size=33).astype(np.float32)
  base = state_lib.fingerprint({"x": jnp.asarray(x)})["x"]
  for word in range(x.size):
    for bit in range(32):
      flipped = x.view(np.uint32).copy()
      flipped[word] ^= np.uint32(1 << bit)
      bits = jnp.asarray(flipped)
      assert state_lib.fingerprint({"x": bits})["x"] != base


def test_the_fingerprint_does_not_depend_on_sharding_or_on_dtype_width():
  x = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("d",))
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
  placed = {"x": jax.device_put(x, spec)}
  assert state_lib.fingerprint({"x": x}) == state_lib.fingerprint(placed)


def test_when_nothing_is_intact_there_is_an_error_not_a_fresh_start(tmp_path):
  save(tmp_path, make_state(step=1))
  for path in data_files(tmp_path, 1):
    path.unlink()
  with (
    pytest.warns(UserWarning, match="checkpoint 1"),
    pytest.raises(ValueError, match=r"no checkpoint of \[1\] is intact"),
  ):
    restore(tmp_path)


def test_a_changed_config_is_refused_by_field(tmp_path):
  save(tmp_path, make_state(step=1))
  other = {**CONFIG, "loss": {"beta": 0.5}}
  with pytest.raises(ValueError, match=r"loss.beta \(saved 0.1, now 0.5\)"):
    restore(tmp_path, config=other)
  longer = {**CONFIG, "train": {"steps": 8}}
  assert restore(tmp_path, config=longer) is not None


def test_another_dtype_or_shape_is_refused(tmp_path):
  save(tmp_path, make_state(step=1))
  with pytest.raises(ValueError, match=r"params/bias is float32\[8\] there"):
    restore(tmp_path, make_state(dtype=jnp.bfloat16))


def test_another_reference_is_refused(tmp_path):
  save(tmp_path, make_state(step=1))
  other = make_state().replace(frozen={"ref": {"kernel": jnp.zeros((4, 8))}})
  with pytest.raises(ValueError, match="reference of this run"):
    restore(tmp_path, other)


def test_old_checkpoints_are_dropped_and_one_alone_is_never_kept(tmp_path):
  save(tmp_path, *(make_state(step=s) for s in range(1, 5)))
  kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert {"3", "4"} <= kept
  assert not {"1", "2"} & kept
  with pytest.raises(ValueError, match=r"checkpoint.keep = 1"):
    checkpoint.Checkpointer(tmp_path, keep=1)


def test_policy_of_another_run_is_loaded_and_misfits_are_named(tmp_path):
  state = make_state(step=5, seed=3)
  save(tmp_path, state)
  got = checkpoint.load_params(tmp_path, make_state().params)
  jax.tree.map(np.testing.assert_array_equal, got, state.params)
  wrong = {**state.params, "bias": jnp.zeros(7)}
  with pytest.raises(ValueError, match=r"params/bias is float32\[8\] there"):
    checkpoint.load_params(tmp_path, wrong)
  with pytest.raises(ValueError, match="holds no checkpoints"):
    checkpoint.load_params(tmp_path / "nowhere", state.params)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cut", [False, True])
def test_a_policy_with_a_damaged_file_is_refused_in_one_short_line(
  cut, tmp_path
):
  """Whichever file of it is gone or cut, unless it is not needed.

  Nor does Python print what the reads met that were on their way.
  """
  state = make_state(step=5, seed=3)
  save(tmp_path / "whole", state)
  refused = []
  for number, file in enumerate(data_files(tmp_path / "whole", 5)):
    folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
    lost = folder / file.relative_to(tmp_path / "whole")
    lost.write_bytes(file.read_bytes()[:7]) if cut else lost.unlink()
    try:
      got = checkpoint.load_params(folder, make_state().params)
    except ValueError as error:
      refused.append((str(folder), str(error)))
    else:
      jax.tree.map(np.testing.assert_array_equal, got, state.params)
  assert len(refused) >= 3  # metadata, the manifest, values
  for folder, line in refused:
    assert folder in line
    assert "\n" not in line
    assert len(line) < 300 + len(folder)


def test_one_folder_takes_one_writer(tmp_path):
  with (
    health.lock(tmp_path),
    pytest.raises(ValueError, match="in use by another running process"),
    health.lock(tmp_path),
  ):
    pass
  with health.lock(tmp_path):
    pass
