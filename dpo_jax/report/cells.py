"""Numbers of a table as texts, with the decimals that their errors justify."""

import math

MISSING = "–"


def column(values, ranges, decimals):
  """Cells of a column; the smallest error gets a digit, three at the most."""
  cells = [
    (v["mean"], v["se"]) if isinstance(v, dict) else (v, *(ends or ()))
    for v, ends in zip(values, ranges, strict=True)
  ]
  errors = [cell[1] for cell in cells if len(cell) == 2 and cell[1]]
  if errors:
    # An error that is small beside the others, such as one of rounding alone
    # or of three seeds that happen to agree, asks for no digits.
    least = min(se for se in errors if se >= max(errors) / 20)
    decimals = min(3, max(0, math.ceil(-math.log10(least))))

  def text(value):
    # + 0.0 so that nothing is -0.0.
    return f"{round(value, decimals) + 0.0:.{decimals}f}"

  return [
    tuple(text(part) for part in cell if part is not None) or (MISSING,)
    for cell in cells
  ]
