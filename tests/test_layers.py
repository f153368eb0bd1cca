"""Imports go downwards only (the layers of the README)."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "dpo_jax"

LAYERS = (
  ("allocator", "programs", "compat", "tree", "lookup", "origin", "ops"),
  ("models", "data", "parallel"),
  ("algos", "train"),
  ("assembly", "checks", "memory", "weights"),
  ("points", "scoring"),
  ("eval",),
  ("loop", "notebook", "evaluation", "recorder"),
  ("sweeps", "plan", "report", "launch", "publish", "catalogue"),
  ("verbs", "cli"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Within L0 and L2 the packages may use one another; those of L1 may not.
SEPARATE = {"models", "data", "parallel"}


def imports(path):
  """Names of dpo_jax modules that a file imports, as dotted strings."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == "dpo_jax":
        yield from (f"dpo_jax.{alias.name}" for alias in node.names)
      elif node.module.startswith("dpo_jax."):
        yield node.module
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("dpo_jax."):
          yield alias.name


def violations(files):
  for path in files:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    home = parts[0]
    if home == "__init__":
      continue
    assert home in LEVEL, f"{path} belongs to no layer"
    for name in imports(path):
      target = name.split(".")[1]
      upward = LEVEL[target] > LEVEL[home]
      sideways = target != home and {target, home} <= SEPARATE
      if upward or sideways:
        yield f"{'/'.join(parts)} imports {name}"


def test_no_import_goes_upward_or_sideways():
  assert not list(violations(PACKAGE.rglob("*.py")))


def test_the_package_itself_imports_nothing_of_it():
  assert not list(imports(PACKAGE / "__init__.py"))


def test_files_and_functions_keep_to_their_size():
  for path in PACKAGE.rglob("*.py"):
    text = path.read_text()
    assert len(text.splitlines()) <= 350, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        limit = 120 if path.name == "loop.py" else 60
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = node.end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= limit, f"{path}: {node.name} has {lines} lines"


def test_only_run_names_jit_or_pmap_of_a_step():
  for path in PACKAGE.rglob("*.py"):
    if path.name == "run.py":
      continue
    assert "jax.pmap" not in path.read_text(), path
