"""The benchmark's command and its arithmetic."""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from scripts.bench import (
  cases,
  driver,
  inputs,
  prompts,
  protocol,
  rounds,
  summary,
)
from tests import conftest


def worker(seconds, losses=(), **facts):
  return {
    "start_seconds": 1.0,
    "versions": {},
    "facts": facts,
    "seconds": list(seconds),
    "losses": list(losses),
    "peak_bytes": 2**30,
  }


def results(**systems):
  """Results of two rounds of one step of four pairs."""
  case = cases.HEADLINE._replace(systems=tuple(systems))
  result = {
    "case": case._asdict(),
    "mix": cases.MIXES[case.mix]._asdict(),
    "rounds": 2,
    "steps": 1,
    "pairs": 4,
    "tokens": [1000, 2000],
    "flops": [1e9, 2e9],
    "malloc": "any",
    "systems": systems,
    "disagreement": rounds.disagreement(case, systems),
  }
  return {"machine": "2-core CPU", "cases": {case.name: result}}


def test_ratios_are_of_the_same_round():
  found = results(ours=worker([1, 4]), trl=worker([5, 12]))
  (result,) = found["cases"].values()
  np.testing.assert_allclose(summary.ratio(result, "ours", "trl"), [5, 3])
  np.testing.assert_allclose(summary.per_round(result, "ours", "pairs"), [4, 1])


def test_the_share_is_of_the_matmul_in_the_same_round():
  matmul = worker([1, 2], flops=4e9)
  found = results(ours=worker([1, 4]), matmul=matmul)
  (result,) = found["cases"].values()
  np.testing.assert_allclose(summary.share(result, "ours"), [0.25, 0.25])


def test_losses_that_differ_fail_the_run(capsys):
  ours, trl = worker([1], [0.7, 0.6]), worker([1], [0.7, 0.6 * 1.001])
  found = results(ours=ours, trl=trl)
  assert driver.report(found, None) == 1
  assert "LOSSES DIFFER" in capsys.readouterr().out
  found = results(ours=ours, trl=worker([1], [0.7, 0.6 * 1.00001]))
  assert driver.report(found, None) == 0


@pytest.mark.parametrize(
  ("model", "expected"), [("smollm2-135m", 0.5), ("pythia-70m", 0.0)]
)
def test_the_losses_of_the_same_adapter_are_all_compared(model, expected):
  """PEFT trains another one where query, key and value are one matrix."""
  case = cases.Case(model, "balanced", lora=True)
  systems = {"ours": worker([1], [0.7, 0.4]), "trl": worker([1], [0.7, 0.6])}
  assert rounds.disagreement(case, systems) == {"trl": pytest.approx(expected)}


def test_a_peer_starts_from_the_adapter_of_ours(tmp_path):
  import safetensors.numpy

  from dpo_jax.config import load
  from dpo_jax.run import build, trained

  case = cases.SMOKE._replace(lora=True)
  assert case.adapter
  inputs.make(tmp_path, case, 1)
  job = inputs.job(tmp_path, case, 1, ())
  inputs.write_adapter(job)
  path = tmp_path / "adapter" / "adapter_model.safetensors"
  there = safetensors.numpy.load_file(path)
  setup = build.prepare_model(load.load_config(job["config"], job["fields"]))
  base, rng = trained.base_shapes(setup), jax.random.key(setup.source.seed)
  ours = jax.tree.leaves(setup.trained.init(base, rng))
  total = sum(np.abs(x).sum(dtype=float) for x in there.values())
  expected = sum(np.abs(np.asarray(x)).sum(dtype=float) for x in ours)
  assert total == pytest.approx(expected, rel=1e-6)
  assert total > 0


def test_losses_that_are_not_numbers_fail_the_run():
  found = results(ours=worker([1], [0.7]), trl=worker([1], [float("nan")]))
  assert driver.report(found, None) == 1


def test_a_table_has_a_row_for_each_system_that_trains():
  matmul = worker([1, 2], flops=4e9)
  found = results(ours=worker([1, 4]), trl=worker([5, 12]), matmul=matmul)
  lines = summary.table(found).splitlines()
  assert sum(line.startswith("| dpo_jax") for line in lines) == 1
  assert sum(line.startswith("| TRL") for line in lines) == 1
  assert not any(line.startswith("| f32 matmul") for line in lines)
  assert "MISSED" in "\n".join(summary.goals(found))  # 4 is less than 5


