"""Methods compared on samples: every number from files made by hand."""

import json

import numpy as np
import pytest

from dpo_jax import report
from dpo_jax.eval import frontier
from dpo_jax.report import compared, folder, standings
from tests import test_report as made_up

TRUTH = made_up.TRUTH
SEEDS = (0, 1, 2)
OPTIONS = {
  "method": "dpo",
  "against": ["ppo", "best_of"],
  "seeds": list(SEEDS),
  "folder": "seed={seed}/{method}",
  "trend": "loss.beta",
}
BETAS = (0.1, 1.0, 5.0)


def place(values, kl, reward):
  """Puts an evaluation at a place, both halves alike."""
  values["means"]["kl"]["mean"] = kl
  values["means"][TRUTH]["mean"] = reward
  values["halves"] = [{"kl": kl, TRUTH: reward}] * 2
  return values


def build(root, seeds=SEEDS, methods=("dpo", "ppo")):
  """Ours is 0.1 (seed 0), 0.2 and 0.3 above theirs at every KL above 1."""
  root.mkdir(exist_ok=True)
  (root / "compared.json").write_text(json.dumps(OPTIONS))
  for seed in seeds:
    for method in methods:
      path = root / f"seed={seed}" / method
      path.parent.mkdir(exist_ok=True)
      made_up.build(path, betas=BETAS, steps=3)
      ahead = (seed + 1) / 10 if method == "dpo" else 0.0
      for number, beta in enumerate((*BETAS, None)):
        folder = "reference" if beta is None else f"b{beta}"
        values = made_up.saved(path, folder, "evaluation.json")
        kl = 0.0 if beta is None else 3.0 - number  # falls with β
        place(values, kl, 0.5 if beta is None else 0.5 + ahead)
        if beta is not None:
          early = json.loads(json.dumps(values)) | {"step": 50}
          values["checkpoints"] = [place(early, kl / 2, 0.4)]
          values["config"] = {
            "loss": {"beta": beta},
            "optim": {"learning_rate": 1e-3},
          }
        made_up.lines(path / folder / "evaluation.json", [values])
    best = [
      {
        "n": n,
        "bound": kl,
        "means": {
          TRUTH: {"mean": reward, "se": 0.1},
          "length": {"mean": 30.0, "se": 1.0},
        },
      }
      for n, kl, reward in ((1, 0.0, 0.5), (4, 1.5, 0.55), (64, 9.0, 0.9))
    ]
    made_up.lines(
      root / f"seed={seed}" / "best_of" / "best_of.json", [{"best_of": best}]
    )
  return root


def spot(*halves):
  """A Spot of its two halves; the rest is not read."""
  return compared.Spot(1, (1.0, 0.1), (1.0, 0.1), list(halves))


def test_what_is_the_best_on_one_half_is_told_by_the_other():
  spots = [
    spot((0.0, 1.0), (0.0, 1.0)),
    spot((1.0, 4.0), (1.0, 0.0)),  # best of the first half alone
    spot((1.0, 2.0), (1.0, 3.0)),
    spot((2.0, 4.5), (2.5, 5.0)),  # of another KL on the second half
  ]
  # Chosen on the first: (0, 1), (1, 4), (2, 4.5), told 1, 0, 5.
  first = [1.0, 0.5, 0.0, 2.5, 5.0, 5.0]
  # Chosen on the second: (0, 1), (1, 3), (2.5, 5), told 1, 2, 4.5.
  second = [1.0, 1.5, 2.0, 2.0 + 2.5 / 3, 2.0 + 5.0 / 3, 4.5]
  at = compared.envelope(spots, [0.0, 0.5, 1.0, 1.5, 2.0, 4.0])
  np.testing.assert_allclose(at, np.mean([first, second], axis=0))


def test_an_envelope_is_the_concave_hull_up_to_the_best():
  places = [
    (0, 0),
    (1, 1),
    (2, 1.2),
    (3, 3),
    (4, 2),
    (5, 2.9),
    (0.0, 9),
    (3, 2),
  ]
  spots = [spot(place, place) for place in map(tuple, places)]
  at = compared.envelope(spots, [0.5, 1, 2, 3, 5])
  # (1, 1) lies on the line; what is behind the best, or of no KL, counts not.
  np.testing.assert_allclose(at, [0.5, 1, 2, 3, 3])


def test_halves_are_every_other_prompt_with_all_its_draws():
  rows = [{"id": i, "r": float(10 * i + j)} for i in (3, 5, 8) for j in (0, 2)]
  assert frontier.halves(rows, ["r"]) == [{"r": (31 + 81) / 2}, {"r": 51.0}]
  assert len(frontier.halves(rows[:2], ["r"])) == 1


