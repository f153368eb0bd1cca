"""Two processes draw together what one draws: each has all of it, in order."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.eval import generate
from dpo_jax.run import build, trained
from tests import draw_driver, processes


@pytest.mark.slow
def test_draws_of_two_processes_are_those_of_one(tmp_path):
  ends = processes.together("tests.draw_driver", tmp_path)
  processes.assert_both_succeed(ends)
  got = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]

  setup = build.prepare_model(draw_driver.load())
  params = trained.initial(setup)
  given = generate.prompts(setup)
  want = [d._asdict() for b in generate.draws(setup, params, given) for d in b]
  assert len(want) == 24
  assert got[0] == got[1]
  for one, other in zip(got[0], want, strict=True):
    # Of another mesh, whose sums round otherwise.
    np.testing.assert_allclose(one.pop("logps"), other.pop("logps"), atol=1e-5)
  assert got[0] == want
  assert jax.process_count() == 1
  rows, _ = draw_driver.written(setup, params, tmp_path / "alone")
  told = [
    json.loads((tmp_path / f"{n}-written.json").read_text()) for n in range(2)
  ]
  assert [one for one, _ in told] == [rows, rows]
  assert "drawn from another policy" in told[0][1]
  assert "the first process cannot go on" in told[1][1]
  for name in ("completions.jsonl", "pairs.jsonl", "completions.json"):
    got, want = ((tmp_path / d / name).read_text() for d in ("drawn", "alone"))
    assert got == want
