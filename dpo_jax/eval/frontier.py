"""Where a policy stands between reward and KL: measured on its own samples."""

import collections
import math

import numpy as np

from dpo_jax import progress
from dpo_jax.data.tokens import comparisons
from dpo_jax.eval import (
  best_of,
  completions,
  generate,
  prompting,
  rewards,
  statistics,
)
from dpo_jax.run import forward


def measure(setup, params, ref):
  """Samples of a policy for `sample.prompts`, and what they tell.

  Args:
    setup: base.Setup; `sample` says which prompts, how many draws and
      which scorers.
    params, ref: placed parameters of policy and reference.
  Returns: (summary, rows). summary: "samples", "means" ({"mean", "se"} of every
    reward, "kl", "log_ratio" in nats and "length" in tokens), "distinct_1" and
    "distinct_2"; no KL unless temperature and top_p are 1, since else the
    samples are not the policy's; and "best_of", of best_of.measure, where
    sample.best_of asks for it; and "halves" where checkpoints are sampled, see
    `halves`. rows: a dict a sample, as completions.describe,
    with "kl" and "log_ratio".
  """
  options = setup.sample
  scorers = rewards.load_all(options.scorers)
  given = generate.prompts(setup)
  generate.check(setup, scorers, given)
  batches = -(-len(given) * options.draws // options.batch_size)
  drawn = [
    draw
    for batch in progress.over(
      generate.draws(setup, params, given), batches, "batches drawn"
    )
    for draw in batch
  ]
  bos = setup.tokenizer.bos_id
  cuts = [prompting.cut(d, setup.tokenizer, options.stop) for d in drawn]
  drawn = [draw for draw, _ in cuts]
  rows = completions.describe(drawn, scorers, options.draws, bos)
  # Of all that was drawn until a text stopped, with what stopped it.
  examples = [
    comparisons.Example(d.id, 0, d.prompt_ids, (ids,), ()) for d, ids in cuts
  ]
  names = [f"reward/{s.name}" for s in scorers] + ["length"]
  # Of other distributions than π itself these would be no estimates of the KL.
  if options.temperature == 1 and options.top_p == 1:
    names[-1:-1] = ["kl", "log_ratio"]
    loader = forward.loader_of(setup, examples)
    for index, kl, ours, theirs in forward.token_kl(setup, params, ref, loader):
      rows[index]["kl"] = math.fsum(kl)
      rows[index]["log_ratio"] = math.fsum(ours) - math.fsum(theirs)
  summary = {
    "samples": len(rows),
    "means": {name: mean(rows, name) for name in names},
    "finished": sum(row["finished"] for row in rows) / len(rows),
  }
  if options.checkpoints:
    summary["halves"] = halves(rows, names)
  ends = setup.tokenizer.end_ids
  texts = [[i for i in d.ids if i not in ends] for d in drawn]
  for n in (1, 2):
    summary[f"distinct_{n}"] = distinct(texts, n)
  if options.best_of:
    ranking = completions.ranking(options, scorers)
    summary["best_of"] = best_of.measure(rows, options.best_of, ranking)
  return summary, rows


def mean(rows, name):
  """Mean over prompts of each prompt's mean, and its standard error."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row["id"]].append(row[name])
  return statistics.over_prompts([np.mean(group) for group in groups.values()])


def halves(rows, names):
  """[{name: mean}, {name: mean}]: of every other prompt, and of the others.

  Of many checkpoints the best on some prompts seems better than it is; what it
  is worth is told by prompts that did not choose it.
  """
  ids = sorted({row["id"] for row in rows})
  parts = [set(ids[start::2]) for start in (0, 1)]
  return [
    {n: mean([r for r in rows if r["id"] in part], n)["mean"] for n in names}
    for part in parts
    if part
  ]


def distinct(texts, n):
  """Distinct n-grams over all n-grams of a list of token lists.

  Source: Li et al. 2016, arXiv:1510.03055 section 4.
  """
  grams = [
    tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)
  ]
  return len(set(grams)) / max(1, len(grams))