def test_every_goal_is_of_a_case_and_of_its_systems():
  by_name = {case.name: case for case in cases.CASES}
  assert len(by_name) == len(cases.CASES)
  for goal in cases.GOALS:
    assert {goal.system, goal.to} <= set(by_name[goal.case].systems)


def test_the_peers_read_the_examples_in_the_order_of_ours(tmp_path):
  from dpo_jax.data.batch import order

  mix = cases.MIXES["smoke"]
  counts = inputs.write_examples(tmp_path, mix, 256, steps=3, batch=4)
  planned = 4 * inputs.PLANNED
  in_file = protocol.read_examples(tmp_path / "examples.jsonl")
  in_order = protocol.read_examples(tmp_path / "in_order.jsonl")
  turns = order.stream(0, 12, planned, seed=0)
  assert in_order == [in_file[index] for index in turns]
  first = sum(len(ids) for pair in in_order[:4] for ids in pair)
  assert counts[0] == first
  assert len(in_file) == planned
  for prompt, chosen, rejected in in_file:
    assert 2 <= len(prompt) <= mix.max_prompt
    assert chosen[-1] == rejected[-1] == inputs.EOS
    assert max(len(chosen), len(rejected)) <= mix.max_completion


def test_the_peers_draw_for_the_prompts_of_ours_in_its_order(
  tmp_path, monkeypatch
):
  """And room is that of the longest of all, so one sampler is compiled."""
  from dpo_jax.config import load
  from dpo_jax.eval import generate, rewards
  from dpo_jax.run import build

  case, asked, rooms = cases.SMOKE_ROLLOUTS, [], set()

  class Asked(Exception):
    pass

  def draws(setup, policy, given, *, first, room):
    assert first == len(asked)
    asked.extend(text for text, _ in given)
    rooms.add(room)
    raise Asked

  prompts.make(tmp_path, case, 3)
  job = prompts.job(tmp_path, case, 3, ())
  monkeypatch.setattr(generate, "draws", draws)
  scores = protocol.Scores(job)
  monkeypatch.setitem(rewards.SCORERS, "bench", lambda _: scores)
  run = build.prepare(load.load_config(job["config"], job["fields"]))
  state = types.SimpleNamespace(params=None, frozen={})
  for number in range(3):
    with pytest.raises(Asked):
      run.feed.batch(number, state)
  in_order = (tmp_path / "in_order.jsonl").read_text().splitlines()
  assert asked == [json.loads(line)["prompt"] for line in in_order]
  every = (tmp_path / "prompts.jsonl").read_text().splitlines()
  longest = max(len(json.loads(line)["prompt"].split()) for line in every)
  assert rooms == {longest}


def test_a_score_is_a_share_of_even_words_and_short_draws_are_refused():
  score = protocol.Scores({"max_completion": 4})
  assert score([""], [""]) == [0.0]  # how a feed tries a scorer
  assert score(["", ""], ["2 4 6 7", "1 3 5 7"]) == [0.75, 0.0]
  assert score.means == [0.0, 0.375]
  with pytest.raises(ValueError, match="5 tokens were drawn, of 8"):
    score(["", ""], ["2 4 6 7", "1"])


def test_parts_are_taken_once():
  parts = protocol.Parts()
  twice = parts.of("twice", lambda x: 2 * x)
  assert twice(2) == twice(twice(1)) == 4
  assert parts.take()["twice"] > 0
  assert parts.take() == {}


def on_policy(**systems):
  """Results of two rounds on policy."""
  case = cases.SMOKE_ROLLOUTS._replace(systems=tuple(systems))
  result = {
    "case": case._asdict(),
    "mix": cases.MIXES[case.mix]._asdict(),
    "rounds": 2,
    "steps": 1,
    "pairs": case.units,
    "tokens": [64, 64],
    "flops": [1e9, 1e9],
    "malloc": "any",
    "systems": systems,
    "disagreement": {},
    "unlike": rounds.unlike(case, systems),
  }
  return {"machine": "2-core CPU", "cases": {case.name: result}}


