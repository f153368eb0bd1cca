"""The snippets of the README run as they stand."""

import functools
import json
import re
import shlex

import numpy as np
import pytest

import dpo_jax
from dpo_jax import cli, sweeps, verbs
from dpo_jax.config import load, saved
from dpo_jax.ops import losses
from tests import conftest, templates
from tests.models import parity

README = (conftest.ROOT / "README.md").read_text()
RESULTS = conftest.ROOT / "scripts/results"
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)


def test_the_notebook_snippet_gives_log_two_for_every_pair():
  names = {}
  exec(SNIPPETS[0], names)
  values, weights = names["terms"].losses["dpo"]
  assert weights.sum() == 8
  np.testing.assert_allclose(values[weights > 0], np.log(2), rtol=1e-5)


def test_the_snippet_of_an_own_loss_trains_with_it(tmp_path):
  before = dict(losses.LOSSES)
  snippet = SNIPPETS[1].replace("runs/mine_smoke", str(tmp_path))
  try:
    exec(snippet, {"dj": dpo_jax})
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  finally:
    losses.LOSSES.clear()
    losses.LOSSES.update(before)
  first, second = (json.loads(row)["loss"] for row in rows[:2])
  assert abs(first - 1) < 1e-5  # h = 0 at the reference
  assert second < first


def test_the_commands_of_the_readme_name_files_and_fields_that_exist():
  for page in (conftest.ROOT / "README.md", *RESULTS.glob("*.md")):
    for path, anchor in re.findall(
      r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()
    ):
      target = page.parent / path if path else page
      assert target.is_file(), (page.name, path)
      if anchor:
        headings = re.findall(r"(?m)^#+ (.*)$", target.read_text())
        names = [re.sub(r"[^\w -]", "", h.lower()) for h in headings]
        assert anchor in [name.replace(" ", "-") for name in names], anchor
  config = load.load_config("configs/dpo.py")
  ipo = load.load_config("configs/dpo.py:loss=ipo")
  adapter = load.load_config("configs/dpo.py:lora")
  ppo = load.load_config("configs/ppo.py")
  judge = load.load_config("configs/judge.py")
  configs = config, ipo, adapter, ppo, judge
  every = [saved.flatten(c.to_dict()) for c in configs]
  fields = {path for flat in every for path in flat}
  for field in re.findall(r"--config\.([\w.]+)=", README):
    assert field in fields, field


def commands():
  """The words behind dpo-jax of each command in a block of the README."""
  for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
    for line in block.replace("\\\n", " ").splitlines():
      if line.startswith("dpo-jax"):
        yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("words", [*commands()], ids=" ".join)
def test_every_command_is_accepted_away_from_the_checkout(
  words, tmp_path, monkeypatch, capsys
):
  """Up to where its verb begins to work; a sweep up to its first point."""
  monkeypatch.chdir(tmp_path)
  row = {"prompt": "a", "chosen": " b", "rejected": " c"}
  for name in ("my", "held_out", "chat"):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
  for name in ("chat", "sft", "reward"):
    run = tmp_path / "runs" / name / "config.json"
    run.parent.mkdir(parents=True)
    run.write_text(json.dumps(load.load_config("dpo:smoke").to_dict()))
  begun = []

  def begins(*args, **kwargs):
    begun.append(args)
    return 0

  for name in ("keep_pages", "claim_devices", "leave_triton_out", "keep"):
    monkeypatch.setattr(verbs.host, name, lambda: None)
  monkeypatch.setattr(verbs.host, "hub_or_cache", lambda: None)
  monkeypatch.setattr(sweeps, "sweep", begins)
  monkeypatch.setattr(verbs, "write_report", lambda *_: 0)
  for name, verb in verbs.VERBS.items():
    if name != "sweep":
      other = verb._replace(run=begins)
      monkeypatch.setitem(verbs.VERBS, name, other)
  assert cli.main(words) == 0, capsys.readouterr().err
  assert len(begun) == 1


