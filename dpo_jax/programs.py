"""Where compiled programs are kept for the next run."""

import hashlib
import os
import pathlib


def keep():
  """Has JAX keep what it compiles, unless its own settings say where or not.

  In `~/.cache/dpo_jax/programs`, a folder for each kind of processor: a program
  for one with more instructions would not run on another. Whoever can write
  there can have code run here; JAX_COMPILATION_CACHE_DIR names another folder,
  JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing. To be called before JAX is
  imported.
  """
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(home) / "dpo_jax" / "programs" / _processor()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


def _processor():
  """A name for what this processor can do."""
  about, info = list(os.uname()[4:]), pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text().splitlines()
    about += [x for x in lines if x.startswith(("flags", "Features"))][:1]
  digest = hashlib.blake2b("".join(about).encode(), digest_size=6)
  return f"{os.uname().machine}-{digest.hexdigest()}"
