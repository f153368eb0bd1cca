"""Checkpoints with exact resume: Orbax, checksums and the run's config."""

import contextlib
import functools
import inspect
import re
import sys
import warnings

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax import tree
from dpo_jax.config import saved as saved_lib
from dpo_jax.train import guard
from dpo_jax.train import state as state_lib


class Checkpointer:
  """Saves and restores the train state under `workdir/checkpoints`."""

  def __init__(self, workdir, *, keep):
    """Args:
    workdir: run folder, local or gs://….
    keep: checkpoints kept, at least 2 (a failed save must not cost the last).
    """
    if keep < 2:
      raise ValueError(f"checkpoint.keep = {keep} must be at least 2")
    self._folder = epath.Path(workdir).absolute()
    self._path = self._folder / "checkpoints"
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    self._manager = _manager(self._path, options)
    self._frozen = None  # fingerprint of what is never trained, taken once

  def steps(self):
    """Steps on disk, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state, identity, *, wait=False):
    """Saves a state in the background, or durably with `wait`.

    Waits for the save before this one. If that failed, it is a warning: this
    one takes its place.

    Args:
      state: TrainState.
      identity: plain dict of what a run that resumes must share.
    Raises: OSError and the like if `wait` and it cannot be written.
    """
    step = int(state.step)
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # whatever the store raised
      warnings.warn(f"a checkpoint was not written: {error}", stacklevel=2)
      self._manager.reload()
    if step in self._manager.all_steps():
      return
    values = state_lib.saved(state)
    meta = {
      "config": identity,
      "checksums": state_lib.fingerprint(values),
      "frozen": self._fingerprint_frozen(state),
      "leaves": _leaves(values),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(values), meta=ocp.args.JsonSave(meta)
    )
    if not self._manager.save(step, args=args):
      raise OSError(f"{self._path}: step {step} was not accepted for saving")
    if wait:
      self._manager.wait_until_finished()

  def restore(self, state, identity):
    """The newest intact checkpoint in the shape of `state`.

    A checkpoint that cannot be read or fails its checksums is passed over with
    a warning and, once an older one proved intact, moved to `damaged/`; if none
    is intact, that is an error, not a fresh start.

    Args:
      state: placed TrainState; its frozen part is kept.
      identity: plain dict; must equal the saved one but for the free fields.
    Returns: TrainState, or None if nothing was ever saved here.
    Raises: ValueError naming the differing field or leaf.
    """
    steps, damaged = self.steps(), []
    for step in steps:
      try:
        values, meta = self._read(step, state_lib.saved(state), identity)
      except _Damaged as error:
        text = f"checkpoint {step}: {error}; trying an older one"
        warnings.warn(text, stacklevel=2)
        damaged.append(step)
        continue
      if meta["frozen"] != self._fingerprint_frozen(state):
        raise ValueError(
          f"{self._path}: the reference of this run is not the one it was "
          "started with; restore what init_from named, or use a new --workdir"
        )
      self._set_aside(damaged)
      return state.replace(**values)
    if steps:
      raise ValueError(
        f"{self._path}: no checkpoint of {steps} is intact; move the folder "
        "away to start afresh"
      )
    return None

  def _set_aside(self, steps):
    """Moves damaged steps out of the way: they would block new ones."""
    for step in steps:
      target = self._folder / "damaged" / str(step)
      target.parent.mkdir(parents=True, exist_ok=True)
      if target.exists():
        target.rmtree()
      (self._path / str(step)).rename(target)
    if steps:
      self._manager.reload()

  def _fingerprint_frozen(self, state):
    if self._frozen is None:
      self._frozen = state_lib.fingerprint(state.frozen)
    return self._frozen

  def _read(self, step, target, identity):
    meta = _read_meta(self._manager, step)
    saved_lib.check_config(meta["config"], identity, self._path)
    target = guard.as_saved(target, meta["leaves"])
    _check_leaves(meta["leaves"], _leaves(target), self._path)
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    restore = ocp.args.StandardRestore(shapes)
    values = _read_item(self._manager, step, "state", restore)
    if state_lib.fingerprint(values) != meta["checksums"]:
      raise _Damaged("checksums do not match")
    return guard.upgraded(values), meta

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """Waits for the last save."""
    self._manager.close()


def _manager(path, options=None):
  """Orbax's manager of a folder of checkpoints."""
  try:
    return ocp.CheckpointManager(path, options=options)
  except (ValueError, TypeError) as error:  # of files beside the checkpoints
    raise ValueError(f"{path} is damaged: {error}") from error


class _Damaged(Exception):
  """A checkpoint that must be passed over."""


# What Orbax and TensorStore raise for files that are missing, cut or changed.
# Others, such as running out of memory, say nothing about the checkpoint.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _read_item(manager, step, name, restore):
  args = ocp.args.Composite(**{name: restore})
  hook = sys.unraisablehook
  # At the first array that cannot be read Orbax closes its event loop; what was
  # being read meanwhile fails in threads and coroutines of its own, or later.
  sys.unraisablehook = functools.partial(_leave_out_reads, hook)
  try:
    item = manager.restore(step, args=args)[name]
  except Exception as error:
    # Of an array that lacks a file Orbax raises an Exception of no other kind.
    if type(error) is not Exception and not isinstance(error, _UNREADABLE):
      raise
    # TensorStore tells all that it knows of an array behind what happened.
    reason = re.split(r" \[|: \{|\. See", str(error).partition("\n")[0])[0]
    raise _Damaged(f"unreadable ({reason[:200]})") from error
  sys.unraisablehook = hook
  return item


