"""Imports go downwards only and without circles (the layers of the README)."""

import ast
import pathlib

from tests import conftest

PACKAGE = conftest.ROOT / "dpo_jax"

LAYERS = (
  ("compat", "tree", "lookup", "host", "progress"),
  ("store",),
  ("lines",),
  ("config",),
  ("ops",),
  ("models", "data", "parallel"),
  ("algos", "train"),
  ("run",),
  ("eval", "preflight"),
  ("loop",),
  (
    "sweeps",
    "stages",
    "plan",
    "report",
    "launch",
    "export",
    "notebook",
    "enumerable",
  ),
  ("verbs",),
  ("cli",),
  ("configs", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# On most floors rooms may use one another; those of this one may not.
SEPARATE = {"models", "data", "parallel"}


def module_of(path):
  """The dotted name of a file."""
  parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
  """Names of dpo_jax modules that a file imports, as dotted strings.

  Those of functions too: what is imported late is imported all the same.
  """
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}:{node.lineno} imports by no whole name"
      if node.module.split(".")[0] == "dpo_jax":
        for alias in node.names:
          whole = f"{node.module}.{alias.name}"
          yield whole if whole in MODULES else node.module
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


def circle(edges):
  """Names along a circle of {name: names}, or None."""
  done, path = set(), []

  def visit(name):
    if name in path:
      return [*path[path.index(name) :], name]
    if name in done:
      return None
    path.append(name)
    for target in sorted(edges.get(name, ())):
      around = visit(target)
      if around:
        return around
    done.add(path.pop())
    return None

  return next(filter(None, map(visit, sorted(edges))), None)


def test_no_import_goes_upward_or_sideways():
  assert not list(violations(PACKAGE.rglob("*.py")))


def test_files_import_one_another_without_a_circle():
  edges = {name: set(imports(path)) for name, path in MODULES.items()}
  assert circle(edges) is None


def test_rooms_import_one_another_without_a_circle():
  edges = {}
  for name, path in MODULES.items():
    home = name.split(".")[1:2]
    targets = {target.split(".")[1] for target in imports(path)}
    for room in home:
      edges.setdefault(room, set()).update(targets - {room})
  assert circle(edges) is None


def test_rooms_of_the_data_import_downwards():
  rooms = ("read", "tokens", "batch", "audit")
  for name, path in MODULES.items():
    if not name.startswith("dpo_jax.data."):
      continue
    level = rooms.index(name.split(".")[2])
    for target in imports(path):
      if target.startswith("dpo_jax.data."):
        assert rooms.index(target.split(".")[2]) <= level, (name, target)


def test_a_circle_is_seen():
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
  assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


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
    if path == PACKAGE / "parallel" / "run.py":
      continue
    assert "jax.pmap" not in path.read_text(), path


def test_tests_mirror_the_package():
  """A room of the package has its tests under the same name."""
  here = pathlib.Path(__file__).parent
  rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert [r for r in rooms if not (here / r).is_dir()] == ["configs"]
