"""What the package may not do: run code that comes with data or a model."""

import ast

import pytest

from tests import conftest, test_layers

FILES = [
  *test_layers.MODULES.values(),
  *(conftest.ROOT / "configs").glob("*.py"),
]
# Modules whose readers run code, or build any object, of what they read.
READERS = {
  *("cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle"),
  *("shelve", "yaml"),
}
# Built-in functions that run text.
RUNNERS = {"compile", "eval", "exec"}
# Functions of libraries that read pickles, unless they are told not to.
UNPICKLERS = {"torch.load", "pd.read_pickle", "pandas.read_pickle"}


def calls(source):
  """(dotted name, {keyword: node}, line) of each call."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      named = {word.arg: word.value for word in node.keywords}
      yield ast.unparse(node.func), named, node.lineno


def is_(node, value):
  return isinstance(node, ast.Constant) and node.value is value


def problems(source):
  """Lines on what of a file could run code that comes with what it reads."""
  tree = ast.parse(source)
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or ""]
    for name in {name.partition(".")[0] for name in names} & READERS:
      yield f"{node.lineno}: imports {name}"
  for name, words, line in calls(source):
    if name in RUNNERS:
      yield f"{line}: {name} runs text"
    if name in UNPICKLERS and not is_(words.get("weights_only"), True):
      yield f"{line}: {name} reads pickles"
    if any(is_(words.get(word), True) for word in ("allow_pickle", "shell")):
      yield f"{line}: {name}: allow_pickle or shell"
    if not name.endswith(("from_pretrained", "load_dataset")):
      continue
    if not is_(words.get("trust_remote_code"), False):
      yield f"{line}: {name} without trust_remote_code=False"
    if "Model" in name and not is_(words.get("use_safetensors"), True):
      yield f"{line}: {name} without use_safetensors=True"


@pytest.mark.parametrize(
  "path", FILES, ids=lambda path: str(path.relative_to(conftest.ROOT))
)
def test_no_file_runs_code_of_what_it_reads(path):
  assert not list(problems(path.read_text()))


@pytest.mark.parametrize(
  "line",
  [
    "import pickle",
    "from pickle import loads",
    "import torch; torch.load('x')",
    "np.load('x', allow_pickle=True)",
    "eval('1')",
    "exec(text)",
    "subprocess.run(text, shell=True)",
    "transformers.AutoTokenizer.from_pretrained('x')",
    "AutoTokenizer.from_pretrained('x', trust_remote_code=True)",
    "AutoTokenizer.from_pretrained('x', trust_remote_code=asked)",
    "AutoModel.from_pretrained('x', trust_remote_code=False)",
    "datasets.load_dataset('x')",
  ],
)
def test_the_lint_finds(line):
  assert list(problems(line))
