"""What a function of the user's own computes, as a digest.

A name says what a function of this package does; of another it says nothing, so
its code is part of what a run is.
"""

import functools
import hashlib
import inspect
import textwrap
import types

import numpy as np

OF = "the code of "  # how it is called where a run is described

_PACKAGE = __name__.partition(".")[0]
_PLAIN = bool | int | float | complex | str | bytes | None


def digest(function):
  """A digest of a function's code; None if it is this package's own.

  Of its source, or where Python does not know it, of its bytecode; and of what
  it takes from around it: its defaults, what it closes over, and the functions
  and plain values of its own module that it names. Of other packages' functions
  it is their names.
  """
  if _of_package(function):
    return None
  told = repr(_told(function, None, []))
  return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def _of_package(function):
  """Whether the code that runs is a function of this package.

  What functools.wraps copies from it says nothing of a wrapper.
  """
  names = getattr(function, "__globals__", {})
  return names.get("__name__", "").partition(".")[0] == _PACKAGE


def _told(value, home, seen):
  """What tells a value from others, as plain values.

  Args:
    value: function, or what one uses.
    home: globals of the function that uses it; only what has the same is
      looked into. None looks.
    seen: functions that are told already.
  """
  if isinstance(value, _PLAIN):
    return repr(value)
  if isinstance(value, list | tuple | dict):
    ordered = isinstance(value, dict)
    parts = sorted(value.items(), key=_by_key) if ordered else value
    return type(value).__name__, [_told(x, home, seen) for x in parts]
  if hasattr(value, "__array__") and not isinstance(value, type):
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()
  if isinstance(value, functools.partial):
    parts = value.func, value.args, value.keywords
    return "partial", [_told(part, home, seen) for part in parts]
  if isinstance(value, types.FunctionType):
    if value in seen or home not in (None, value.__globals__):
      return value.__module__, value.__qualname__
    seen.append(value)
    return _function(value, seen)
  if hasattr(value, "__wrapped__"):  # of jax.jit and the like
    return type(value).__name__, _told(value.__wrapped__, home, seen)
  if home is None:  # an object that is called
    call = type(value).__call__
    held = getattr(value, "__dict__", {})
    return _told(call, None, seen), _told(held, {}, seen)
  return type(value).__name__, getattr(value, "__name__", "")


def _function(function, seen):
  """What a function of the user's own says and uses."""
  code, home = function.__code__, function.__globals__
  try:
    says = textwrap.dedent(inspect.getsource(function))
  except (OSError, TypeError):  # made by exec, or its file is gone
    says = _bytecode(code)
  cells = [cell.cell_contents for cell in function.__closure__ or ()]
  uses = function.__defaults__, function.__kwdefaults__, cells
  names = {n: home[n] for n in _names(code) if n in home and _fixed(home[n])}
  return says, [_told(part, home, seen) for part in (*uses, names)]


def _fixed(value):
  """Whether it is no registry, which others too write into."""
  values = value.values() if isinstance(value, dict) else ()
  return all(isinstance(x, _PLAIN) for x in values)


def _by_key(item):
  return repr(item[0])


def _constants(code):
  """(functions inside a code object, its other constants)."""
  inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
  return inner, [x for x in code.co_consts if x not in inner]


def _bytecode(code):
  inner, others = _constants(code)
  parts = code.co_code.hex(), code.co_names, code.co_varnames, repr(others)
  return parts, [_bytecode(x) for x in inner]


def _names(code):
  """Names that a code object, and the functions inside it, look up."""
  inner, _ = _constants(code)
  return set(code.co_names).union(*map(_names, inner))