def test_a_method_is_compared_up_to_the_kl_that_both_reach(tmp_path):
  found = compared.read(build(tmp_path))
  assert found.missing == []
  assert found.seeds == list(SEEDS)
  ppo, best_of = standings.comparisons(found)
  # Between the first checkpoint, of early reward, and the last.
  assert (ppo["since"], ppo["until"]) == (0.5, 3.0)
  kls = np.linspace(0.5, 3, standings.KLS)
  share = np.mean(np.minimum(kls, 1))  # linear up to KL 1, then the same
  expected = [share * ahead for ahead in (0.1, 0.2, 0.3)]
  np.testing.assert_allclose(ppo["each"], expected)
  mean = np.mean(expected)
  se = np.std(expected, ddof=1) / 3**0.5
  assert ppo["difference"] == pytest.approx({"mean": mean, "se": se})
  assert ppo["theirs"]["mean"] == pytest.approx(0.5)
  assert ppo["dominated"] == 1.0  # by one of ours of the same KL, and more
  # Of ours only the early ones, of 0.4.
  assert ppo["dominates"] == pytest.approx(0.5)
  # Of Best of N only the KL that ours reaches is compared.
  assert (best_of["since"], best_of["until"]) == (1.5, 1.5)
  np.testing.assert_allclose(best_of["each"], [0.05, 0.15, 0.25])


def test_the_kl_must_fall_with_beta(tmp_path):
  build(tmp_path)
  trend = standings.trend(compared.read(tmp_path))
  assert trend["values"] == [5.0, 1.0, 0.1]
  assert trend["kl"] == [[1.0, 2.0, 3.0]] * 3
  assert trend["strict"] == 3
  assert trend["p"] == pytest.approx(1 / 6**3)  # of 3! orders in each seed
  path = tmp_path / "seed=1/dpo"
  values = made_up.saved(path, "b5.0", "evaluation.json")
  made_up.lines(path / "b5.0/evaluation.json", [place(values, 2.5, 0.6)])
  trend = standings.trend(compared.read(tmp_path))
  assert trend["strict"] == 2
  assert trend["p"] > 1 / 6**3


def test_the_report_says_all_of_it(tmp_path):
  build(tmp_path)
  page = report.write(tmp_path)
  assert page == tmp_path / "report.html"
  text = report.text(tmp_path)
  assert "Is DPO ahead?" in text
  assert "3 of 3 seeds" in text
  assert "loss.beta" in text
  rows = [line for line in text.splitlines() if line.startswith("PPO")]
  assert "+0.1" in rows[0]
  assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
  html = page.read_text()
  assert "Best of N" in html
  assert "://" not in html.replace("http://www.w3.org", "")
  summary = json.loads((tmp_path / "frontier.json").read_text())
  assert len(summary["runs"]) == 2 * 3 * len(BETAS)
  assert {run["seed"] for run in summary["runs"]} == set(SEEDS)
  ends = {(e["method"], e["setting"]): e for e in summary["ends"]}
  last = ends["dpo", "beta=0.1"]
  assert last[TRUTH]["mean"] == pytest.approx(0.7)
  assert last[TRUTH]["se"] == pytest.approx(0.1 / 3**0.5)
  assert ("reference", "") in ends
  assert last["updates"]["mean"] == 200
  best = ends["best_of", "N=4"]
  assert (best["kl"], best[TRUTH]) == (1.5, {"mean": 0.55, "se": 0.0})


def test_what_is_not_there_is_said_and_the_rest_is_shown(tmp_path):
  build(tmp_path, seeds=(0,), methods=("dpo",))
  (tmp_path / "seed=0/best_of/best_of.json").unlink()
  (tmp_path / "seed=0/dpo/b1.0/evaluation.json").unlink()
  page = report.write(tmp_path).read_text()
  found = compared.read(tmp_path)
  assert found.seeds == [0]
  told = "\n".join(found.missing)
  assert "seed 0, dpo, beta=1.0: not measured yet" in told
  assert f"{tmp_path}/seed=1/dpo: no sweep yet" in told
  assert f"{tmp_path}/seed=0/best_of/best_of.json: not there yet" in told
  assert "not measured yet" in page
  assert standings.trend(found) is None  # two values tell no trend
  for row in standings.comparisons(found):
    assert row.keys() == {"against"}


def test_a_method_is_not_behind_for_having_no_early_checkpoint(tmp_path):
  """Both lie on one curve; ours has been measured nearer to the reference."""

  def on_curve(kl):
    half = (kl, 0.5 + 0.1 * kl**0.5)
    return compared.Spot(1, (kl, 0.1), (half[1], 0.1), [half, half])

  def curve(method, kls):
    run = folder.Run("a", {}, [], {}, [], {"loss": {}})
    return compared.Curve(method, 0, "a", [on_curve(k) for k in kls], run)

  options = OPTIONS | {"against": ["ppo"]}
  start = folder.Run("reference", {}, [], {}, [], {})
  start.evaluation.update(
    step=0,
    means={k: {"mean": v, "se": 0.1} for k, v in (("kl", 0), (TRUTH, 0.5))},
    halves=[{"kl": 0.0, TRUTH: 0.5}] * 2,
  )
  every = {
    "dpo": [curve("dpo", np.linspace(0.3, 9, 80))],
    "ppo": [curve("ppo", np.linspace(3, 9, 56))],
  }
  found = compared.Compared(options, TRUTH, {0: start}, every, {}, {}, [])
  (row,) = standings.comparisons(found)
  assert (row["since"], row["until"]) == (3.0, 9.0)
  assert row["difference"]["mean"] == pytest.approx(0, abs=1e-3)