def iterations(seconds, scores, norms):
  told = {"scores": scores, "norms": norms}
  parts = [{"sample": 0.6 * s, "update": 0.3 * s} for s in seconds]
  return {**worker(seconds), **told, "parts": parts}


@pytest.mark.parametrize(
  ("scores", "norms", "says"),
  [
    ([0.5, 0.45], [1.1, 1.0], None),
    ([0.9, 0.95], [1.1, 1.0], "mean score 0.425 from ours"),
    ([0.5, 0.45], [64.0, 70.0], "gradients of 67.00 × the norm of ours"),
    ([0.5, 0.45], [1.0, float("nan")], "gradients of nan"),
  ],
)
def test_a_system_on_policy_that_does_other_work_fails_the_run(
  scores, norms, says, capsys
):
  """Scores of 64 coin tosses have a standard error of 0.06."""
  ours = iterations([1, 4], [0.5, 0.5], [1.0, 1.0])
  trl = iterations([5, 12], scores, norms)
  found = on_policy(ours=ours, trl=trl, matmul=worker([1, 2], flops=4e9))
  assert driver.report(found, None) == (0 if says is None else 1)
  assert (says or "") in capsys.readouterr().out


def test_a_table_on_policy_counts_completions_and_tells_the_parts():
  ours = iterations([1, 4], [0.5, 0.5], [1.0, 1.0])
  found = on_policy(ours=ours, matmul=worker([1, 2], flops=4e9))
  table = summary.table(found)
  assert "completions/s" in table
  assert "pairs" not in table
  assert "dpo_jax: 2.5 s an iteration; sample 1.5, update 0.8" in table


def test_lengths_have_the_mean_they_are_asked_for():
  found = inputs.lengths(np.random.default_rng(0), 150, 10_000, 20_000)
  assert abs(found.mean() - 150) < 1  # standard error 0.4


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["--quik"], "--quik: no such option; did you mean '--quick'?"),
    (["--systems", "trll", "--quick"], "trl"),
    (["--cases", "gpt9"], "no case has this in its name"),
    (["--rounds", "0"], "0 is not above 0"),
    (["--device", "--systems", "tunix"], "ours and trl alone"),
    (["--table", "--out", "nowhere.json"], "nowhere.json is not there"),
  ],
)
def test_a_wrong_option_is_told(argv, says, capsys):
  try:
    code = driver.main(argv)
  except SystemExit as stop:
    code = stop.code
  assert code == 2
  assert says in capsys.readouterr().err


def run(out, *options):
  """What the command printed; it ran on one fake device, not on eight."""
  flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  done = subprocess.run(
    [sys.executable, "scripts/bench.py", *options, "--out", out],
    cwd=conftest.ROOT,
    env={**os.environ, **flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.optimised
def test_ours_and_the_padded_step_run_by_turns_and_agree(tmp_path):
  out = tmp_path / "results.json"
  assert "agree with ours" in run(out, "--smoke")
  result, on_policy = json.loads(out.read_text())["cases"].values()
  assert set(result["systems"]) == {"ours", "padded", "matmul"}
  for name in ("ours", "padded"):
    found = result["systems"][name]
    assert len(found["losses"]) == 2  # the warm-up's and the round's
    assert len(found["seconds"]) == 1
    assert found["facts"]["compilations"] >= 1
  assert result["disagreement"]["padded"] < 1e-5
  found = on_policy["systems"]["ours"]
  assert set(found["parts"][0]) >= {"sample", "score", "measure", "update"}
  assert 0 < found["norms"][0] < np.inf
  assert str(conftest.ROOT) not in out.read_text()


@pytest.mark.slow
@pytest.mark.optimised
def test_the_accelerator_set_runs_on_a_cpu(tmp_path):
  out = tmp_path / "results.json"
  run(out, "--device", "--smoke", "--rounds", "1")
  (found,) = json.loads(out.read_text())["shapes"].values()
  assert found["facts"]["device"] == "cpu"
  assert len(found["losses"]) == 2
