"""One process of several: store_driver.py FOLDER PORT COUNT PROCESS KILL_AT.

Attaches the reference from the store of FOLDER to ITEMS, and writes to
FOLDER/PROCESS.json which batches it computed, which blocks it wrote and what
each example was given.
Kills itself without warning at example KILL_AT of its pass.
"""

import json
import os
import pathlib
import signal
import sys

import jax

from dpo_jax.config import load as load_lib
from dpo_jax.data.batch import loader
from dpo_jax.run import build, forward, reference, trained
from tests import conftest, worlds

ITEMS = worlds.examples(22, seed=3, completions=4)
EXAMPLES_PER_BLOCK = 4  # so there are six


def load(*overrides):
  """Batches of five examples, so that blocks cut them."""
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  return load_lib.load_config(config, ("data.batch_size=5", *overrides))


def main(folder, port, count, process, kill_at):
  jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
  assert jax.process_count() == int(count)
  reference.EXAMPLES_PER_BLOCK = EXAMPLES_PER_BLOCK
  right, set_reference = forward.token_logps, loader.Loader.set_reference
  write = reference.write
  seen = {"batches": [], "values": [], "written": []}

  def token_logps(setup, params, in_order, numbers):
    seen["batches"] += numbers
    passed = right(setup, params, in_order, numbers)
    for done, item in enumerate(passed):
      if str(done) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
      yield item

  def give(self, values):
    seen["values"] = [x.tolist() for x in values]
    set_reference(self, values)

  def counted(entry, number, values):
    seen["written"].append(number)
    return write(entry, number, values)

  reference.write = counted
  forward.token_logps, loader.Loader.set_reference = token_logps, give
  # The weights of the reference are spread over all processes.
  setup = build.prepare_model(load(f"mesh.fsdp={len(jax.devices())}"))
  params = trained.initial(setup)
  here = forward.loader_of(setup, ITEMS)
  store = pathlib.Path(folder) / "ref_logps"
  forward.attach_reference(setup, params, here, store)
  assert here.has_reference
  path = pathlib.Path(folder) / f"{process}.json"
  path.write_text(json.dumps(seen))


if __name__ == "__main__":
  main(*sys.argv[1:])
