"""Bytes of a device that a stage holds, without activations.

Counted as a run counts them, over a mesh of no devices.
"""

import functools

from dpo_jax import compat
from dpo_jax.config import load
from dpo_jax.models import decoder
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import base, build, memory, trained
from dpo_jax.train import optim


def state(config, model, steps, devices):
  """Bytes of a device for what a run trains and keeps.

  Args:
    config: of the run.
    model: known.Model.
    steps: updates.
    devices: how many there are.
  Raises: ValueError for a mesh that does not divide a parameter.
  """
  setup = _setup(config, model, devices)
  extra = build.algorithm_of(config, setup).extra
  return memory.of_state(setup, optim.make(config.optim, steps), extra)


def drawing(config, model, at_once, batch, devices):
  """Bytes of a device for a policy and what it draws at once."""
  setup = _setup(config, model, devices)
  held = memory.of_shards(trained.model_shapes(setup))
  return held + cache(model, at_once, batch, devices)


def cache(model, at_once, batch, devices):
  """Bytes of a device for the keys and values of what is drawn at once."""
  c = model.config
  width = 2 if c.dtype == "bfloat16" else 4
  of_token = 2 * c.layers * c.kv_heads * c.head_dim * width
  drawn = min(at_once, batch.examples * batch.completions)
  return of_token * batch.whole * drawn / devices


@functools.cache
def _built(model):
  """The decoder.Model, whose shapes are then traced once."""
  return decoder.build(*model)


def _setup(config, model, devices):
  """The base.Setup of a run, as far as its bytes ask for it."""
  # What it starts from may be still to come, and changes no size.
  alone = load.at(config, {"init_from": None})
  if alone.rollout is not None and alone.rollout.get("critic_from"):
    alone = load.at(alone, {"rollout.critic_from": None})
  built = _built(model)
  what, source = build.trained_of(alone, built)
  return base.Setup(
    mesh=_mesh(config.mesh, devices),
    mode=config.mesh.mode,
    model=built,
    tokenizer=None,
    trained=what,
    source=source._replace(spec=config.init_from),
    programs=None,
    data=None,
    sample=None,
    compute=memory.Asked("none", None, config.sweep.together),
    precision=config.precision,
    asked={},
  )


def _mesh(options, devices):
  """The mesh of config.mesh over so many devices, none of which is here."""
  inner = options.fsdp * options.tensor
  data = devices // inner if options.data is None else options.data
  if data * inner != devices:
    raise ValueError(
      f"mesh: data × fsdp × tensor = {data} × {options.fsdp} × "
      f"{options.tensor} do not make up the {devices} devices of plan.devices"
    )
  sizes = (data, options.fsdp, options.tensor, 1)
  return compat.abstract_mesh(sizes, mesh_lib.AXES)
