"""Which mesh axis splits which dimension of which parameter.

One table gives every parameter's logical axes by path, one gives each logical
axis its mesh axis. Both are first-match.
"""

import jax
from jax.sharding import PartitionSpec as P

from dpo_jax import compat, tree
from dpo_jax.ops import reduce

# Path regex -> logical axes; None is the same on every device. Stacks of layers
# have a leading "layers" axis. A quantised kernel is its values and scales.
AXES = (
  (r"embed/tokens$", ("vocab", "embed")),
  (r"embed/positions$", (None, "embed")),
  (r"norm\w*/(scale|bias)$", None),
  (r"attn/q/kernel\b", ("layers", "embed", "heads", None)),
  (r"attn/(k|v)/kernel\b", ("layers", "embed", "kv_heads", None)),
  (r"attn/q/bias$", ("layers", "heads", None)),
  (r"attn/(k|v)/bias$", ("layers", "kv_heads", None)),
  (r"attn/out/kernel\b", ("layers", "heads", None, "embed")),
  (r"mlp/(up|gate)/kernel\b", ("layers", "embed", "mlp")),
  (r"mlp/(up|gate)/bias$", ("layers", "mlp")),
  (r"mlp/down/kernel\b", ("layers", "mlp", "embed")),
  (r"(attn/out|mlp/down)/bias$", ("layers", None)),
  (r"(attn/(q|k|v)|mlp/(up|gate))/lora_a$", ("layers", "embed", None)),
  (r"attn/q/lora_b$", ("layers", None, "heads", None)),
  (r"attn/(k|v)/lora_b$", ("layers", None, "kv_heads", None)),
  (r"attn/out/lora_a$", ("layers", "heads", None, None)),
  (r"mlp/(up|gate)/lora_b$", ("layers", None, "mlp")),
  (r"mlp/down/lora_a$", ("layers", "mlp", None)),
  (r"(attn/out|mlp/down)/lora_b$", ("layers", None, "embed")),
  (r"lora_scale$", None),
  (r"head/kernel$", ("embed", "vocab")),
  (r"head/bias$", ("vocab",)),
  (r"score/kernel$", None),
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
  if logical is None:
    return P()
  if len(logical) != len(shape):
    raise ValueError(f"{path}: shape {shape} does not fit the axes {logical}")
  entries = [RULES[name] for name in logical]
  if path.endswith("kernel/scale"):  # of whole axes, or of tiles of one
    entries = [
      axis if axis is not None and size % axis_sizes[axis] == 0 else None
      for size, axis in zip(shape, entries, strict=True)
    ]
  for dim, (size, axis) in enumerate(zip(shape, entries, strict=True)):
    if axis is not None and size % axis_sizes[axis]:
      raise ValueError(
        f"{path}: dimension {dim} ({logical[dim]}) of size {size} does not "
        f"divide over mesh axis {axis!r} of size {axis_sizes[axis]}; change "
        f"mesh.{axis} or the model's shape"
      )
  return P(*entries)


def inputs(path):
  """Number of input axes of a kernel: attention's output reads N and H."""
  return 2 if path.endswith("attn/out/kernel") else 1


def constrain(x, *logical):
  """Pins the sharding of an array by logical axes; the identity without a mesh.

  On a table it says what is gathered: None in place of "embed" gathers "fsdp".
  """
  if compat.ambient_mesh() is None:
    return x
  return jax.lax.with_sharding_constraint(x, P(*(RULES[n] for n in logical)))
