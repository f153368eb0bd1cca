"""Checkpoints with exact resume: Orbax, checksums and the run's config."""

import json
import time
import warnings

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax import store
from dpo_jax.config import saved as saved_lib
from dpo_jax.parallel import processes
from dpo_jax.train import guard, intact
from dpo_jax.train import state as state_lib

_TRIES = 20  # of removing what a failed save goes on writing


class Checkpointer:
  """Saves and restores the train state under `workdir/checkpoints`.

  Beside it saved.json tells the newest step that is known to be on the disk.
  A folder that lacks that step has lost it and is refused; a run that was
  killed before its first save has no such file, and starts again.
  """

  def __init__(self, workdir, *, keep):
    """Args:
    workdir: run folder, local or gs://….
    keep: checkpoints kept, at least 2 (a failed save must not cost the last).
    """
    if keep < 2:
      raise ValueError(f"checkpoint.keep = {keep} must be at least 2")
    self._path = _path(workdir)
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    self._manager = intact.manager(self._path, self._options)
    self._frozen = None  # fingerprint of what is never trained, taken once
    self._writing = None  # step that is being saved in the background
    self.lost = 0  # saves that failed

  def steps(self):
    """Steps on disk, newest first."""
    return intact.listed(self._manager)[::-1]

  def save(self, state, identity, *, wait=False):
    """Saves a state in the background, or durably with `wait`.

    Waits for the save before this one. One that fails is a warning and is
    counted in `lost`: the next one takes its place.

    Args:
      state: TrainState.
      identity: plain dict of what a run that resumes must share.
    Returns: whether it is saved, as far as that is known yet.
    """
    step = int(state.step)
    intact.leave_out_late()
    self._settle()
    if step in self._manager.all_steps():
      return True
    values = state_lib.saved(state)
    meta = {
      "config": identity,
      "checksums": state_lib.fingerprint(values),
      "frozen": self._fingerprint_frozen(state),
      "leaves": intact.leaves(values),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(values),
      meta=ocp.args.JsonSave(intact.sealed(meta)),
    )
    self._writing = step
    try:
      if not self._manager.save(step, args=args):
        raise OSError(f"{self._path}: step {step} was not accepted for saving")
    except Exception as error:  # each store has its own
      self._failed(error)
      return False
    return self._settle() if wait else True

  def _settle(self):
    """Waits for what is being saved; whether that is on the disk now."""
    step = self._writing
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # whatever the store raised
      self._failed(error)
      return False
    if step is not None:
      intact.trust(self._path, step)
      self._record(step)
      self._writing = None
    return True

  def _failed(self, error):
    """Counts a save that failed and removes what it left: the disk is full."""
    step, self._writing = self._writing, None
    self.lost += 1
    reason = str(error).partition("\n")[0].partition(" [")[0][:200]
    at = "" if step is None else f"step {step}: "
    warnings.warn(f"a checkpoint was not written: {at}{reason}", stacklevel=4)
    # Orbax's manager keeps errors of what it writes beside the state, and would
    # raise them once more after the next save, which may be whole.
    _close(self._manager)
    try:
      self._clean()
      self._manager = intact.manager(self._path, self._options)
    except Exception as error:  # the closed one refuses the next save, too
      warnings.warn(f"{self._path} cannot be read: {error}", stacklevel=4)

  def _clean(self):
    """Removes what failed saves left.

    Threads that Orbax no longer waits for may still be writing there.
    """
    for _ in range(_TRIES if jax.process_index() == 0 else 0):
      left = list(self._path.glob("*.orbax-checkpoint-tmp*"))
      if not left:
        return
      for path in left:
        store.remove(path)
      time.sleep(0.1)

  def _forget(self):
    if jax.process_index() == 0:
      (self._path.parent / "saved.json").unlink(missing_ok=True)

  def _record(self, step):
    if jax.process_index() > 0:
      return
    try:
      text = json.dumps({"step": step}) + "\n"
      store.write(self._path.parent / "saved.json", text.encode())
    except OSError as error:  # it tells of an older step then, or is not there
      warnings.warn(f"saved.json was not written: {error}", stacklevel=3)

  def _check_there(self, steps):
    """Raises ValueError if a step that was on the disk is gone."""
    path = self._path.parent / "saved.json"
    if not path.exists():
      return
    try:
      saved = store.read_json(path).get("step")
    except ValueError as error:
      saved = None
      warnings.warn(f"{error}; it is written anew", stacklevel=3)
    newest = max(steps, default=-1)
    if isinstance(saved, int) and saved > newest:
      there = f"step {newest}" if steps else "nothing"
      ways = f"go on from step {newest}" if steps else "start afresh"
      raise ValueError(
        f"{self._path}: step {saved} was saved here and is gone, {there} is "
        f"left; put it back, or delete {path} to {ways}"
      )

  def restore(self, state, identity):
    """The newest intact checkpoint in the shape of `state`.

    A checkpoint that cannot be read or fails its checksums is passed over with
    a warning and, once an older one proved intact, moved to `damaged/`; if none
    is intact, that is an error, not a fresh start.

    Args:
      state: placed TrainState; its frozen part is kept.
      identity: plain dict; must equal the saved one but for the free fields.
    Returns: TrainState, or None if nothing was ever saved here.
    Raises: ValueError naming the differing field or leaf, or the step that was
      saved here and is gone.
    """
    steps, damaged = sorted(self._manager.all_steps(), reverse=True), []
    self._check_there(steps)
    for step in steps:
      try:
        values, meta = self._read(step, state_lib.saved(state), identity)
      except intact.Damaged as error:
        text = f"checkpoint {step}: {error}; trying an older one"
        warnings.warn(text, stacklevel=2)
        damaged.append(step)
        continue
      if meta["frozen"] != self._fingerprint_frozen(state):
        raise ValueError(
          f"{self._path}: the reference of this run is not the one it was "
          "started with; restore what init_from named, or use a new --workdir"
        )
      if damaged:  # what is set aside is not lost; this works on a full disk
        self._forget()
      self._record(step)
      self._set_aside(damaged)
      return state.replace(**values)
    if steps:
      raise ValueError(
        f"{self._path}: no checkpoint of {steps} is intact; move the folder "
        f"and {self._path.parent / 'saved.json'} away to start afresh"
      )
    return None

  def _set_aside(self, steps):
    """Moves damaged steps out of the way: they would block new ones."""
    for step in steps if jax.process_index() == 0 else ():
      target = self._path.parent / "damaged" / str(step)
      target.parent.mkdir(parents=True, exist_ok=True)
      if target.exists():
        target.rmtree()
      store.move_folder(self._path / str(step), target)
    if steps:
      processes.largest(0)  # the others look when all is moved
      self._manager.reload()

  def _fingerprint_frozen(self, state):
    if self._frozen is None:
      self._frozen = state_lib.fingerprint(state.frozen)
    return self._frozen

  def _read(self, step, target, identity):
    meta = intact.metadata(self._manager, step)
    saved_lib.check_config(meta["config"], identity, self._path)
    target = guard.as_saved(target, meta["leaves"])
    intact.check_leaves(meta["leaves"], intact.leaves(target), self._path)
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    restore = ocp.args.StandardRestore(shapes)
    values = intact.item(self._manager, step, "state", restore)
    if state_lib.fingerprint(values) != meta["checksums"]:
      raise intact.Damaged("checksums do not match")
    return guard.upgraded(values), meta

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """Waits for the last save."""
    self._settle()
    _close(self._manager)
    if self.lost:
      self._clean()


