"""A plan as text."""

from dpo_jax import lookup
from dpo_jax.train import log


def text(planned, options):
  """Rows as text: a line a stage, their sum, and what is assumed.

  Args: list of Row; config.plan, see configs/common.py.
  Raises: ValueError for an unknown device, or shares that are none.
  """
  peak = lookup.lookup(dict(log.PEAK_FLOPS), options.device, "plan.device")
  for name in ("mfu", "sampling"):
    if not 0 < options[name] <= 1:
      raise ValueError(
        f"plan.{name} = {options[name]} is a share of the peak: it must be in "
        "(0, 1]"
      )
  speed = peak * options.devices * 3600

  def hours(row):
    return (row.flops / options.mfu + row.drawing / options.sampling) / speed

  heads = ("stage", "examples", "tokens", "FLOPs", "GiB/device", "hours")
  lines, whole = [heads], [row for row in planned if row.unknown is None]
  for row in planned:
    stage = row.stage
    times = f" × {stage.points}" if stage.points > 1 else ""
    name = f"{stage.verb} {stage.name}{times}"
    if row.unknown is not None:
      lines.append((name, row.unknown))
    elif not row.examples:
      lines.append((name, *"–––––"))
    else:
      lines.append(_cells(name, row, hours(row), row.memory))
  if whole:
    names = ("examples", "tokens", "flops", "drawing")
    sums = {name: sum(getattr(row, name) for row in whole) for name in names}
    most = max(row.memory for row in whole)
    total = whole[0]._replace(**sums)
    lines.append(_cells("all", total, sum(map(hours, whole)), most))
  widths = [
    max(len(line[k]) for line in lines if len(line) == len(heads))
    for k in range(len(heads))
  ]
  out = []
  for name, *cells in lines:
    if len(cells) == 1:
      out.append(f"{name.ljust(widths[0])}  not known: {cells[0]}")
      continue
    padded = [x.rjust(w) for x, w in zip(cells, widths[1:], strict=True)]
    out.append("  ".join([name.ljust(widths[0]), *padded]))
  return "\n".join([*out, _assumed(options, peak)])


def _cells(name, row, hours, held):
  return (
    name,
    f"{row.examples:,.0f}",
    f"{row.tokens:,.0f}",
    f"{row.flops + row.drawing:.2e}",
    f"{held / 2**30:.1f}",
    f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}",
  )


def _assumed(options, peak):
  """What the hours of a table rest on."""
  return (
    f"assumed: {options.devices} × {options.device} at {peak / 1e12:.0f} "
    f"TFLOP/s each; training and scoring reach {options.mfu:.0%} of it "
    f"(plan.mfu), drawing {options.sampling:.1%} (plan.sampling); GiB without "
    "activations; lengths of plan.records, else the limits; held-out "
    "evaluation, scorers of torch and loading are not counted"
  )
