"""One process of several: draw_driver.py FOLDER PORT COUNT PROCESS.

Draws completions with the others and writes what it was given to
FOLDER/PROCESS.json. Then they write them to FOLDER/drawn as the verb does, one
batch of it anew, and ask for those of another policy.
"""

import json
import pathlib
import sys

import jax
from jax.experimental import multihost_utils

from dpo_jax.config import load as load_lib
from dpo_jax.eval import completions, generate
from dpo_jax.run import build, trained
from tests import conftest


def load(*overrides):
  """Six toy prompts, four draws of each, in batches of eight."""
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  sampled = (
    *("sample.prompts=toy", "sample.count=6", "sample.draws=4"),
    *("sample.max_new_tokens=8", "sample.batch_size=8"),
    *("sample.scorers=('vader',)", "sample.labels=deterministic"),
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
  rows, said = written(setup, params, pathlib.Path(folder) / "drawn")
  path.with_name(f"{process}-written.json").write_text(json.dumps([rows, said]))


def written(setup, params, folder):
  """(rows of a file of draws that was cut and goes on, why it is refused)."""
  whole = completions.write(setup, params, {"policy": 1}, folder)
  multihost_utils.sync_global_devices("drawn")
  path = folder / "completions.jsonl"
  if jax.process_index() == 0:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
  multihost_utils.sync_global_devices("cut")
  rows = completions.write(setup, params, {"policy": 1}, folder)
  assert rows == whole
  try:
    completions.write(setup, params, {"policy": 2}, folder)
  except ValueError as error:
    return rows, str(error)
  raise AssertionError("draws of another policy went on")


if __name__ == "__main__":
  main(*sys.argv[1:])
