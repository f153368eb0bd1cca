"""What is installed, used from a folder without the checkout in reach."""

import subprocess
import sys

import pytest

import dpo_jax
from tests import conftest

OWN = """
from dpo_jax.configs import base, common


def sweep():
  yield {"loss.beta": 0.5}


def get_config(arg=None):
  arg = common.parse_arg(arg, loss="dpo")
  c = base.get_config()
  c.loss = common.loss(arg.loss)
  return c
"""


def test_one_package_is_installed_with_its_configs_in_it(installed):
  assert [path.name for path in installed.iterdir()] == ["dpo_jax"]
  for path in (conftest.ROOT / "configs").glob("*.py"):
    copy = installed / "dpo_jax" / "configs" / path.name
    assert copy.read_bytes() == path.read_bytes()
  assert (installed / "dpo_jax/report/page.html").is_file()


def test_a_config_is_found_by_its_name_from_any_folder(installed, tmp_path):
  code = (
    "import dpo_jax as dj; c = dj.load_config('dpo:loss=ipo', "
    "['loss.beta=0.3']); print(dj.__file__, c.loss.name, c.loss.beta)"
  )
  out = conftest.run_installed(installed, tmp_path, "-c", code).stdout
  assert out.split() == [str(installed / "dpo_jax/__init__.py"), "ipo", "0.3"]


def test_a_config_file_of_ones_own_starts_from_the_installed_base(
  installed, tmp_path
):
  (tmp_path / "mine.py").write_text(OWN)
  code = (
    "import dpo_jax as dj; c = dj.load_config('mine.py:loss=simpo'); "
    "print(c.loss.name, c.data.batch_size)"
  )
  assert conftest.run_installed(
    installed, tmp_path, "-c", code
  ).stdout.split() == ["simpo", "64"]


@pytest.mark.slow
def test_the_installed_command_trains(installed, tmp_path):
  words = ["-m", "dpo_jax", "train", "--config", "dpo:loss=ipo,smoke"]
  done = conftest.run_installed(installed, tmp_path, *words, "--workdir", "run")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_the_version_has_one_home(installed, tmp_path):
  done = conftest.run_installed(
    installed, tmp_path, "-m", "dpo_jax", "--version"
  )
  assert done.stdout == f"dpo_jax {dpo_jax.__version__}\n"
  told = subprocess.run(
    [sys.executable, "setup.py", "--version"],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
  )
  assert told.stdout.split()[-1] == dpo_jax.__version__
  assert dpo_jax.__version__ not in (conftest.ROOT / "setup.py").read_text()


@pytest.mark.parametrize("name", ["dpo", "configs/dpo.py", "dpi", "dpi.py"])
def test_a_name_that_is_no_config_is_told_the_nearest(
  installed, tmp_path, name
):
  done = conftest.run_installed(
    installed, tmp_path, "-m", "dpo_jax", "train", "--config", name
  )
  if name == "dpo":
    assert "needs --workdir" in done.stderr
  else:
    assert f"--config {name}: no such" in done.stderr
    assert "did you mean 'dpo'?" in done.stderr
  assert len(done.stderr.splitlines()) == 1
