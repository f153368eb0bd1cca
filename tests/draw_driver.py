"""One process of several: draw_driver.py FOLDER PORT COUNT PROCESS.

Draws completions with the others and writes what it was given to
FOLDER/PROCESS.json.
"""

import json
import pathlib
import sys

import jax

from dpo_jax.config import load as load_lib
from dpo_jax.eval import generate
from dpo_jax.run import build, trained
from tests import conftest


def load(*overrides):
  """Six toy prompts, four draws of each, in batches of eight."""
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  sampled = (
    *("sample.prompts=toy", "sample.count=6", "sample.draws=4"),
    *("sample.max_new_tokens=8", "sample.batch_size=8"),
  )
  return load_lib.load_config(config, (*sampled, *overrides))


def main(folder, port, count, process):
  jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
  assert jax.process_count() == int(count)
  # The weights are spread over all processes.
  setup = build.prepare_model(load(f"mesh.fsdp={len(jax.devices())}"))
  params, given = trained.initial(setup), generate.prompts(setup)
  drawn = [d._asdict() for b in generate.draws(setup, params, given) for d in b]
  path = pathlib.Path(folder) / f"{process}.json"
  path.write_text(json.dumps(drawn))


if __name__ == "__main__":
  main(*sys.argv[1:])
