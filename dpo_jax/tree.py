"""Pure functions on nested dicts of arrays: paths, tables, surgery, sizes."""

import math
import re

import jax
import jax.numpy as jnp


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
  out = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return out


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

  def walk(node, prefix):
    matching, rest = {}, {}
    for key, value in node.items():
      path = f"{prefix}/{key}" if prefix else key
      if isinstance(value, dict):
        inside, outside = walk(value, path)
        if inside:
          matching[key] = inside
        if outside:
          rest[key] = outside
      else:
        (matching if predicate(path) else rest)[key] = value
    return matching, rest

  return walk(tree, "")


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
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree):
  """Bytes of all leaves, each counted once whatever its sharding."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
