"""Compiled programs that are kept run as whoever finds them."""

import os
import types
import warnings

import pytest

from dpo_jax import host


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder that JAX is told of, writable by its owner alone."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "kept"))
  monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
  (tmp_path / "kept").mkdir(mode=0o700)
  return tmp_path / "kept"


def kept():
  """The warnings of host.keep, as text."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    host.keep()
  return [str(each.message) for each in said]


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o702])
def test_a_folder_of_programs_that_others_can_write_is_warned_of(mode, folder):
  assert not kept()
  folder.chmod(mode)
  (said,) = kept()
  assert f"{folder}: others can write there" in said
  assert "chmod go-w" in said


def test_so_is_one_of_another_user(folder, monkeypatch):
  right = os.stat

  def of_another(path, **kwargs):
    about = right(path, **kwargs)
    names = ("st_mode", "st_uid")
    found = {name: getattr(about, name) for name in names}
    return types.SimpleNamespace(**{**found, "st_uid": os.getuid() + 7})

  monkeypatch.setattr(host.pathlib.Path, "stat", of_another)
  monkeypatch.setattr(host.pathlib.Path, "is_dir", lambda _: True)
  assert len(kept()) == 1


@pytest.mark.parametrize("off", ["0", "false"])
def test_nothing_is_said_where_nothing_is_kept(off, folder, monkeypatch):
  folder.chmod(0o777)
  monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", off)
  assert not kept()


@pytest.mark.parametrize("name", ["not/there", "gs://bucket/programs"])
def test_nor_of_a_folder_that_is_none_here(name, folder, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", name)
  assert not kept()