def _close(manager):
  """Closes a manager; what it could not write was said already."""
  try:
    manager.close()
  except Exception:
    return


def check_run(workdir, config, ref):
  """Refuses a config or a reference that is not the one a run was trained with.

  Args:
    workdir: run folder with a checkpoint.
    config: plain dict.
    ref: parameters of what is taken for its reference.
  Returns: {"step", "data_fingerprint", "identity"} of the checkpoint that
    `load_params` reads.
  Raises: ValueError naming the field, or init_from.
  """
  path = _path(workdir)
  step, meta = _newest(workdir, path)
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
  path = epath.Path(workdir)
  if store.is_local(path):  # which Orbax wants to be whole
    path = path.absolute()
  return path / "checkpoints"


def _newest(workdir, where):
  """(step, metadata) of the checkpoint that `load_params` reads."""
  path = _path(workdir)
  return intact.first(path, where, lambda *read: read[1:], again=False)


def identity(workdir):
  """{"step", "checksums"} of the checkpoint that `load_params` reads.

  Of its values this knows what is wrong once they were read.

  Raises: ValueError if there is none.
  """
  if not steps(workdir):
    raise ValueError(f"{workdir} holds no finished checkpoint; train it first")
  step, meta = _newest(workdir, _path(workdir))
  return {"step": step, "checksums": meta["checksums"] | meta["frozen"]}


def latest_step(workdir):
  """The step that `load_params` reads in a run folder, or None.

  Raises: ValueError if no step there is intact.
  """
  return _newest(workdir, _path(workdir))[0] if steps(workdir) else None


def steps(workdir):
  """All steps saved in a run folder, rising."""
  path = _path(workdir)
  if not path.exists():
    return []
  with intact.manager(path) as manager:
    return intact.listed(manager)


def load_params(workdir, target, field="init_from", step=None):
  """A policy saved in another run's folder.

  Args:
    target: tree of arrays, or of ShapeDtypeStructs with shardings.
    field: what named the folder, for messages.
    step: None is the newest that is intact.
  Raises: ValueError if there is none, or its parameters do not fit.
  """
  where = f"{field} = {workdir!s}"
  if not _path(workdir).exists():
    raise ValueError(
      f"{where} holds no checkpoints/ folder; train that run first"
    )
  shapes = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, target)}
  restore = ocp.args.PyTreeRestore(
    shapes,
    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
    partial_restore=True,
  )

  def read(manager, step, meta):
    leaves = meta["leaves"].items()
    saved = {k: leaf for k, leaf in leaves if k.startswith("params/")}
    intact.check_leaves(saved, intact.leaves({"params": target}), where)
    values = intact.item(manager, step, "state", restore)
    sums = state_lib.fingerprint(values)
    if any(meta["checksums"][k] != value for k, value in sums.items()):
      raise intact.Damaged("checksums do not match")
    return values["params"]

  return intact.first(_path(workdir), where, read, step)
