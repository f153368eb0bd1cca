"""One process of several: non_finite_driver.py FOLDER PORT COUNT PROCESS.

Trains with the others in FOLDER/run; three updates in a row are not finite, and
process 1 is slow to see each. Writes how it ended to FOLDER/PROCESS.json.
"""

import json
import pathlib
import sys
import time

import jax

from dpo_jax import loop
from tests.reliability import test_non_finite as non_finite

BAD = 5, 7, 8, 9


def main(folder, port, count, process):
  jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
  folder, done, said = pathlib.Path(folder), [], ""
  config, run = non_finite.prepared()
  run = non_finite.broken(run, BAD, done, max_skipped=3, save=4)
  step = run.step

  def slow(state, batch, hparams):
    out = step(state, batch, hparams)
    time.sleep(0.1 * int(process))
    return out

  try:
    loop.fit(config, folder / "run", run._replace(step=slow))
  except FloatingPointError as error:
    said = str(error)
  text = json.dumps({"said": said, "done": done})
  (folder / f"{process}.json").write_text(text)


if __name__ == "__main__":
  main(*sys.argv[1:])
