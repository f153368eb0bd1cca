"""The accelerator set: random weights, bf16 computation, f32 parameters.

Each system runs a shape in a process of its own, one after the other, so that
its peak memory is its own and what does not fit takes nothing with it.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import time
from typing import NamedTuple

import numpy as np

from dpo_jax.models import config as model_config
from dpo_jax.models import write
from scripts.bench import cases, client, inputs


class Shape(NamedTuple):
  """A model to train on an accelerator.

  Attributes:
    name: for the table.
    preset: of models/config.py.
    fields: of config.model that differ from it.
    vocab_size: tokens.
    lora: an adapter on a base in bfloat16, or all parameters in f32.
    pairs: a step.
    mix: of cases.MIXES.
  """

  name: str
  preset: str
  fields: dict
  vocab_size: int
  lora: bool
  pairs: int
  mix: str = "balanced"


_410M = {"embed": 1024, "head_dim": 64, "mlp": 4096, "rotary_dim": 16}
_8B = {"kv_heads": 8, "mlp": 14336, "rope_theta": 500000.0}
SHAPES = (
  Shape("Pythia-410m", "pythia-1.4b", _410M, 50304, False, 64),
  Shape("Pythia-1.4b", "pythia-1.4b", {}, 50304, False, 32),
  Shape("Pythia-2.8b", "pythia-2.8b", {}, 50304, False, 16),
  Shape("8B LoRA", "llama-7b", _8B, 128256, True, 16),
)
SMOKE = Shape("micro", "micro", {}, 256, False, 4, "smoke")
# What dpo_jax chooses by its estimate of the memory; all of it if that fails.
_REMAT = ("auto", "full")
# TRL's parts of a batch: none of these batches fits whole into 80 GB, and parts
# are padded less.
_PARTS = (4, 16)
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
_GOALS = {"Pythia-1.4b": 0.35, "Pythia-2.8b": 0.35}  # of the MFU, on an H100


def job(shape, folder, steps, overrides):
  """What the workers of a shape are told."""
  case = cases.Case(shape.preset, shape.mix, shape.lora, batch=shape.pairs)
  out = inputs.job(folder, case, steps, overrides)
  fields = {
    **{f"model.{name}": value for name, value in shape.fields.items()},
    "model.dtype": "bfloat16",
    "tokenizer": folder / case.model,
  }
  if shape.lora:
    fields["lora.base"] = "bfloat16"
  lora = ",lora" * shape.lora
  return {
    **out,
    "device": True,
    "adapter": None,  # every system draws its own weights
    "config": f"configs/dpo.py:model={shape.preset}{lora}",
    "fields": out["fields"] + [f"{k}={v}" for k, v in fields.items()],
  }


def _describe(shape, folder):
  """Writes what TRL makes its model of, and a tokenizer for both."""
  inputs.tokenizer(folder, shape.vocab_size)
  config = dataclasses.replace(
    model_config.PRESETS[shape.preset], **shape.fields
  )
  raw = write.describe(config, shape.vocab_size)
  raw |= {"bos_token_id": inputs.EOS, "eos_token_id": inputs.EOS}
  (folder / "config.json").write_text(json.dumps(raw))


def measure(shape, folder, *, systems, rounds, steps, seconds, overrides, say):
  """Runs a shape.

  Args:
    shape: Shape.
    folder: pathlib.Path for inputs and logs.
    systems: of cases.SYSTEMS: "ours" and "trl".
    rounds, steps: how often, and steps of each.
    seconds: after which it is killed.
    overrides: of the config.
    say: function of a line of text.
  Returns: plain values; without "seconds" if it does not fit, with those of
    TRL as "trl".
  Raises: client.Failed if ours fails for another reason.
  """
  total = 1 + rounds * steps
  mix, end = cases.MIXES[shape.mix], time.perf_counter() + seconds
  tokens = inputs.write_examples(
    folder, mix, shape.vocab_size, total, shape.pairs
  )
  _describe(shape, folder / shape.preset)
  told = job(shape, folder, total, overrides)
  times = rounds, steps, end
  out = {"shape": shape._asdict(), "mix": mix._asdict(), "steps": steps}
  out["tokens"] = np.reshape(tokens[1:], (rounds, steps)).sum(1).tolist()
  if "ours" in systems:
    forms = [{"fields": [*told["fields"], f"model.remat={r}"]} for r in _REMAT]
    found = _first_that_fits("ours", told, forms, folder, times)
    if found is None:
      return out | {"why": "does not fit"}
    flops = found["facts"].pop("flops")
    out |= found
    out["flops"] = np.reshape(flops[1:], (rounds, steps)).sum(1).tolist()
  if "trl" in systems:
    parts = [{"parts": n} for n in _PARTS if shape.pairs % n == 0]
    try:
      out["trl"] = _first_that_fits("trl", told, parts, folder, times)
    except client.Failed as error:  # what was measured stays
      say(str(error))
  return out


def _first_that_fits(name, told, forms, folder, times):
  """Results of the first of `forms` of a job that the memory takes, or None."""
  rounds, steps, end = times
  there = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
  for form in forms:
    left = max(1, end - time.perf_counter())
    try:
      return _run(name, told | form, folder, there, left, rounds, steps)
    except client.Failed as error:
      if not any(word in str(error) for word in _NO_MEMORY):
        raise
  return None


def _run(name, told, folder, cpus, seconds, rounds, steps):
  """Results of a worker, which has ended."""
  worker = client.Worker(name, told, folder, cpus, seconds)
  try:
    losses, times = worker.steps(1)["losses"], []
    for _ in range(rounds):
      answer = worker.steps(steps)
      times.append(answer["seconds"])
      losses += answer["losses"]
    if not np.isfinite(losses).all():
      raise client.Failed(f"losses are not finite: {losses}")
    return {
      "seconds": times,
      "losses": losses,
      "peak_bytes": answer["peak_bytes"],
      "facts": worker.ready["facts"],
      "versions": worker.ready["versions"],
    }
  finally:
    worker.stop()


_HEAD = (
  *("shape", "pairs a step", "pairs/s", "tokens/s", "MFU"),
  *("peak GiB", "remat", "compile", "TRL pairs/s", "dpo_jax is", "TRL GiB"),
)


def rows(results):
  """The cells of each shape."""
  for name, found in results["shapes"].items():
    pairs = found["shape"]["pairs"]
    if "seconds" not in found:
      why = found.get("why", "not run")
      yield [name, str(pairs), why, *[""] * 8]
      continue
    seconds, facts = np.asarray(found["seconds"]), found["facts"]
    low, mfu, high = np.quantile(share(found), (0.25, 0.5, 0.75))
    yield [
      name,
      str(pairs),
      f"{np.median(pairs * found['steps'] / seconds):.2f}",
      f"{np.median(np.asarray(found['tokens']) / seconds):,.0f}",
      f"{mfu:.1%} ({low:.1%}–{high:.1%})",
      f"{found['peak_bytes'] / 2**30:.1f}" if found["peak_bytes"] else "",
      facts["remat"],
      f"{facts['compile_seconds']:.0f} s, {facts['compilations']}",
      *_beside(found, pairs),
    ]


def _beside(found, pairs):
  """The cells of TRL."""
  other = found.get("trl")
  if other is None:
    return ["", "", ""]
  rate = np.median(pairs * found["steps"] / np.asarray(other["seconds"]))
  times = np.median(other["seconds"]) / np.median(found["seconds"])
  return [f"{rate:.2f}", f"× {times:.2f}", f"{other['peak_bytes'] / 2**30:.1f}"]


def share(found):
  """f64[rounds]: needed FLOP/s as a share of the peak."""
  rate = np.asarray(found["flops"]) / np.asarray(found["seconds"])
  return rate / found["facts"]["peak"][0]


def table(results):
  """The results in Markdown."""
  measured = [r for r in results["shapes"].values() if "seconds" in r]
  of = sorted({r["facts"]["peak"][1] for r in measured})
  lines = [
    f"{results['machine']}, bf16 computation, medians (quartiles); MFU: needed "
    f"FLOP/s as a share {', '.join(of)}",
    "",
  ]
  cells = [_HEAD, ["---", *["---:"] * (len(_HEAD) - 1)], *rows(results)]
  lines += [f"| {' | '.join(row)} |" for row in cells]
  lines += [
    f"{'met   ' if np.median(share(found)) >= bound else 'MISSED'}  {name}: "
    f"MFU {np.median(share(found)):.1%} (≥ {bound:.0%})"
    for name, bound in _GOALS.items()
    if "seconds" in (found := results["shapes"].get(name, {}))
  ]
  return "\n".join(lines)


def run(options, overrides, say):
  """Measures what fits into the time.

  Args:
    options: of the command: rounds, steps, minutes, smoke, cases, systems.
    overrides: of the config.
    say: function of a line of text.
  Yields: (machine, or None as long as no shape ran; name of a shape; results
    of `measure`).
  """
  begin, limit = time.perf_counter(), 60 * (options.minutes or 30)
  shapes = (SMOKE,) if options.smoke else SHAPES
  if options.cases:
    shapes = [shape for shape in shapes if options.cases in shape.name]
  systems = (options.systems or "ours,trl").split(",")
  try:
    client.python(cases.SYSTEMS["trl"])
  except ValueError as error:
    if options.systems and "trl" in systems:
      raise
    say(f"dpo_jax alone: {error}")
    systems = ["ours"]
  machine = None
  for shape in shapes:
    left = limit - (time.perf_counter() - begin)
    say(f"{shape.name} … {left / 60:.0f} minutes left")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
      try:
        found = measure(
          shape,
          pathlib.Path(folder),
          systems=systems,
          rounds=options.rounds or 3,
          steps=options.steps or (1 if options.smoke else 5),
          seconds=max(1, left),
          overrides=overrides,
          say=say,
        )
      except client.Failed as error:
        say(str(error))  # the other shapes may do
        late = time.perf_counter() - begin > limit
        why = "no time left" if late else "failed"
        found = {"shape": shape._asdict(), "why": why}
    found["overrides"] = list(overrides)
    ran = found.get("facts") or (found.get("trl") or {}).get("facts", {})
    machine = ran.get("device", machine)
    yield machine, shape.name, found
