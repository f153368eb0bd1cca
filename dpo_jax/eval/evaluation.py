"""The evaluation of a policy, as files of its run folder."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax
import jax.numpy as jnp
from etils import epath

from dpo_jax import store
from dpo_jax.config import code as code_lib
from dpo_jax.config import fields
from dpo_jax.config import saved as saved_lib
from dpo_jax.eval import frontier, statistics
from dpo_jax.run import forward
from dpo_jax.run import held_out as held_out_lib
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib


def asked_for(run):
  """Whether a base.Measured names anything to evaluate on."""
  return run.held_out is not None or run.setup.sample.prompts is not None


def evaluate(run, params, base, workdir, made):
  """Writes evaluation.json, and samples.jsonl where there are prompts.

  Args:
    run: base.Measured, or a Run.
    params: what was trained, placed.
    base: what it started from, of trained.initial; also the reference.
    workdir: run folder.
    made: plain dict of how the policy was made, as `done` compares it; "step"
      is the updates behind `params`.
  Returns: the content of evaluation.json.
  Raises: ValueError if the config names nothing to evaluate on.
  """
  if not asked_for(run):
    raise ValueError(
      "nothing to evaluate on: set data.eval (held-out comparisons) or "
      "sample.prompts (prompts to continue)"
    )
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  result = dict(made)
  if run.held_out is not None:
    result["comparisons"] = _held_out(run, params, base, workdir)
    loader, _ = run.held_out.loader()
    result["count"], result["examples"] = loader.comparisons, loader.size
  if run.setup.sample.prompts is not None:
    policy = run.setup.trained.model(base, params)
    summary, rows = frontier.measure(run.setup, policy, base)
    result |= summary
    if jax.process_index() == 0:
      lines = "".join(json.dumps(row) + "\n" for row in rows)
      store.write(workdir / "samples.jsonl", lines.encode())
  if run.setup.sample.checkpoints:
    result["checkpoints"] = _on_the_way(run, base, workdir, made["step"])
  # No times: the same evaluation again leaves the same file.
  result["made_with"] = made_with()
  # Written last: it says that the point is done, and with which config.
  result["config"] = run.setup.asked
  if jax.process_index() == 0:
    text = (
      json.dumps(statistics.plain(result), indent=2, allow_nan=False) + "\n"
    )
    store.write(workdir / "evaluation.json", text.encode())
  return result


def _on_the_way(run, base, workdir, last):
  """What the samples of checkpoints before `last` tell: list of {"step", …}.

  As many as were kept: checkpoint.every and checkpoint.keep say which.
  """
  setup, out = run.setup, []
  for step in checkpoint.steps(workdir):
    if step < last:
      print(f"step {step}:", flush=True)
      params = trained_lib.restored(setup, base, workdir, step=step)
      policy = setup.trained.model(base, params)
      summary, _ = frontier.measure(setup, policy, base)
      out.append({"step": step, **summary})
  return out


def made_of(step, data, ref, identity):
  """How a policy was made: its updates, its data, and what it started from.

  And the code of functions of the user's own.

  Args: updates; fingerprint of the data, or None; parameters of the reference;
    what a run that resumes must share, of build.identity.
  """
  sums = state_lib.fingerprint(ref)
  code = {k: x for k, x in identity.items() if k.startswith(code_lib.OF)}
  return {"step": step, "data": data, "reference": sums, **code}


def made_with():
  """{"dpo_jax", "commit", "python", "jax", "device"}; None is not known."""
  device = jax.devices()[0]
  cores = f" ({platform.machine()}, {os.cpu_count()} cores)"
  return {
    "dpo_jax": _version("dpo_jax"),
    "commit": _commit(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "device": f"{jax.device_count()} × {device.device_kind}"
    + (cores if device.platform == "cpu" else ""),
  }


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # on the path, not installed
    return None


def _commit():
  """The commit of this package's checkout, "-dirty" if files changed."""
  folder = pathlib.Path(__file__).parent
  # That it is tracked: an installed copy may lie inside another project's.
  tracked = ("ls-files", "--error-unmatch", "evaluation.py")
  describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  try:
    outputs = [
      subprocess.run(
        ["git", *command], cwd=folder, capture_output=True, check=True
      ).stdout
      for command in (tracked, describe)
    ]
  except (OSError, subprocess.SubprocessError):
    return None
  return outputs[-1].decode().strip()


def done(asked, workdir, made):
  """Whether `workdir` holds the evaluation that a config asks for.

  Not if it was evaluated in another way, after fewer steps, or if data or
  reference are others now: training again says what is to be done about that.

  Args: as `evaluate`, and the config as plain values.
  Raises: ValueError if the policy there is of another config.
  """
  path = epath.Path(workdir) / "evaluation.json"
  if not path.exists():
    return False
  there = store.read_json(path)
  names = made.keys() | {name for name in there if name.startswith(code_lib.OF)}
  if any(there.get(name) != made.get(name) for name in names):
    return False
  if not isinstance(there.get("config"), dict):
    raise ValueError(f"{path} is damaged: it has no config; delete it")
  there = saved_lib.upgraded(there["config"])
  saved_lib.check_config(there, asked, workdir)
  matters = fields.LENGTH, fields.MEASURE
  return not saved_lib.differences(there, asked, *matters)


def _held_out(run, params, base, workdir):
  setup, held_out = run.setup, run.held_out
  if run.reference.cached:
    store = run.reference.store or workdir / "ref_logps"
    loader, _ = held_out.loader()
    forward.attach_reference(setup, base, loader, store)
  # Measured from what the run began with, also where its reference moved on.
  start = setup.trained.init(base, jax.random.key(setup.source.seed))
  extra, zero = held_out.algorithm.extra(start), jnp.zeros((), jnp.int32)
  frozen = setup.trained.frozen(base)
  state = state_lib.TrainState(zero, params, {}, frozen, extra, {})
  return held_out_lib.evaluate(setup, held_out, state)
