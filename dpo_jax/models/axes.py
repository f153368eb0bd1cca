"""Which mesh axis splits which dimension of which parameter.

One table gives every parameter's logical axes by path, one gives each logical
axis its mesh axis. Both are first-match.
"""

import jax
from jax.sharding import PartitionSpec as P

from dpo_jax import compat, tree
from dpo_jax.ops import reduce

# Path regex -> logical axes. Layer stacks have a leading "layers" axis.
AXES = (
  (r"embed/tokens$", ("vocab", "embed")),
  (r"embed/positions$", (None, "embed")),
  (r"layers/attn/q/kernel$", ("layers", "embed", "heads", None)),
  (r"layers/attn/(k|v)/kernel$", ("layers", "embed", "kv_heads", None)),
  (r"layers/attn/q/bias$", ("layers", "heads", None)),
  (r"layers/attn/(k|v)/bias$", ("layers", "kv_heads", None)),
  (r"layers/attn/out/kernel$", ("layers", "heads", None, "embed")),
  (r"layers/mlp/(up|gate)/kernel$", ("layers", "embed", "mlp")),
  (r"layers/mlp/(up|gate)/bias$", ("layers", "mlp")),
  (r"layers/mlp/down/kernel$", ("layers", "mlp", "embed")),
  (r"layers/(attn/out|mlp/down)/bias$", ("layers", None)),
  (r"layers/norm_\w+/(scale|bias)$", ("layers", None)),
  (r"final_norm/(scale|bias)$", (None,)),
  (r"head/kernel$", ("embed", "vocab")),
  (r"head/bias$", ("vocab",)),
)

# Logical axis -> mesh axis. "rows" are the rows of the batch.
RULES = {
  "rows": reduce.ROWS,
  "embed": "fsdp",
  "vocab": reduce.TENSOR,
  "heads": reduce.TENSOR,
  "kv_heads": reduce.TENSOR,
  "mlp": reduce.TENSOR,
  "layers": None,
  None: None,
}


def spec(path, shape, axis_sizes):
  """The PartitionSpec of a parameter or of its optimiser state.

  Args:
    path: "…/layers/attn/q/kernel"; a prefix such as an optimiser's is fine.
    shape: the array's shape.
    axis_sizes: {mesh axis: size}.
  Raises: ValueError naming path, dimension and axis that do not divide.
  """
  if len(shape) == 0:  # counters
    return P()
  logical = tree.first_match(AXES, path)
  if len(logical) != len(shape):
    raise ValueError(f"{path}: shape {shape} does not fit the axes {logical}")
  entries = [RULES[name] for name in logical]
  for dim, (size, axis) in enumerate(zip(shape, entries, strict=True)):
    if axis is not None and size % axis_sizes[axis]:
      raise ValueError(
        f"{path}: dimension {dim} ({logical[dim]}) of size {size} does not "
        f"divide over mesh axis {axis!r} of size {axis_sizes[axis]}; change "
        f"mesh.{axis} or the model's shape"
      )
  return P(*entries)


def constrain(x, *logical):
  """Pins the sharding of an array by logical axes; the identity without a mesh.

  On a table it says what is gathered: None in place of "embed" gathers "fsdp".
  """
  if compat.ambient_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, P(*(RULES[n] for n in logical)))
