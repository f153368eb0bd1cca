"""The notebooks are their `# %%` files, and run from an empty folder.

    jupytext --update --to ipynb notebooks/*.py

writes them anew after a change.
"""

import os
import pathlib
import re
import subprocess
import sys

import jupytext
import nbclient
import nbformat
import pytest

from tests import conftest

SCRIPTS = sorted((conftest.ROOT / "notebooks").glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]


def notebook(name):
  """The .ipynb of a name."""
  path = conftest.ROOT / "notebooks" / f"{name}.ipynb"
  return nbformat.read(path, as_version=4)


def cells(book):
  return [(cell.cell_type, cell.source) for cell in book.cells]


def test_there_are_five_and_each_has_both_files():
  files = (conftest.ROOT / "notebooks").iterdir()
  assert len(NAMES) == 5
  assert {path.stem for path in files if path.suffix == ".ipynb"} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script(name):
  script = conftest.ROOT / "notebooks" / f"{name}.py"
  assert cells(notebook(name)) == cells(jupytext.read(script)), (
    "write it anew: jupytext --update --to ipynb notebooks/*.py"
  )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_elsewhere_and_shows_nothing_of_here(name):
  book = notebook(name)
  nbformat.validate(book)
  assert book.metadata.kernelspec.name == "python3"
  for cell in book.cells:
    if cell.cell_type == "code":
      assert not cell.outputs
      assert cell.execution_count is None
    assert not re.search(r"/(home|root|tmp|Users)/", cell.source)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_of_code_installs_where_that_is_asked_for(name):
  first = next(c for c in notebook(name).cells if c.cell_type == "code")
  lines = first.source.splitlines()
  assert any(line.startswith("# %pip install") for line in lines)
  assert all(line.startswith("#") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_prose_stands_between_the_cells_and_is_short(name):
  kinds = [cell.cell_type for cell in notebook(name).cells]
  assert kinds[0] == "markdown"
  assert kinds.count("markdown") >= kinds.count("code") // 2
  for cell in notebook(name).cells:
    if cell.cell_type == "markdown":
      assert len(cell.source.splitlines()) <= 10


def executed(name, folder, monkeypatch):
  """The notebook, run in a folder of its own that holds nothing else."""
  monkeypatch.chdir(folder)
  # Only the package is in reach, wherever it is installed, and no checkout.
  flags = os.environ["XLA_FLAGS"].split()
  kept = [flag for flag in flags if "device_count" not in flag]
  monkeypatch.setenv("XLA_FLAGS", " ".join(kept))
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  book = notebook(name)
  nbclient.NotebookClient(
    book,
    timeout=600,
    kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
  ).execute()
  return book


def shown(book):
  """All text that the cells show."""
  text = []
  for cell in book.cells:
    for output in cell.get("outputs", ()):
      assert output.output_type != "error"
      text.append(output.get("text", ""))
      text.append(output.get("data", {}).get("text/plain", ""))
  return "".join(text)


def pictures(book):
  """How many PNGs the cells show."""
  outputs = [o for cell in book.cells for o in cell.get("outputs", ())]
  return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.optimised
def test_the_first_dpo_learns_and_draws_its_curves(tmp_path, monkeypatch):
  book = executed("1_first_dpo", tmp_path, monkeypatch)
  text = shown(book)
  assert "<run runs/first; step 60" in text
  # Of the bar: of text, or a widget where ipywidgets is installed.
  assert "60/60" in text + str(book.metadata.get("widgets", ""))
  assert not re.search(r"^\S+ \d+/60 .*ETA \d+:\d+:?\d*$", text, re.M)
  assert pictures(book) == 2
  assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.slow
@pytest.mark.optimised
def test_a_loss_of_ones_own_logs_margins_and_is_refused_when_changed(
  tmp_path, monkeypatch
):
  text = shown(executed("2_your_own_loss", tmp_path, monkeypatch))
  assert "'rewards/margins'" in text
  assert "the code of LOSSES['mine']" in text
  assert "<run runs/own_loss; step 40" in text


@pytest.mark.slow
@pytest.mark.optimised
def test_a_smaller_beta_goes_further_along_the_frontier(tmp_path, monkeypatch):
  book = executed("3_sweep_beta", tmp_path, monkeypatch)
  lines = re.findall(r"beta=(\S+) +reward +(\S+), KL +(\S+),", shown(book))
  assert [beta for beta, *_ in lines] == ["0.05", "0.2", "1.0", "5.0"]
  rewards, distances = zip(
    *((float(r), float(kl)) for _, r, kl in lines), strict=True
  )
  # The ends are far apart; neighbours may be within their errors. Reward is not
  # in the order of β: too small a one takes the language apart.
  assert distances[0] > 2 * distances[-1]
  assert max(rewards) > 0.5  # of the reference: 0 in the mean of its two kinds
  assert pictures(book) == 1
  assert (tmp_path / "runs/betas/report.html").exists()


@pytest.mark.slow
@pytest.mark.optimised
def test_eight_fake_devices_compute_what_one_does(tmp_path, monkeypatch):
  text = shown(executed("4_sharding", tmp_path, monkeypatch))
  assert len(re.findall(r"one device +\S+ +eight devices", text)) == 3
  assert "parameters differ by" in text


@pytest.mark.slow
@pytest.mark.optimised
def test_an_adapter_is_exported_as_transformers_reads_it(tmp_path, monkeypatch):
  text = shown(executed("5_adapter_export", tmp_path, monkeypatch))
  assert "model.safetensors" in text
  try:
    import torch  # noqa: F401
  except ImportError:
    assert "torch is not installed" in text
  else:
    (ours,) = re.findall(r"here +(\[.*\])", text)
    (theirs,) = re.findall(r"transformers +(\[.*\])", text)
    assert ours == theirs


def test_a_notebook_whose_script_changed_is_written_anew(tmp_path):
  """So the command of this file's docstring is the right one."""
  for suffix in (".py", ".ipynb"):
    path = conftest.ROOT / "notebooks" / f"{NAMES[0]}{suffix}"
    (tmp_path / path.name).write_bytes(path.read_bytes())
  script = pathlib.Path(tmp_path / f"{NAMES[0]}.py")
  script.write_text(script.read_text() + "\n# %%\n1 + 1\n")
  command = [sys.executable, "-m", "jupytext", "--update", "--to", "ipynb"]
  subprocess.run([*command, str(script)], check=True, capture_output=True)
  book = nbformat.read(tmp_path / f"{NAMES[0]}.ipynb", as_version=4)
  assert cells(book)[-1] == ("code", "1 + 1")
  assert book.metadata.kernelspec.name == "python3"