def _leave_out_reads(hook, unraisable):
  """Gives `hook` what did not come of reads that nobody waits for."""
  closed = "Event loop is closed" in str(unraisable.exc_value)
  if not closed and not inspect.iscoroutine(unraisable.object):
    hook(unraisable)


def _read_meta(manager, step):
  meta = _read_item(manager, step, "meta", ocp.args.JsonRestore())
  wanted = ("config", "checksums", "frozen", "leaves")
  parts = meta if isinstance(meta, dict) else {}
  lost = [name for name in wanted if not isinstance(parts.get(name), dict)]
  if lost:
    raise _Damaged(f"unreadable (its metadata has no {lost[0]})")
  return meta


def _leaves(values):
  """{path: "float32[4, 8]"}."""
  return {path: f"{x.dtype}{list(x.shape)}" for path, x in tree.named(values)}


def _check_leaves(saved, wanted, where):
  """Raises ValueError naming the first leaf that differs."""
  for path in sorted(saved.keys() | wanted.keys()):
    if saved.get(path) != wanted.get(path):
      raise ValueError(
        f"{where}: {path} is {saved.get(path, 'missing')} there, the config "
        f"asks for {wanted.get(path, 'none of it')}"
      )


def check_run(workdir, config, ref):
  """Refuses a config or a reference that is not the one a run was trained with.

  Args:
    workdir: run folder with a checkpoint.
    config: plain dict.
    ref: parameters of what is taken for its reference.
  Returns: {"step", "data_fingerprint", "identity"} of the newest checkpoint.
  Raises: ValueError naming the field, or init_from.
  """
  path = _path(workdir)
  with _opened(workdir) as (_, step, meta):
    about = {k: v for k, v in meta["config"].items() if k not in config}
    saved_lib.check_config(meta["config"], {**config, **about}, path)
    # "ref/…", or "base/…" under an adapter
    frozen = {k.partition("/")[2]: v for k, v in meta["frozen"].items()}
    trained_with = about.get("reference") or frozen
    if trained_with and trained_with != state_lib.fingerprint(ref):
      raise ValueError(
        f"{path}: init_from = {config['init_from']} is not the reference that "
        "this run was trained with; was it trained on? Put it back"
      )
    data = about["data_fingerprint"]
    return {"step": step, "data_fingerprint": data, "identity": about}


def _path(workdir):
  return epath.Path(workdir).absolute() / "checkpoints"


@contextlib.contextmanager
def _opened(workdir, where=None, step=None):
  """Yields (CheckpointManager, step, metadata) of a run's checkpoint.

  Args:
    workdir: run folder.
    where: what names it, for messages; None is its path.
    step: None is the newest.
  """
  where = where or _path(workdir)
  with _manager(_path(workdir)) as manager:
    step = manager.latest_step() if step is None else step
    if step is None:
      raise ValueError(f"{where} holds no finished checkpoint")
    try:
      yield manager, step, _read_meta(manager, step)
    except _Damaged as error:
      raise ValueError(f"{where}: step {step}: {error}") from error


def identity(workdir):
  """{"step", "checksums"} of the newest checkpoint of a run folder.

  Raises: ValueError if there is none.
  """
  if latest_step(workdir) is None:
    raise ValueError(f"{workdir} holds no finished checkpoint; train it first")
  with _opened(workdir) as (_, step, meta):
    return {"step": step, "checksums": meta["checksums"] | meta["frozen"]}


def latest_step(workdir):
  """The newest step saved in a run folder, or None."""
  return max(steps(workdir), default=None)


def steps(workdir):
  """All steps saved in a run folder, rising."""
  path = _path(workdir)
  if not path.exists():
    return []
  with _manager(path) as manager:
    return sorted(manager.all_steps())


def load_params(workdir, target, field="init_from", step=None):
  """A policy saved in another run's folder.

  Args:
    target: tree of arrays, or of ShapeDtypeStructs with shardings.
    field: what named the folder, for messages.
    step: None is the last.
  Raises: ValueError if there is none, or its parameters do not fit.
  """
  where = f"{field} = {workdir!s}"
  if not _path(workdir).exists():
    raise ValueError(
      f"{where} holds no checkpoints/ folder; train that run first"
    )
  with _opened(workdir, where, step) as (manager, step, meta):
    leaves = meta["leaves"].items()
    saved = {k: leaf for k, leaf in leaves if k.startswith("params/")}
    _check_leaves(saved, _leaves({"params": target}), where)
    shapes = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, target)}
    restore = ocp.args.PyTreeRestore(
      shapes,
      restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
      partial_restore=True,
    )
    values = _read_item(manager, step, "state", restore)
    sums = state_lib.fingerprint(values)
    if any(meta["checksums"][k] != value for k, value in sums.items()):
      raise _Damaged("checksums do not match")
  return values["params"]
