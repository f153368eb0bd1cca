"""Two processes share one store of the reference: what one lacks, both compute.

They talk over the loopback, with two fake devices each.
"""

import json
import signal

import numpy as np
import pytest

from dpo_jax.run import build, forward, reference, trained
from tests import processes, store_driver

SECONDS = 120  # each takes ten, alone on two cores


def together(folder, kill_at=None):
  """[(exit code, stderr)] of two processes that attach at the same time."""
  return processes.together(
    "tests.store_driver", folder, kill_at, seconds=SECONDS
  )


def said(folder):
  """What both processes say they computed and were given, and wrote each."""
  one, two = (json.loads((folder / f"{n}.json").read_text()) for n in range(2))
  written = [one.pop("written"), two.pop("written")]
  assert one == two
  return one, written


def small_blocks(monkeypatch):
  """The same blocks in this process as in the others."""
  count = store_driver.EXAMPLES_PER_BLOCK
  monkeypatch.setattr(reference, "EXAMPLES_PER_BLOCK", count)


def blocks_of(folder):
  """{number: path} of the blocks of the only entry of a store."""
  paths = list((folder / "ref_logps").glob("*/*.f32"))
  numbered = {int(path.name.split("-")[0]): path for path in paths}
  assert len(numbered) == len(paths)
  return numbered


@pytest.mark.slow
def test_a_store_of_two_processes_is_that_of_one(tmp_path, monkeypatch):
  """Killed (-9), damaged, and resumed by both; then read by this process."""
  killed = together(tmp_path, kill_at=13)
  assert -signal.SIGKILL in [code for code, _ in killed]
  there = blocks_of(tmp_path)
  # Two batches of five examples, and three examples of the third one.
  assert {0, 1} <= set(there) <= {0, 1, 2, 3}
  before = {n: path.stat().st_mtime_ns for n, path in there.items()}
  content = there[0].read_bytes()
  there[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

  resumed = together(tmp_path)
  processes.assert_both_succeed(resumed)
  assert sum("00000-" in error for _, error in resumed) == 1  # warned once
  assert there[0].read_bytes() == content
  after = blocks_of(tmp_path)
  assert sorted(after) == list(range(6))
  for n in set(there) - {0}:
    assert after[n].stat().st_mtime_ns == before[n]
  missing = {0} | set(range(6)) - set(there)
  need = {i // 5 for i in range(22) if i // 4 in missing}
  both, written = said(tmp_path)
  assert both["batches"] == sorted(need)
  assert written == [sorted(missing)[::2], sorted(missing)[1::2]]

  small_blocks(monkeypatch)
  setup = build.prepare_model(store_driver.load())
  params = trained.initial(setup)
  loader = forward.loader_of(setup, store_driver.ITEMS)
  alone = dict(forward.token_logps(setup, params, loader))
  monkeypatch.setattr(forward, "token_logps", None)  # all of it is there
  forward.attach_reference(setup, params, loader, tmp_path / "ref_logps")
  for index, values in enumerate(both["values"]):
    # One device group of eight here, two of two there: rounding.
    np.testing.assert_allclose(values, alone[index], rtol=0, atol=1e-5)
  for number in range(loader.steps):
    batch, _ = loader.batch(number)
    for index, values in loader.unpack(number, batch["ref_token_logps"]):
      assert values.tolist() == both["values"][index]


def test_both_processes_refuse_an_entry_of_something_else(
  tmp_path, monkeypatch
):
  """None is left waiting for the other one."""
  small_blocks(monkeypatch)
  setup = build.prepare_model(store_driver.load())
  loader = forward.loader_of(setup, store_driver.ITEMS)
  store = tmp_path / "ref_logps"
  forward.attach_reference(setup, trained.initial(setup), loader, store)
  (path,) = (tmp_path / "ref_logps").glob("*/entry.json")
  about = json.loads(path.read_text())
  path.write_text(json.dumps({**about, "examples": 23}))
  for code, error in together(tmp_path):
    assert code == 1
    assert "examples is 23 there, 22 here" in error
