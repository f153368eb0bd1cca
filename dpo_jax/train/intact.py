"""What of a saved checkpoint can be trusted: reading it and its checksums."""

import errno
import functools
import inspect
import json
import logging
import re
import sys
import warnings
import zlib

import orbax.checkpoint as ocp

from dpo_jax import tree


class Damaged(Exception):
  """A checkpoint that must be passed over."""


# What Orbax and TensorStore raise for files that are missing, cut or changed.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)

# What tells of the machine, the network or one's rights, and not of the
# checkpoint.
_ELSEWHERE = (
  *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM),
  *(errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH),
)
_WORDS = (
  *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
  *("PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden"),
)

_PARTS = ("config", "checksums", "frozen", "leaves")

# (folder, step) of what proved damaged to this process: who asks for the newest
# afterwards is told of the one that was read.
_PASSED = set()


def manager(path, options=None):
  """Orbax's manager of a folder of checkpoints."""
  logging.getLogger("absl").addFilter(_is_no_trace)
  # asyncio tells of reads and writes that nobody waited for, as they are
  # collected.
  logging.getLogger("asyncio").addFilter(_is_not_late)
  try:
    return ocp.CheckpointManager(path, options=options)
  except (ValueError, TypeError) as error:  # of files beside the checkpoints
    raise ValueError(f"{path} is damaged: {error}") from error


def empty(path, step):
  """Whether the folder of a step holds nothing: then it is no checkpoint."""
  folder = path / str(step)
  return folder.is_dir() and not any(folder.iterdir())


def listed(manager):
  """Steps of a manager, rising, without folders that hold nothing."""
  path = manager.directory
  return [step for step in sorted(manager.all_steps()) if not empty(path, step)]


def trust(path, step):
  """Takes a step for intact, which was written anew or mended."""
  _PASSED.discard((str(path), step))


def first(path, where, read, step=None, *, again=True):
  """What `read` makes of the newest checkpoint that is not damaged.

  Passing one over for an older one is a warning.

  Args:
    path: folder of checkpoints.
    where: what names it, for messages.
    read: (CheckpointManager, step, metadata) -> anything; may raise Damaged.
    step: the only one to be read, or None.
    again: whether one that proved damaged before is read again.
  Raises: ValueError if there is none.
  """
  with manager(path) as opened:
    steps = listed(opened)[::-1] if step is None else [step]
    if not steps:
      raise ValueError(f"{where} holds no finished checkpoint")
    newest = None  # what is wrong with it
    for each in steps:
      before = (str(path), each) in _PASSED
      try:
        if before and not again:
          raise Damaged("its values are not those that were saved")
        found = read(opened, each, metadata(opened, each))
      except Damaged as error:
        newest = newest or error
        _PASSED.add((str(path), each))
        if each != steps[-1] and not before:
          text = f"{where}: checkpoint {each}: {error}; trying an older one"
          warnings.warn(text, stacklevel=4)
      else:
        if again:
          trust(path, each)
        return found
    older = ", and no older one is intact" if len(steps) > 1 else ""
    raise ValueError(f"{where}: step {steps[0]}: {newest}{older}") from newest


def sealed(meta):
  """Metadata with a checksum of its own."""
  return {**meta, "checksum": _checksum(meta)}


def _checksum(meta):
  # As it is once read: JSON has lists alone, and text for keys.
  plain = json.loads(json.dumps(meta))
  return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def metadata(manager, step):
  """The metadata of a step, which were `sealed`.

  Checkpoints from before there was a seal have none, and nothing else besides.

  Raises: Damaged.
  """
  if empty(manager.directory, step):
    raise Damaged("its folder is empty")
  meta = item(manager, step, "meta", ocp.args.JsonRestore())
  parts = meta if isinstance(meta, dict) else {}
  lost = [name for name in _PARTS if not isinstance(parts.get(name), dict)]
  if lost:
    raise Damaged(f"unreadable (its metadata has no {lost[0]})")
  seal = {k: v for k, v in meta.items() if k not in _PARTS}
  meta = {k: meta[k] for k in _PARTS}
  if seal and seal != {"checksum": _checksum(meta)}:
    raise Damaged("the checksum of its metadata does not match")
  return meta


def item(manager, step, name, restore):
  """One item of a step.

  Raises: Damaged; not for what says nothing about the checkpoint, such as
    running out of memory.
  """
  args = ocp.args.Composite(**{name: restore})
  leave_out_late()
  try:
    found = manager.restore(step, args=args)[name]
  except Exception as error:
    # Of an array that lacks a file Orbax raises an Exception of no other kind.
    if type(error) is not Exception and not isinstance(error, _UNREADABLE):
      raise
    if _elsewhere(error):
      raise
    # TensorStore tells all that it knows of an array behind what happened.
    reason = re.split(r" \[|: \{|\. See", str(error).partition("\n")[0])[0]
    raise Damaged(f"unreadable ({reason[:200]})") from error
  return found


def _elsewhere(error):
  """Whether an error comes of the machine, the network or one's rights."""
  while error is not None:
    if isinstance(error, MemoryError | TimeoutError | ConnectionError):
      return True
    if any(word in str(error) for word in _WORDS):
      return True
    if isinstance(error, OSError) and error.errno in _ELSEWHERE:
      return True
    error = error.__cause__ or error.__context__
  return False


def leave_out_late():
  """Has Python say nothing of reads and writes that nobody waits for.

  At the first file that fails Orbax closes its event loop and raises; what was
  on its way meanwhile fails in threads and coroutines of its own, or later.
  """
  hook = sys.unraisablehook
  if getattr(hook, "func", None) is not _leave_out:
    sys.unraisablehook = functools.partial(_leave_out, hook)


def _leave_out(hook, unraisable):
  """Gives `hook` what did not come of reads or writes."""
  closed = "Event loop is closed" in str(unraisable.exc_value)
  if not closed and not inspect.iscoroutine(unraisable.object):
    hook(unraisable)


def _is_not_late(record):
  """Whether a line of asyncio's log is not of a file nobody waits for."""
  failed = record.exc_info[1] if record.exc_info else None
  late = "never retrieved" in record.getMessage()
  return not (late and isinstance(failed, _UNREADABLE))


def _is_no_trace(record):
  """Whether a line of a log is not Orbax's traceback of what it raises, too."""
  return not (record.exc_info and "orbax" in record.pathname)


def leaves(values):
  """{path: "float32[4, 8]"}."""
  return {path: f"{x.dtype}{list(x.shape)}" for path, x in tree.named(values)}


def check_leaves(saved, wanted, where):
  """Raises ValueError naming the first leaf that differs."""
  for path in sorted(saved.keys() | wanted.keys()):
    if saved.get(path) != wanted.get(path):
      raise ValueError(
        f"{where}: {path} is {saved.get(path, 'missing')} there, the config "
        f"asks for {wanted.get(path, 'none of it')}"
      )