@pytest.mark.slow
def test_every_block_runs_where_no_checkout_is_in_sight(installed, tmp_path):
  """With the installed package, in the README's order, in one folder."""
  run = functools.partial(conftest.run_installed, installed, tmp_path)
  model = tmp_path / "model"
  model.mkdir()
  name = "HuggingFaceTB/SmolLM2-135M-Instruct"
  parity.write(parity.small(name, vocab_size=300), model)
  templates.write(model, templates.CHATML)
  row = {"prompt": "a plot", "chosen": " of wit", "rejected": " of noise"}
  talk = {"prompt": [{"role": "user", "content": "Is it dull?"}]}
  for name, said in (("chosen", "No."), ("rejected", "Yes.")):
    talk[name] = [{"role": "assistant", "content": said}]
  for name, data in (("my", row), ("held_out", row), ("chat", talk)):
    rows = [json.dumps(data) for _ in range(64)]
    if name == "my":  # prompts to sample for, 64 of them
      rows = [json.dumps({**row, "prompt": f"plot {k}"}) for k in range(64)]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
  for words in commands():
    words = [re.sub("hf:(NAME|.*/.*)", f"hf:{model}", word) for word in words]
    if "--config.data.train=toy" in words:  # as many steps as a minute has
      words.append("--config.train.steps=2")
    done = run("-m", "dpo_jax", *words)
    assert done.returncode == 0, (words, done.stdout[-500:], done.stderr)
    assert "Traceback" not in done.stderr
  for snippet in SNIPPETS:
    done = run("-c", f"import dpo_jax as dj\n{snippet}")
    assert done.returncode == 0, done.stderr
  left = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("runs/*/*")}
  assert left >= {
    *("runs/mine/metrics.jsonl", "runs/dpo/metrics.jsonl"),
    *("runs/reward/reward.json", "runs/ppo/metrics.jsonl"),
    "runs/online/metrics.jsonl",
    *("runs/chat/export", "runs/betas/report.html", "runs/losses/report.html"),
    "runs/mine_smoke/metrics.jsonl",
  }


def test_the_spine_has_as_many_lines_as_the_readme_says():
  rows = re.findall(r"\| \[`[^`]*`\]\((\S+)\) \| ([\d,]+) \|", README)
  counted = {
    path: len((conftest.ROOT / path).read_text().splitlines())
    for path, _ in rows
  }
  assert counted == {path: int(told.replace(",", "")) for path, told in rows}
  (told,) = re.findall(r"about an hour\s+\(([\d,]+) lines", README)
  assert int(told.replace(",", "")) == sum(counted.values()) <= 2100


def test_the_table_of_the_papers_claims_is_that_of_the_runs():
  """Differences, their intervals and verdicts, as frontier_*.json have them."""
  rows = {
    cells[0]: cells[1:]
    for line in README.splitlines()
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    if len(cells) == 4
  }
  names = {
    "ppo": "PPO",
    "ppo_gt": "PPO on r\\* itself",
    "unlikelihood": "Unlikelihood",
    "preferred_ft": "Preferred-FT",
    "best_of": "Best of N",
  }
  exact = json.loads((RESULTS / "frontier_exact.json").read_text())
  labels = ("bradley_terry", "deterministic")
  for found in exact["comparisons"]:
    if found["against"] not in names:  # beside the paper's own
      continue
    told = rows[names[found["against"]]][labels.index(found["labels"])]
    assert found["verdict"] in told.replace("*", "")
    if "p" in found:
      numbers = (found[key] for key in ("difference", "low", "high"))
      expected = [f"{x:+.4f}".replace("-", "−") for x in numbers]
      assert re.findall(r"[+−]\d\.\d{4}", told) == expected
  for number, trend in enumerate(exact["trends"]):
    told = rows["β controls the KL"][number].replace("*", "")
    seeds = f"{trend['strict']} of {len(trend['kl'])} seeds"
    assert told == f"in {seeds}: {trend['verdict']}"
  text = json.loads((RESULTS / "frontier_text.json").read_text())
  for found in text["comparisons"]:
    told = rows[names[found["against"]]][2]
    expected = [f"{x:+.3f}".replace("-", "−") for x in found["each"]]
    assert re.findall(r"[+−]\d\.\d{3}", told) == expected
