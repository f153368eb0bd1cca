"""Samples of a report, side by side."""

from dpo_jax.report import folder

PROMPTS = 3


def prompts(sweep):
  """Samples side by side: the first prompts that all runs with samples share.

  Of runs that differ in seeds alone, the first stands for all.

  Returns: list of (prompt, [(run, its first sample)]).
  """
  drawn, firsts = [], [group.runs[0] for group in sweep.groups]
  for run in [sweep.reference, *firsts] if sweep.reference else firsts:
    first = {}
    for sample in run.samples:
      first.setdefault(sample["id"], sample)
    if first:
      drawn.append((run, first))
  if not drawn:
    return []
  shared = [i for i in drawn[0][1] if all(i in first for _, first in drawn)]
  return [
    (drawn[0][1][i]["prompt"], [(run, first[i]) for run, first in drawn])
    for i in shared[:PROMPTS]
  ]


def score(sweep, sample):
  """The line under a sample: r*, length, whether it ended by itself."""
  parts = []
  reward = (
    folder.number(sample.get(sweep.rewards[0])) if sweep.rewards else None
  )
  if reward is not None:
    parts.append(f"r* {reward:.2f}".replace("-", "−"))
  length = folder.number(sample.get("length"))
  if length is not None:
    parts.append(f"{length} token{'s' if length != 1 else ''}")
  if sample.get("finished") is False:
    parts.append("cut off")
  return " · ".join(parts)