def test_the_time_of_a_resumed_run_is_that_of_all_its_starts(tmp_path):
  build(tmp_path, seeds=(0,))
  for beta in BETAS:
    made_up.lines(
      tmp_path / f"seed=0/dpo/b{beta}/metrics.jsonl",
      [
        {"step": n, "kind": "train", "elapsed": e, "wall_time": w}
        for n, e, w in ((1, 100.0, 1100.0), (2, 200.0, 1200.0), (3, 10.0, 1310))
      ],
    )
  rows = standings.ends(compared.read(tmp_path))
  (row,) = (
    r for r in rows if r["setting"] == "beta=0.1" and "dpo" in r.values()
  )
  assert row["seconds"]["mean"] == 210


@pytest.mark.parametrize("key", ["kl", TRUTH])
def test_what_is_not_finite_is_not_measured(tmp_path, key):
  build(tmp_path, seeds=(0,))
  path = tmp_path / "seed=0/dpo"
  values = made_up.saved(path, "b1.0", "evaluation.json")
  values["means"][key]["mean"] = None
  made_up.lines(path / "b1.0/evaluation.json", [values])
  report.write(tmp_path)
  (line,) = (m for m in compared.read(tmp_path).missing if "seed 0, dpo" in m)
  assert "beta=1.0" in line


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ('{"best_of": [', "best_of.json"),
    ("{}", "it has no best_of"),
    (
      json.dumps({"best_of": [{"n": 4, "bound": 1.0, "means": {}}]}),
      f"has no {TRUTH}",
    ),
  ],
)
def test_a_damaged_best_of_n_is_said(tmp_path, text, told):
  build(tmp_path, seeds=(0, 1))
  (tmp_path / "seed=0/best_of/best_of.json").write_text(text)
  report.write(tmp_path)
  assert told in "".join(compared.read(tmp_path).missing)


def test_seeds_are_compared_at_the_n_that_all_of_them_have(tmp_path):
  build(tmp_path)
  path = tmp_path / "seed=0/best_of/best_of.json"
  items = json.loads(path.read_text())["best_of"]
  more = {**items[1], "n": 2, "bound": 0.2}
  path.write_text(json.dumps({"best_of": [*items, more]}))
  report.write(tmp_path)
  *_, row = standings.comparisons(compared.read(tmp_path))
  assert (row["since"], row["until"]) == (1.5, 1.5)


def test_best_of_n_of_other_prompts_is_moved_by_what_one_draw_has_there(
  tmp_path,
):
  build(tmp_path)
  path = tmp_path / "seed=0/best_of/best_of.json"
  items = json.loads(path.read_text())["best_of"]
  for item in items:
    item["means"][TRUTH]["mean"] -= 0.2  # harder beginnings
  path.write_text(json.dumps({"best_of": items}))
  points = compared.best_of_points(compared.read(tmp_path), 0)
  assert [reward for *_, reward in points] == pytest.approx([0.55, 0.9])


def test_names_of_files_are_text_on_the_page_and_in_markdown(tmp_path):
  build(tmp_path, seeds=(0,))
  path = tmp_path / "seed=0/dpo/sweep.json"
  about = json.loads(path.read_text())
  about["points"][0]["name"] = "a|b<script>*y*"
  path.write_text(json.dumps(about))
  page = report.write(tmp_path).read_text()
  assert "<script>" not in page
  text = (tmp_path / "report.md").read_text()
  assert "<script>" not in text
  assert "a\\|b" in text


def test_a_reference_alone_says_nothing_yet(tmp_path):
  build(tmp_path, seeds=(0,), methods=("dpo",))
  for beta in BETAS:
    (tmp_path / f"seed=0/dpo/b{beta}/evaluation.json").unlink()
  with pytest.raises(ValueError, match="has measured a run yet"):
    report.write(tmp_path)


def test_other_methods_may_be_done_before_ours(tmp_path):
  build(tmp_path, seeds=(0, 1), methods=("ppo",))
  report.write(tmp_path)
  assert "PPO" in report.text(tmp_path)
  # Without halves nothing may be chosen: said, and left out.
  path = tmp_path / "seed=1/ppo"
  values = made_up.saved(path, "reference", "evaluation.json")
  del values["halves"]
  made_up.lines(path / "reference/evaluation.json", [values])
  found = compared.read(tmp_path)
  assert found.seeds == [0]
  assert "sample.checkpoints=True" in "".join(found.missing)


def test_nothing_measured_is_an_error(tmp_path):
  (tmp_path / "compared.json").write_text("{}")
  with pytest.raises(ValueError, match=r"compared\.json is damaged: no seeds"):
    report.write(tmp_path)
  (tmp_path / "compared.json").write_text(json.dumps(OPTIONS))
  with pytest.raises(ValueError, match="has measured a run yet"):
    report.write(tmp_path)
