"""Pure functions on nested dicts of arrays: paths, tables, surgery, sizes."""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util


def path_str(path):
  """`layers/attn/q/kernel` for a JAX key path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree):
  """[(path, leaf)] in tree order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(path_str(path), leaf) for path, leaf in leaves]


def map_named(fn, tree):
  """Maps `fn(path, leaf)` over the tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(path_str(path), leaf), tree
  )


def nest(flat):
  """The nested dict of {path: leaf}; the inverse of `named`."""
  return traverse_util.unflatten_dict(flat, sep="/")


def first_match(table, path):
  """The value of the first (regex, value) whose regex is found in `path`.

  Raises: ValueError if none is; a table must cover every path it is asked for.
  """
  for pattern, value in table:
    if re.search(pattern, path):
      return value
  raise ValueError(f"no pattern of the table matches the path {path!r}")


def matches(patterns, path):
  """Whether any regex of `patterns` is found in `path`."""
  return any(re.search(pattern, path) for pattern in patterns)


def split(tree, predicate):
  """Splits a nested dict by `predicate(path)` into (matching, rest).

  `graft(rest, matching)` gives the tree back.
  """
  matching, rest = {}, {}
  for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
    (matching if predicate(path) else rest)[path] = leaf
  return nest(matching), nest(rest)


def graft(base, addition):
  """The nested dict `base` with the leaves of `addition` added or replaced."""
  out = dict(base)
  for key, value in addition.items():
    both = isinstance(value, dict) and isinstance(out.get(key), dict)
    out[key] = graft(out[key], value) if both else value
  return out


def norm(tree):
  """Euclidean norm over all leaves, summed in f32."""
  squares = [
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, jnp.float32(0)))


def size(tree):
  """Number of elements."""
  return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree):
  """Bytes of all leaves, each counted once whatever its sharding."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
