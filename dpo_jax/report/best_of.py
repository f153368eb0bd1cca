"""Best-of-N in a report: a table of every N, and marks beside the frontier."""

import math

from dpo_jax.report import cells, figures, folder

_TRUTH = "r*"
# (key of the means, head, decimals without an SE); rewards stand before, the
# bound behind the first.
_COLUMNS = (
  ("kl", "KL by ties, nats", 2),
  ("kl_from_reference", "KL from π_ref at most, nats", 2),
  ("length", "length, tokens", 1),
)


def _items(run):
  """What a run's evaluation has of each N: dicts of "n", "bound", "means"."""
  there = run.evaluation.get("best_of")
  items = there.get("best_of") if isinstance(there, dict) else None
  return [
    item
    for item in (items if isinstance(items, list) else ())
    if isinstance(item, dict)
    and folder.number(item.get("n")) is not None
    and folder.number(item.get("bound")) is not None
    and isinstance(item.get("means"), dict)
  ]


def _mean(item, key):
  """{"mean", "se"} of a key; None where it is unknown."""
  value = item["means"].get(key)
  mean = folder.number(value.get("mean")) if isinstance(value, dict) else None
  if mean is None:
    return None
  return {"mean": mean, "se": folder.number(value.get("se"))}


def grid(sweep):
  """The table of every N of every run, as of report.grid.

  Returns: (heads, body); None if no run has any. body: a list of (folder.Entry,
    cells) a line, where the first cell is N.
  """
  lines = [(run, item) for run in sweep.everyone for item in _items(run)]
  if not lines:
    return None
  entries = [
    folder.Entry(run.name, [run], sweep.group_of(run), False)
    for run, _ in lines
  ]
  heads, texts = ["run", "N"], [[(f"{item['n']}",) for _, item in lines]]
  for key, head, decimals in _columns(sweep):
    if key == "bound":
      values = [item["bound"] for _, item in lines]
    else:
      values = [_mean(item, key) for _, item in lines]
    if any(value is not None for value in values):
      heads.append(head)
      texts.append(cells.column(values, [None] * len(values), decimals))
  return heads, list(zip(entries, zip(*texts, strict=True), strict=True))


def _columns(sweep):
  """(key, head, decimals) of all columns behind N."""
  names = [key.removeprefix("reward/") for key in sweep.rewards]
  heads = [f"{_TRUTH} ({name})" for name in names[:1]] + names[1:]
  rewards = [(k, h, 2) for k, h in zip(sweep.rewards, heads, strict=True)]
  return [*rewards, ("bound", "KL at most, nats", 2), *_COLUMNS]


def marks(sweep):
  """figures.Mark of the best of every N > 1 of the reference's draws.

  At the bound of the KL; only where the KL of runs is measured, too.
  """
  if sweep.reference is None or not sweep.rewards:
    return []
  out = []
  for item in _items(sweep.reference):
    reward = _mean(item, sweep.rewards[0])
    if item["n"] > 1 and reward and _mean(item, "kl_from_reference"):
      se = math.nan if reward["se"] is None else reward["se"]
      name = f"best of {item['n']}"
      place = item["bound"], reward["mean"], math.nan, se
      out.append(figures.Mark(name, *place, figures.INK))
  return sorted(out, key=lambda mark: mark.kl)


def _ranked(sweep):
  """ ", ranked by NAME", as far as the runs agree."""
  names = {
    run.evaluation["best_of"].get("ranking")
    for run in sweep.everyone
    if _items(run)
  }
  (name, *others) = names
  if others or not isinstance(name, str):
    return ""
  return f", ranked by {name.removeprefix('reward/')}"


def of_marks(sweep):
  """A sentence on the marks of a figure; "" without any."""
  if not marks(sweep):
    return ""
  return (
    f" Squares: the best of N of the reference's own samples{_ranked(sweep)}, "
    "at log N − (N − 1)/N, the most that their KL can be."
  )


def caption(sweep):
  """What to know to read the table; "" without one."""
  if grid(sweep) is None:
    return ""
  return (
    f"Of a run's samples, the best of N of one prompt{_ranked(sweep)}: means "
    "over all subsets of N of its draws, ± 1 standard error over prompts. KL "
    "at most: log N − (N − 1)/N, the KL of the one chosen from the run's own "
    "policy if no two texts rank alike. KL by ties: the same, estimated from "
    "how many draws do. KL from π_ref at most: that bound and the log-ratio of "
    "the one chosen."
  )
