"""The fields of a config as a page: values, and what is said where they are."""

import ast
import io
import re
import textwrap
import tokenize

from dpo_jax.config import saved

_WIDTH, _COLUMN = 80, 34
_ENTRY = re.compile(r'^\s*"(\w+)":[^#\n]*# (.+)$', re.MULTILINE)


def comments(source):
  """{field: comment} of a file like configs/base.py, in its order.

  Args:
    source: text; the comment of a field stands above it, behind it, or both.
  """
  readline = io.StringIO(source).readline
  notes, alone = {}, set()
  for token in tokenize.generate_tokens(readline):
    if token.type == tokenize.COMMENT:
      notes[token.start[0]] = token.string.lstrip("# ")
      if token.line.lstrip().startswith("#"):
        alone.add(token.start[0])
  sections, found = {"c": ""}, {}
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Assign):
      continue
    targets = [ast.unparse(target) for target in node.targets]
    name, dot, rest = max(targets, key=len).partition(".")
    if not dot or name not in sections:
      continue
    path = sections[name] + rest
    sections |= {short: f"{path}." for short in targets if "." not in short}
    first = node.lineno
    while first - 1 in alone:
      first -= 1
    lines = [*range(first, node.lineno), node.end_lineno]
    found[path] = " ".join(notes[line] for line in lines if line in notes)
  return found


def entries(source, section):
  """{field: comment} of the dicts of a file that are defaults of a section."""
  return {f"{section}.{name}": note for name, note in _ENTRY.findall(source)}


def page(config, notes):
  """Every field of a config with its value and comment, as text.

  Args:
    config: ConfigDict.
    notes: {field or section: comment}; their order is that of the page.
  """
  flat, order = saved.flatten(config.to_dict()), list(notes)

  def place(path):
    section = path.partition(".")[0]
    return [order.index(x) if x in notes else -1 for x in (section, path)]

  lines, before, inside = [], None, ""
  for path in sorted(flat, key=place):
    section, dot, _ = path.partition(".")
    if dot and section != before and notes.get(section):
      lines += ["", *textwrap.wrap(f"{section}: {notes[section]}", _WIDTH)]
    elif section != before and (dot or inside):
      lines.append("")
    before, inside = section, dot
    value = flat[path]
    value = repr(value) if "\n" in str(value) else value
    lines += _line(f"{path}={value}", notes.get(path, ""))
  return "\n".join(lines).strip()


def _line(field, note):
  """The lines of a field: it, and beside or below it its comment."""
  rest = textwrap.wrap(note, _WIDTH - _COLUMN)
  if len(field) + 2 > _COLUMN or not rest:
    return [field, *(" " * _COLUMN + line for line in rest)]
  first, *rest = rest
  return [
    f"{field:{_COLUMN}}{first}",
    *(" " * _COLUMN + line for line in rest),
  ]
