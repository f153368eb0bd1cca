"""Results as numbers, and as a table in Markdown."""

import numpy as np

from scripts.bench import cases, rounds


def per_round(result, name, what):
  """f64[rounds] of a system: "pairs", "tokens" or "flops", a second."""
  found = result["systems"][name]
  seconds = np.asarray(found["seconds"])
  if name in cases.MATMULS:  # a step of theirs is so many FLOPs
    assert what == "flops", "a matmul has no pairs"
    return found["facts"]["flops"] * result["steps"] / seconds
  work = np.asarray(result[what], float)
  if name == "ours4":  # what four runs would have done
    work = 4 * work
  return work / seconds


def ratio(result, name, to, what="pairs"):
  """f64[rounds]: how many times as fast, round by round."""
  return per_round(result, name, what) / per_round(result, to, what)


def share(result, name):
  """f64[rounds]: needed FLOP/s as a share of the matmul's in that round."""
  return per_round(result, name, "flops") / per_round(result, "matmul", "flops")


def _spread(values, digits=2):
  """`4.97 (4.50–5.20)`: median and quartiles."""
  low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
  return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _head(result):
  unit = _task(result).unit
  speeds = (f"{unit}/s", "dpo_jax is", "tokens/s", "of matmul")
  return ("system", *speeds, "peak GiB", "compile")


def _task(result):
  return cases.TASKS[result["case"].get("task", "dpo")]


def rows(result):
  """The cells of a case, a row for each system that trains."""
  for name, found in result["systems"].items():
    if name in cases.MATMULS:
      continue
    other = name != "ours"
    tokens = np.median(per_round(result, name, "tokens"))
    facts, peak = found["facts"], found["peak_bytes"]
    yield [
      cases.SYSTEMS[name].what,
      _spread(per_round(result, name, "pairs")),
      f"× {_spread(ratio(result, 'ours', name))}" if other else "",
      f"{tokens:,.0f}",
      f"{np.median(share(result, name)):.0%}",
      "" if peak is None else f"{peak / 2**30:.2f}",
      f"{facts['compile_seconds']:.0f} s, {facts['compilations']}"
      if "compile_seconds" in facts
      else "",
    ]


def table(results):
  """The Markdown of results: a table, and a line of matmuls, for each case."""
  lines = [
    f"{results['machine']}, f32, medians (quartiles) of rounds by turns; "
    f"{'; '.join(sorted({r['malloc'] for r in results['cases'].values()}))}"
  ]
  for name, result in results["cases"].items():
    lines += ["", f"**{name}**, {_described(result)}", ""]
    head = _head(result)
    lines += [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    lines += [_line(cells) for cells in rows(result)]
    lines += parts(result)
  return "\n".join(lines)


def parts(result):
  """Lines on where the time of each system goes, of those that tell it.

  Parts lie within others: "rollouts" has "sample", "score" and "measure".
  """
  lines = []
  for name, found in result["systems"].items():
    told = found.get("parts", ())
    if not told:
      continue
    seconds = [
      f"{part} {np.median([t[part] for t in told]) / result['steps']:.1f}"
      for part in told[0]
    ]
    whole = np.median(found["seconds"]) / result["steps"]
    lines.append(
      f"{cases.SYSTEMS[name].what}: {whole:.1f} s an iteration; "
      + ", ".join(seconds)
    )
  return ["", *lines] if lines else []


def _line(cells):
  return f"| {' | '.join(cells)} |"


def _described(result):
  mix = result["mix"]
  matmuls = [
    f"{cases.SYSTEMS[n].what} "
    f"{np.median(per_round(result, n, 'flops')) / 1e9:.0f} GFLOP/s"
    for n in cases.MATMULS
    if n in result["systems"]
  ]
  batch, task = result["case"]["batch"], _task(result)
  lengths = f"completions ~{mix['completion']} tokens, {batch} pairs a step"
  if task.draws:
    lengths = (
      f"{task.draws} completions of {mix['completion']} tokens for each, "
      f"{batch} prompts an iteration"
    )
  return (
    f"prompts ~{mix['prompt']}, {lengths}, {result['rounds']} rounds of "
    f"{result['steps']}; {', '.join(matmuls)}"
  )


def agreement(results):
  """Lines on the losses, and whether all systems agree."""
  lines, good = [], True
  for name, result in results["cases"].items():
    for system, worst in result["disagreement"].items():
      if not worst <= rounds.TOLERANCE:
        good = False
        lines.append(
          f"LOSSES DIFFER  {name}: {system} from ours by {worst:.1e} relative, "
          f"more than {rounds.TOLERANCE:.0e}"
        )
    for line in result.get("unlike", ()):
      good = False
      lines.append(f"OTHER WORK  {name}: {line}")
  everything = [
    worst
    for result in results["cases"].values()
    for worst in result["disagreement"].values()
  ]
  if good and everything:
    lines.append(
      "the losses of all steps and systems agree with ours to "
      f"{max(everything):.1e} relative"
    )
  return lines, good


def goals(results):
  """A line for each goal whose case was measured."""
  lines = []
  for goal in cases.GOALS:
    result = results["cases"].get(goal.case)
    if result is None or not {goal.system, goal.to} <= set(result["systems"]):
      continue
    if goal.what == "memory":
      peaks = [
        result["systems"][name]["peak_bytes"] for name in (goal.system, goal.to)
      ]
      if None in peaks:
        continue
      found, sign = peaks[0] / peaks[1], "≤"
      met = found <= goal.bound
    else:
      found, sign = np.median(ratio(result, goal.system, goal.to)), "≥"
      met = found >= goal.bound
    lines.append(
      f"{'met   ' if met else 'MISSED'}  {goal.case}: {goal.what} of "
      f"{goal.system} / {goal.to} = {found:.2f} ({sign} {goal.bound:.2f})"
    )
  return lines
