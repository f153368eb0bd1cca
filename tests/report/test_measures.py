"""The numbers that a report works out, against others' and by hand."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from dpo_jax import report
from dpo_jax.eval import intervals
from dpo_jax.report import content, folder, measures
from tests import test_report as made_up


def draw(length, reward, prompt):
  return {"id": prompt, "length": length, "reward/x": reward, "finished": True}


def at(samples, length):
  return measures.at_length(samples, "reward/x", length)


@pytest.mark.parametrize(("right", "of"), [(0, 20), (5, 10), (428, 640)])
def test_the_interval_of_an_accuracy_is_wilsons(right, of):
  theirs = stats.binomtest(right, of).proportion_ci(method="wilson")
  assert intervals.wilson(right / of, of) == pytest.approx(
    (theirs.low, theirs.high), abs=1e-7
  )


def test_a_reward_that_is_all_length_is_no_gain_at_equal_length():
  samples = [draw(n, 0.5 + 0.1 * n, n) for n in (20, 26, 29, 32, 32)]
  found = at(samples, 24.0)
  assert found["mean"] == pytest.approx(0.5 + 0.1 * 24)
  assert found["se"] == pytest.approx(0, abs=1e-9)


def test_a_reward_that_ignores_length_stays_at_equal_length():
  samples = [draw(n, r, n) for n in (20, 26, 32) for r in (1.0, 2.0)]
  assert at(samples, 11.0)["mean"] == pytest.approx(1.5)


def test_at_its_own_length_a_reward_is_its_mean():
  rng = random.Random(1)
  samples = [draw(rng.randint(5, 32), rng.gauss(0, 1), i) for i in range(50)]
  own = np.mean([s["length"] for s in samples])
  mean = np.mean([s["reward/x"] for s in samples])
  assert at(samples, own)["mean"] == pytest.approx(mean)


def test_the_error_at_equal_length_is_the_spread_of_repetitions():
  rng, means, errors = random.Random(2), [], []
  for _ in range(400):
    samples = []
    for prompt in range(60):
      shared = rng.gauss(0, 1)  # by both draws of a prompt
      for _ in range(2):
        n = rng.gauss(28, 4)
        samples.append(
          draw(n, 1 + 0.1 * n + shared + rng.gauss(0, 0.5), prompt)
        )
    found = at(samples, 24.0)
    means.append(found["mean"])
    errors.append(found["se"])
  assert np.mean(means) == pytest.approx(1 + 2.4, abs=0.03)
  # The spread of 400 is known to 4 %; CR1 is some 2 % low for 60 prompts.
  assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)


@pytest.mark.parametrize(
  "samples",
  [
    [draw(32, float(i), i) for i in range(9)],  # all cut off
    [draw(n, 1.0, 0) for n in range(9)],  # one prompt
    [draw(None, 1.0, i) for i in range(9)],
    [],
  ],
)
def test_what_no_line_can_be_drawn_through_has_no_reward_at_equal_length(
  samples,
):
  assert at(samples, 24.0) is None


def test_comparisons_of_one_prompt_are_one_case(tmp_path):
  made_up.build(tmp_path, betas=(0.1,))
  change(tmp_path / "b0.1", examples=160)
  row = report.rows(tmp_path)[1]
  accuracy = row["rewards/accuracies"]
  assert row[measures.INTERVAL] == intervals.wilson(accuracy, 160)


def test_drift_is_the_losss_own_or_else_the_log_prob_less_the_references(
  tmp_path,
):
  made_up.build(tmp_path, betas=(0.1, 1.0))
  start = made_up.saved(tmp_path, "reference", "evaluation.json")
  there = made_up.saved(tmp_path, "b0.1", "evaluation.json")["comparisons"]
  change(tmp_path / "b1.0", comparisons=there | {"drift/chosen": -7.25})
  _, first, second = report.rows(tmp_path)
  before = start["comparisons"]["logps/chosen"]
  assert first["drift/chosen"] == there["logps/chosen"] - before
  assert second["drift/chosen"] == -7.25
  assert second["drift/rejected"] == first["drift/rejected"]
  # Of a run that began elsewhere the reference says nothing.
  change(tmp_path / "b0.1", reference={"embed": 2})
  assert report.rows(tmp_path)[1]["drift/chosen"] is None


def test_without_a_reference_the_page_shows_the_log_probs_as_they_are(tmp_path):
  made_up.build(tmp_path, betas=(0.1,), sampled=False)
  heads, _ = report.grid(report.rows(tmp_path), "page")
  assert "log p chosen" in heads
  assert "Δ log p, chosen" not in heads
  assert "r* at equal length" not in heads
  made_up.build(tmp_path, betas=(0.1,))
  heads, _ = report.grid(report.rows(tmp_path), "page")
  assert "log p chosen" not in heads
  assert "Δ log p, chosen" in heads


def change(path, **values):
  there = made_up.saved(path.parent, path.name, "evaluation.json")
  made_up.lines(path / "evaluation.json", [there | values])


def cut(path, finished, count=20):
  """Samples of which some ended, some not; longer ones earn more."""
  rows = [
    draw(20 + i, i / 10, i)
    | {made_up.TRUTH: i / 10, "finished": i < finished, "prompt": "p"}
    | {"completion": "c"}
    for i in range(count)
  ]
  made_up.lines(path / "samples.jsonl", rows)


def test_samples_that_were_cut_off_are_said_beside_the_reward(tmp_path):
  made_up.build(tmp_path, betas=(0.1, 1.0))
  cut(tmp_path / "reference", 12)
  cut(tmp_path / "b0.1", 2)
  cut(tmp_path / "b1.0", 10)  # ten points less: no remark
  change(tmp_path / "b0.1", config={"sample": {"max_new_tokens": 40}})
  ended = [row["ended"] for row in report.rows(tmp_path)]
  assert ended == [0.6, 0.1, 0.5]
  sweep = folder.read(tmp_path)
  length, _ = sweep.reference.mean("length")
  reward, _ = sweep.runs[0].mean(made_up.TRUTH)
  (line,) = content.remarks(sweep)
  assert line == (
    "beta=0.1: 10% of the samples ended before the limit of 40 tokens, of the "
    f"reference's 60%. Its r* is {reward:.2f}; at the reference's mean length, "
    f"{length:.1f} tokens, {(length - 20) / 10:.2f} ± 0.00."
  )
  page = made_up.Page(report.write(tmp_path)).text
  assert page.index("Reward over KL") < page.index(line)
  assert page.index(line) < page.index("All numbers")
  assert "10% of the samples ended" in (tmp_path / "report.md").read_text()


def test_old_folders_tell_their_share_that_ended_by_the_evaluation(tmp_path):
  made_up.build(tmp_path, betas=(0.1,))
  change(tmp_path / "b0.1", finished=0.25)
  (tmp_path / "b0.1/samples.jsonl").unlink()
  assert report.rows(tmp_path)[1]["ended"] == 0.25


def test_held_out_metrics_are_curves_of_their_own(tmp_path):
  made_up.build(tmp_path, betas=(0.1,), steps=5)
  path = tmp_path / "b0.1/metrics.jsonl"
  rows = [
    {"step": step, "kind": "eval", "loss": loss, "rewards/accuracies": 0.5}
    for step, loss in ((3, 0.69), (5, None))
  ]
  with path.open("a") as file:
    file.write("".join(made_up.json.dumps(row) + "\n" for row in rows))
  metrics = folder.read(tmp_path).runs[0].metrics
  steps, values = metrics["held_out/loss"]
  assert steps == [3, 5]
  assert values[0] == 0.69
  assert math.isnan(values[1])
  assert len(metrics["loss"][0]) == 5
  axes = made_up.drawn(tmp_path)["curves"].axes
  panel = {ax.get_title(loc="left"): ax for ax in axes}
  drawn = panel["held-out loss"].lines[0]
  assert drawn.get_xdata().tolist() == [3, 5]
  # One evaluation at the end must not look like a whole run.
  assert panel["held-out loss"].get_xlim() == panel["training loss"].get_xlim()
