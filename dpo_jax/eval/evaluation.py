"""The evaluation of a policy, as files of its run folder."""

import json
import math

import jax
import jax.numpy as jnp
from etils import epath

from dpo_jax.config import fields
from dpo_jax.config import saved as saved_lib
from dpo_jax.eval import frontier
from dpo_jax.run import build, forward, held_out
from dpo_jax.train import state as state_lib


def evaluate(setup, params, ref, workdir, made):
  """Writes evaluation.json, and samples.jsonl where there are prompts.

  Args:
    setup: build.Setup.
    params, ref: placed parameters of policy and reference.
    workdir: run folder.
    made: plain dict of how the policy was made, as `done` compares it; "step"
      is the updates behind `params`.
  Returns: the content of evaluation.json.
  Raises: ValueError if the config names nothing to evaluate on.
  """
  config = setup.config
  if config.data.eval is None and config.sample.prompts is None:
    raise ValueError(
      "nothing to evaluate on: set data.eval (held-out comparisons) or "
      "sample.prompts (prompts to continue)"
    )
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  result = dict(made)
  if config.data.eval is not None:
    result["comparisons"] = _held_out(setup, params, ref, workdir)
    result["count"] = build.held_out_loader(setup)[0].comparisons
  if config.sample.prompts is not None:
    summary, rows = frontier.measure(setup, params, ref)
    result |= summary
    if jax.process_index() == 0:
      _write(
        workdir / "samples.jsonl",
        "".join(json.dumps(row) + "\n" for row in rows),
      )
  # Written last: it says that the point is done, and with which config.
  result["config"] = config.to_dict()
  if jax.process_index() == 0:
    text = json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"
    _write(workdir / "evaluation.json", text)
  return result


def made_of(step, data, ref):
  """How a policy was made: its updates, its data, and what it started from.

  Args:
    step: updates.
    data: fingerprint of the training data, or None.
    ref: parameters of the reference.
  """
  sums = state_lib.fingerprint(ref)
  return {"step": step, "data": data, "reference": sums}


def done(config, workdir, made):
  """Whether `workdir` holds the evaluation that `config` asks for.

  Not if it was evaluated in another way, after fewer steps, or if data or
  reference are others now: training again says what is to be done about that.

  Args:
    config: ConfigDict.
    workdir: run folder.
    made: what `evaluate` was given, or would be.
  Raises: ValueError if the policy there is of another config.
  """
  path = epath.Path(workdir) / "evaluation.json"
  if not path.exists():
    return False
  there = json.loads(path.read_text())
  if any(there.get(name) != value for name, value in made.items()):
    return False
  saved, now = saved_lib.upgraded(there["config"]), config.to_dict()
  saved_lib.check_config(saved, now, workdir)
  matters = fields.LENGTH, fields.MEASURE
  return not saved_lib.differences(saved, now, *matters)


def _held_out(setup, params, ref, workdir):
  config = setup.config
  loader, _ = build.held_out_loader(setup)
  if config.ref == "cached":
    forward.attach_reference(setup, ref, loader, workdir)
  zero = jnp.zeros((), jnp.int32)
  frozen = {"ref": ref} if config.ref in ("frozen", "base") else {}
  algorithm = build.make_algorithm(setup)
  # Measured from what the run began with, also where its reference moved on.
  extra = algorithm.extra(ref)
  state = state_lib.TrainState(zero, params, {}, frozen, extra, zero)
  hparams = build.hyper_params(config)
  return held_out.evaluate(setup, algorithm, state, hparams, "policy")


def _plain(value):
  """Values as JSON has them: what is not finite is null."""
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _write(path, text):
  partial = path.parent / f"{path.name}.part"
  partial.write_text(text)
  partial.replace(path)
