"""The inputs of a case on policy: prompts, in the order of all systems.

prompts.jsonl   {"prompt"}, texts whose words are the ids; data of `ours`
in_order.jsonl  the same lines, in the order in which `ours` draws for them
"""

import json
import pathlib

import numpy as np

from dpo_jax.data.batch import order
from scripts.bench import cases, inputs

_SEED = 0  # of rollout.seed and data.seed: configs/base.py
# config.loss of both sides; TRL's own, of GRPO that of the paper.
BETA = {"ppo": 0.05, "rloo": 0.05, "grpo": 0.04}


def make(folder, case, steps):
  """Writes the inputs of a case.

  Args: as of inputs.make.
  Returns: tokens that each iteration draws.
  """
  inputs.make_model(folder, case)
  mix = cases.MIXES[case.mix]
  write(folder, mix, cases.VOCABULARY[case.model], steps, case.batch)
  return [case.units * mix.max_completion] * steps


def write(folder, mix, vocab_size, steps, batch):
  """Writes the prompts of so many iterations of `batch` prompts."""
  rng = np.random.default_rng(_SEED)
  count = max(inputs.PLANNED, steps) * batch
  lengths = inputs.lengths(rng, mix.prompt, mix.max_prompt, count)
  lines = [
    json.dumps({"prompt": " ".join(map(str, rng.integers(1, vocab_size, n)))})
    for n in lengths
  ]
  in_order = [lines[index] for index in turns(count, steps * batch)]
  for name, here in (("prompts", lines), ("in_order", in_order)):
    path = pathlib.Path(folder) / f"{name}.jsonl"
    path.write_text("".join(f"{line}\n" for line in here))


def turns(count, drawn):
  """Numbers of the prompts that `ours` draws for, which it shuffles twice."""
  chosen = np.random.default_rng(_SEED).permutation(count)
  return chosen[order.stream(0, drawn, count, _SEED)].tolist()


def job(folder, case, steps, overrides):
  """What the workers of a case are told, as plain values."""
  out = inputs.common(folder, case, steps) | {
    "task": case.task,
    "draws": case.draws,
    "beta": BETA[case.task],
    "clip": 0.2,
    "vocab_size": cases.VOCABULARY[case.model],
  }
  return {
    **out,
    "config": f"configs/ppo.py:loss={case.task},optim=rmsprop,"
    f"model=hf:{out['model']}",
    "fields": fields(out, folder),
    "overrides": list(overrides),
  }


def fields(job, folder):
  """Fields of dpo_jax's config that a job fixes, as "name=value"."""
  values = {
    "data.train": pathlib.Path(folder) / "prompts.jsonl",
    "data.batch_size": job["batch"],
    "data.max_prompt_length": job["max_prompt"],
    "data.max_completion_length": job["max_completion"],
    "rollout.prompts": job["batch"],
    "rollout.draws": job["draws"],
    "rollout.epochs": 1,
    "rollout.batch_size": job["batch"] * job["draws"],
    "rollout.scorer": "bench:words",
    "loss.beta": job["beta"],
    "loss.clip": job["clip"],
    "train.steps": job["steps"],
    **inputs.optimizer(job),
  }
  if job["task"] == "ppo":  # as Tunix has it
    values["rollout.critic"] = "copy"
  return [f"{name}={value}" for name, value in values.items()]
