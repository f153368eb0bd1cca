"""The config is read once, where a run is built; then nobody looks at it."""

import ast

from configs import base, judge
from tests import conftest

PACKAGE = conftest.ROOT / "dpo_jax"
FIELDS = {*base.get_config(), *judge.get_config()}

# Who may read it: what a config is, what builds from it or refuses it, what
# changes it point by point, and the verbs, which hand its sections on.
READERS = (
  *("config/", "run/build.py", "run/checks.py", "run/feeds.py"),
  *("run/rollouts.py", "enumerable/build.py", "plan/"),
  *("sweeps.py", "stages.py", "verbs.py", "export.py"),
)


def reads(tree, algorithm=True):
  """(line, what is read) of the fields of a config that code reads.

  A config is a name `config`, or an attribute of that name; what `make` of an
  algorithm reads does not count (`algorithm`).
  """
  if algorithm and isinstance(tree, ast.FunctionDef) and tree.name == "make":
    return
  if isinstance(tree, ast.Attribute) and tree.attr in FIELDS:
    owner = tree.value
    name = getattr(owner, "attr", getattr(owner, "id", None))
    if name == "config":
      yield tree.lineno, ast.unparse(tree)
  for child in ast.iter_child_nodes(tree):
    yield from reads(child, algorithm)


def test_nobody_reads_the_config_after_the_build():
  seen = [
    f"{path.relative_to(PACKAGE)}:{line} {what}"
    for path in sorted(PACKAGE.rglob("*.py"))
    if not str(path.relative_to(PACKAGE)).startswith(READERS)
    for algorithm in [path.parent.name == "algos"]
    for line, what in reads(ast.parse(path.read_text()), algorithm)
  ]
  assert not seen


def test_a_read_is_seen():
  code = "def f(run):\n  return run.config.data.seed, config.ref\n"
  assert [what for _, what in reads(ast.parse(code))] == [
    "run.config.data",
    "config.ref",
  ]
  of_algorithm = ast.parse("def make(config):\n  return config.ref\n")
  assert not list(reads(of_algorithm))
  assert list(reads(of_algorithm, algorithm=False))
  assert not list(reads(ast.parse("model.config.layers")))


def test_compiled_programs_are_named_fields():
  """No dict keyed by strings that is filled as a run goes on."""
  for path in PACKAGE.rglob("*.py"):
    text = path.read_text()
    assert ".once(" not in text, path
    assert "ChainMap" not in text, path
