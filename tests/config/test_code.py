"""The code of a function of the user's own is part of what a run is."""

import functools
import linecache
import types

import jax
import numpy as np
import pytest

from dpo_jax.config import code
from dpo_jax.ops.losses import margin

LOSS = """
def loss(x):
  return helper(x) * FACTOR
"""
AROUND = """
FACTOR = 2.0
def helper(x):
  return x + 1
"""


def made(source, name="loss", *, known=True, module="__main__"):
  """A function of a cell of a notebook; `known` is its source."""
  names = {"__name__": module, "np": np}
  file = f"<cell {abs(hash(source))}>"
  exec(compile(source, file, "exec"), names)
  if known:
    lines = source.splitlines(keepends=True)
    linecache.cache[file] = len(source), None, lines, file
  return names[name]


@pytest.mark.parametrize("known", [True, False])
def test_the_same_code_run_again_has_the_same_digest(known):
  one, other = (made(AROUND + LOSS, known=known) for _ in range(2))
  assert one is not other
  assert code.digest(one) == code.digest(other)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("* FACTOR", "+ FACTOR"),
    ("FACTOR = 2.0", "FACTOR = 3.0"),  # a constant beside it
    ("x + 1", "x - 1"),  # a function that it calls
    ("x + 1", "x + 2"),
    ("loss(x)", "loss(x, y=1)"),
  ],
)
def test_code_that_changed_has_another_digest(known, old, new):
  source = AROUND + LOSS
  assert source.count(old) == 1
  changed = made(source.replace(old, new), known=known)
  assert code.digest(changed) != code.digest(made(source, known=known))


def test_what_else_stands_in_the_notebook_does_not_matter():
  more = "OTHER = 1\ndef other(x):\n  return x\n"
  assert code.digest(made(more + AROUND + LOSS)) == code.digest(
    made(AROUND + LOSS)
  )


def test_a_registry_that_others_write_into_is_not_part_of_a_loss():
  source = "TABLE = {}\ndef loss(x):\n  return TABLE['dpo'](x)\n"
  one, other = made(source), made(source)
  other.__globals__["TABLE"].update(dpo=max, mine=other)
  one.__globals__["TABLE"].update(dpo=max)
  assert code.digest(one) == code.digest(other)


def test_what_a_function_closes_over_is_part_of_it():
  def scaled(factor):
    return lambda x: factor * x

  assert code.digest(scaled(1.0)) == code.digest(scaled(1.0))
  assert code.digest(scaled(1.0)) != code.digest(scaled(2.0))
  arrays = [scaled(np.arange(3) + shift) for shift in (0, 0, 1)]
  same, also, other = map(code.digest, arrays)
  assert same == also != other


def test_defaults_and_bound_arguments_are_part_of_it():
  def loss(x, *, factor=1.0):
    return factor * x

  twice = functools.partial(loss, factor=2.0)
  assert code.digest(twice) == code.digest(functools.partial(loss, factor=2.0))
  assert code.digest(twice) != code.digest(functools.partial(loss, factor=3.0))
  before = code.digest(loss)
  loss.__kwdefaults__ = {"factor": 2.0}
  assert code.digest(loss) != before


def test_an_object_that_is_called_is_told_by_its_class_and_what_it_holds():
  class Scaled:
    def __init__(self, factor):
      self.factor = factor

    def __call__(self, x):
      return self.factor * x

  assert code.digest(Scaled(1.0)) == code.digest(Scaled(1.0))
  assert code.digest(Scaled(1.0)) != code.digest(Scaled(2.0))


def test_a_compiled_function_is_the_function_it_compiles():
  def one(x):
    return x

  def other(x):
    return 2 * x

  assert code.digest(jax.jit(one)) == code.digest(jax.jit(one))
  assert code.digest(jax.jit(one)) != code.digest(jax.jit(other))


def test_functions_that_call_one_another_come_to_an_end():
  source = """
def loss(x):
  return x if x < 0 else other(x - 1)
def other(x):
  return loss(x)
"""
  assert code.digest(made(source)) == code.digest(made(source))


def test_functions_of_the_package_are_told_by_their_names():
  assert code.digest(margin.dpo) is None


def test_a_wrapper_of_a_function_of_the_package_is_the_users_own():
  @functools.wraps(margin.dpo)
  def louder(*args, **kwargs):
    return margin.dpo(*args, **kwargs)

  def bound(**options):
    return code.digest(functools.partial(margin.dpo, **options))

  assert isinstance(louder, types.FunctionType)
  assert code.digest(louder) is not None
  assert bound(label_smoothing=0.1) != bound(label_smoothing=0.2)
