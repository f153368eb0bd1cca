"""What is installed, used from a folder without the checkout in reach."""

import os
import shutil
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The folder that `pip install .` copies to site-packages."""
  root = tmp_path_factory.mktemp("installed")
  names = ["setup.py", "pyproject.toml", "README.md", "dpo_jax", "configs"]
  for name in names:
    copy = shutil.copytree if (conftest.ROOT / name).is_dir() else shutil.copy
    copy(conftest.ROOT / name, root / name)
  command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"]
  subprocess.run(command, check=True, cwd=root, capture_output=True)
  for name in names:
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  return root / "lib"


def run(installed, folder, *words):
  """stdout and stderr of a command with the installed package."""
  env = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, *words],
    env=env,
    cwd=folder,
    capture_output=True,
    text=True,
  )


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
  out = run(installed, tmp_path, "-c", code).stdout
  assert out.split() == [str(installed / "dpo_jax/__init__.py"), "ipo", "0.3"]


def test_a_config_file_of_ones_own_starts_from_the_installed_base(
  installed, tmp_path
):
  (tmp_path / "mine.py").write_text(OWN)
  code = (
    "import dpo_jax as dj; c = dj.load_config('mine.py:loss=simpo'); "
    "print(c.loss.name, c.data.batch_size)"
  )
  assert run(installed, tmp_path, "-c", code).stdout.split() == ["simpo", "64"]


@pytest.mark.slow
def test_the_installed_command_trains(installed, tmp_path):
  words = ["-m", "dpo_jax", "train", "--config", "dpo:loss=ipo,smoke"]
  done = run(installed, tmp_path, *words, "--workdir", "run")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_the_version_has_one_home(installed, tmp_path):
  done = run(installed, tmp_path, "-m", "dpo_jax", "--version")
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
  done = run(installed, tmp_path, "-m", "dpo_jax", "train", "--config", name)
  if name == "dpo":
    assert "needs --workdir" in done.stderr
  else:
    assert f"--config {name}: no such" in done.stderr
    assert "did you mean 'dpo'?" in done.stderr
  assert len(done.stderr.splitlines()) == 1
