"""Look a name up in a table, with an error that helps."""

import difflib
import importlib


def nearest(name, names):
  """`; did you mean 'x'?` for the closest of `names`, or an empty string."""
  close = difflib.get_close_matches(str(name), [str(n) for n in names], 1, 0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def lookup(table, name, field):
  """`table[name]`, or a ValueError that names the field and the choices.

  Args:
    table: dict, or any collection of names (then the name itself is returned).
    name: what the user wrote.
    field: the config field it came from, for the message.
  Raises: ValueError with the nearest spelling first.
  """
  if name in table:
    return table[name] if isinstance(table, dict) else name
  raise ValueError(
    f"{field} = {name!r} is not known{nearest(name, table)} "
    f"(allowed: {', '.join(sorted(map(str, table)))})"
  )


def resolve(function, package):
  """A function, given as itself or as "module.name" in a package.

  What is given by name is imported here, when it is asked for: tables of
  functions can so be read without what the functions need.
  """
  if callable(function):
    return function
  module, _, name = function.rpartition(".")
  return getattr(importlib.import_module(f"{package}.{module}"), name)
