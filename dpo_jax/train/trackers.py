"""TensorBoard and Weights & Biases, where the config asks for them.

Both come with the extra `log` and are imported when a run opens them.
"""

import importlib
import uuid
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from dpo_jax import store


class Tracker(NamedTuple):
  """Somewhere else that metrics go.

  Attributes:
    write: function (kind, step, {name: float}); kind is "train" or "eval".
    close: function () that waits until all is written.
  """

  write: Callable
  close: Callable


def make(options, asked, workdir, start):
  """The list of Tracker that `config.log` asks for.

  Args:
    asked: the config as plain values, which is recorded with the run.
    workdir: run folder; gets tensorboard/ or wandb/.
    start: step that the run starts from; later ones of an earlier try are
      replaced.
  Raises: ValueError naming the package to install.
  """
  workdir, trackers = epath.Path(workdir), []
  if options.tensorboard:
    trackers.append(_tensorboard(workdir, start))
  if options.wandb is not None:
    trackers.append(_wandb(options.wandb, asked, workdir))
  return trackers


def _tensorboard(workdir, start):
  writer = _module("tensorboardX", "tensorboard").SummaryWriter(
    str(workdir / "tensorboard"), purge_step=start + 1
  )

  def write(kind, step, values):
    for name, value in values.items():
      writer.add_scalar(f"{kind}/{name}", value, step)

  return Tracker(write, writer.close)


def _wandb(project, asked, workdir):
  wandb = _module("wandb", "wandb")
  name = workdir / "wandb_run"  # a resumed run goes on under its own name
  if not name.exists():
    store.write(name, uuid.uuid4().hex.encode())
  run = wandb.init(
    project=project,
    name=workdir.name,
    id=name.read_text(),
    resume="allow",
    dir=str(workdir),
    config=asked,
  )

  def write(kind, step, values):
    run.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)

  return Tracker(write, run.finish)


def _module(package, field):
  """A package that a field of config.log needs."""
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise ValueError(
      f"log.{field} needs {package}: pip install 'dpo_jax[log]', or leave the "
      "field out"
    ) from error
