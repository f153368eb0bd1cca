"""Judges the pairs of a config and writes what came of it.

    judgements.jsonl   a row a pair: texts, verdict, and what it rests on
    judge.json         rates with their intervals, agreement, cost, settings

No times: the same judging again leaves the same files.
"""

import importlib.metadata
import json

from etils import epath

import dpo_jax
from dpo_jax import store
from dpo_jax.config import fields, saved
from dpo_jax.eval import statistics
from dpo_jax.eval.judge import agreement, judges, matched, rates, table


def judge(options, asked, workdir):
  """Judges, prints a table, writes two files.

  Args:
    options: the fields of config.judge.
    asked: plain dict of the config.
    workdir: folder of the results.
  Returns: the content of judge.json; None where a form was written instead.
  Raises: ValueError, also for a folder with results of another judge.
  """
  workdir = epath.Path(workdir)
  _same(workdir, asked)
  samples, pairs, told = matched.pairs(options)
  for line in told:
    print(line)
  decided, about, told = judges.decide(pairs, options)
  for line in told:
    print(line)
  if decided is None:
    return None
  rows = [_row(*each) for each in zip(pairs, decided, strict=True)]
  result = {
    "judge": options.by,
    "against": options.against,
    "prompts": len(pairs) // len(samples),
    **_rates(samples, pairs, decided, options.seed),
    "agreement": [agreement.compare(rows, p) for p in options.agree_with],
    "asked": about,
    "made_with": {
      "dpo_jax": dpo_jax.__version__,
      "scipy": importlib.metadata.version("scipy"),
    },
    "config": asked,
  }
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  store.write(workdir / "judgements.jsonl", lines.encode())
  text = json.dumps(statistics.plain(result), indent=2, allow_nan=False)
  store.write(workdir / "judge.json", f"{text}\n".encode())
  print(table.text(result))
  print(f"results: {workdir / 'judge.json'}")
  return result


def _same(workdir, asked):
  """Refuses a folder with the results of other questions."""
  path = workdir / "judge.json"
  if not path.exists():
    return
  before = store.read_json(path).get("config") or {}
  changed = saved.differences(before, asked, fields.MEASURE)
  if changed:
    raise ValueError(
      f"{workdir} holds results of another judging: {'; '.join(changed)}. Use "
      "a new --workdir, or set these fields back"
    )


def _row(pair, verdict):
  """A row of judgements.jsonl."""
  return {
    **pair._asdict(),
    "verdict": verdict.value,
    "why": verdict.why,
    **verdict.about,
  }


def _rates(samples, pairs, decided, seed):
  """{"results": of each sample file, "differences": to the first of them}."""
  n = len(pairs) // len(samples)
  results, differences = [], []
  for number, each in enumerate(samples):
    part = slice(n * number, n * (number + 1))
    about = {"samples": each.name, "temperature": each.temperature}
    found = rates.of_samples(pairs[part], decided[part], seed)
    results.append({**about, **found})
    if number:
      between = rates.between(decided[:n], decided[part], seed)
      differences.append({"samples": each.name, **between})
  return {"results": results, "differences": differences}
