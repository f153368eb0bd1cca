"""One case: all its workers, by turns, on the same inputs."""

import contextlib

import numpy as np

from scripts.bench import cases, client, inputs, prompts

TOLERANCE = 1e-4  # relative, of a step's loss
# What a worker on policy says: of each iteration the mean score, the norm of
# the gradient and the FLOPs that it needs, and the seconds of its parts.
_ON_POLICY = ("scores", "norms", "flops", "parts")
# Two systems draw differently: their mean scores lie within so many standard
# errors, and the norms of their gradients, medians, within this factor.
ERRORS, FACTOR = 4.0, 1.5


def measure(case, folder, *, rounds, cpus, overrides, tick):
  """Runs a case.

  Round by round each worker does the same batches while the others wait; who
  comes first changes with the round.

  Args:
    case: cases.Case.
    folder: pathlib.Path for inputs and logs.
    rounds: how often.
    cpus: set of CPUs that a worker may use.
    overrides: of the config of `ours`.
    tick: called with a line of text after each piece of work.
  Returns: plain values, for the results.
  Raises: client.Failed.
  """
  steps, warm_up = case.steps, cases.TASKS[case.task].warm_up
  total = warm_up + rounds * steps
  made = prompts if case.draws else inputs
  tokens = made.make(folder, case, total)
  job = made.job(folder, case, total, overrides)
  if case.adapter:
    inputs.write_adapter(job)
  if case.task == "reward":
    inputs.write_head(job)
  with contextlib.ExitStack() as stack:
    workers, out = [], {}
    for name in case.systems:
      job["points"] = 4 if name == "ours4" else 1
      worker = client.Worker(name, job, folder, cpus)
      stack.callback(worker.stop)
      first = worker.steps(warm_up)
      workers.append(worker)
      out[name] = _start(worker.ready, first)
      tick(f"{name} ready")
    for number in range(rounds):
      shift = number % len(workers)
      for worker in workers[shift:] + workers[:shift]:
        answer = worker.steps(steps)
        found = out[worker.name]
        for time in ("seconds", "cpu_seconds"):
          found[time].append(answer[time])
        found["peak_bytes"] = answer["peak_bytes"]
        for what in ("losses", *_ON_POLICY):
          if what in answer:
            found.setdefault(what, []).extend(answer[what])
        tick(f"round {number + 1}/{rounds} {worker.name}")
  return {
    "case": case._asdict(),
    "mix": cases.MIXES[case.mix]._asdict(),
    "rounds": rounds,
    "steps": steps,
    "pairs": case.units * steps,
    "tokens": _by_round(tokens, rounds, steps),
    "flops": _by_round(_flops(out["ours"]), rounds, steps),
    "malloc": client.MALLOC,
    "systems": out,
    "disagreement": {} if case.draws else disagreement(case, out),
    "unlike": unlike(case, out) if case.draws else [],
  }


def _start(ready, first):
  """The results of a worker that has warmed up."""
  # Tunix compiles in its first step.
  late = ("compile_seconds", "compilations")
  facts = {**ready["facts"], **{k: first[k] for k in late if k in first}}
  return {
    "start_seconds": ready["start_seconds"],
    "versions": ready["versions"],
    "facts": facts,
    "seconds": [],
    "cpu_seconds": [],
    "losses": first["losses"],
    "peak_bytes": first["peak_bytes"],
  }


def _flops(ours):
  """FLOPs that each step needs; of what is drawn only those timed are known."""
  return ours["facts"].pop("flops", None) or ours.pop("flops")


def _by_round(values, rounds, steps):
  """Sums of what each step has, for each round; the last steps are timed."""
  return np.reshape(values[-rounds * steps :], (rounds, steps)).sum(1).tolist()


def disagreement(case, systems):
  """{system: largest relative difference of a step's loss to ours}.

  Every system starts from the same weights and sees the same batches. Where the
  peer's adapter is another one it is of the first step, in which the policy is
  the reference.
  """
  out = {}
  for name, found in systems.items():
    first = case.lora and not case.adapter and name != "ours4"
    count = 1 if first else None
    mine = np.asarray(systems["ours"]["losses"][:count])
    losses = np.asarray(found["losses"][:count])
    if name == "ours" or not losses.size:
      continue
    out[name] = float(np.max(np.abs(losses - mine) / np.abs(mine)))
  return out


def unlike(case, systems):
  """Lines that say in what a system on policy does not do what ours does.

  What is drawn differs, so scores and gradients are the same on average only.
  The score of a completion of N words is a mean of N coin tosses.
  """
  out, mine = [], systems["ours"]
  drawn = cases.MIXES[case.mix].max_completion * case.units
  for name, found in systems.items():
    if name == "ours" or "scores" not in found:
      continue
    error = np.sqrt(2 * 0.25 / drawn)  # Tunix draws with the same seed again
    gap = abs(np.mean(found["scores"]) - np.mean(mine["scores"]))
    if not gap <= ERRORS * error:
      out.append(f"{name}: mean score {gap:.3f} from ours")
    ratio = np.median(found["norms"]) / np.median(mine["norms"])
    if not 1 / FACTOR <= ratio <= FACTOR:
      out.append(f"{name}: gradients of {ratio:.2f} × the norm of ours")
  return out
