"""The paper's three tasks: every constant, every stage, end to end in small."""

import json
import re

import datasets
import huggingface_hub
import jax
import pytest

from dpo_jax import cli, verbs
from dpo_jax.config import load
from dpo_jax.eval import rewards
from dpo_jax.run import build
from tests import conftest, templates
from tests.models import parity

TASKS = ("imdb", "tldr", "hh")
ARCHITECTURE = {
  "imdb": "gpt2",
  "tldr": "EleutherAI/gpt-j-6b",
  "hh": "EleutherAI/pythia-70m",
}
TRUTH = "probability:siebert/sentiment-roberta-large-english"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)


def steps(spec):
  """[(verb, name, axes, config)] of the stages of a config."""
  whole = load.load(spec, ())
  rest = "".join(f",{k}={v}" for k, v in whole.config.arguments)
  path = whole.module.__file__
  out = []
  for verb, name, *axes in whole.config.stages:
    one = load.load(f"{path}:stage={name}{rest}", (), axes)
    out.append((verb, name, axes, one.config))
  return out


def stages(task):
  """{name: config} of a task's stages."""
  return {name: config for _, name, _, config in steps(task)}


def axes_of(task):
  """{stage: values} of a task's sweeps."""
  return {
    name: [x for axis in axes for x in axis.partition("=")[2].split(",")]
    for verb, name, axes, _ in steps(task)
    if verb == "sweep"
  }


# ── Constants ─────────────────────────────────────────────────────────────────


def test_all_train_as_appendix_b_does():
  """PAPER 2.1: RMSprop 1e-6, 64 pairs, warm-up 150, norm 10, 512 tokens."""
  for task in TASKS:
    for verb, name, _, c in steps(task):
      data, optim = c.data, c.optim
      assert data.max_prompt_length + data.max_completion_length in (
        *(512, 256 + 60),  # those of rollouts, and 2-shot prompts
        1024 + 256,
      ), (task, name)
      if verb == "sample" or name == "ppo_gt_trl":
        continue
      assert (optim.name, optim.learning_rate) == ("rmsprop", 1e-6)
      assert (optim.decay, optim.eps, optim.moments) == (0.99, 1e-8, "float32")
      assert (optim.warmup, optim.schedule) == (150, "constant")
      assert optim.clip_norm == 10.0
      # Prompts of IMDb have six pairs each: 11 of them are nearest to 64.
      prompts = "pairs.jsonl" in data.train
      assert data.batch_size == (round(64 / 6) if prompts else 64), name
      assert c.model.dtype == "bfloat16"


# (task, stage, field, value, section of the paper's notes)
CONSTANTS = [
  # IMDb: 2.2 of the notes, section 6.1 and appendix C.1 of the paper.
  ("imdb", "sft", "init_from", "hf:openai-community/gpt2-large", "2.2"),
  ("imdb", "sft", "train.epochs", 1.0, "2.2"),
  ("imdb", "pairs", "sample.prefix", (2, 8), "2.2"),
  ("imdb", "pairs", "sample.count", 25_000, "2.2"),
  ("imdb", "pairs", "sample.draws", 4, "2.2"),
  ("imdb", "pairs", "sample.labels", "deterministic", "2.2"),
  ("imdb", "pairs", "sample.scorers", (TRUTH,), "2.2"),
  ("imdb", "pairs", "sample.temperature", 1.0, "2.2"),
  ("imdb", "pairs", "sample.max_new_tokens", 60, "2.2: 3 nats at .05 a token"),
  ("imdb", "held_out", "sample.labels", "deterministic", "2.2"),
  ("imdb", "reward", "train.epochs", 3.0, "2.2"),
  ("imdb", "dpo", "eval.every", 100, "2.2"),
  ("imdb", "dpo", "sample.checkpoints", True, "2.2: every 100 steps"),
  ("imdb", "ppo", "sample.checkpoints", True, "2.2"),
  ("imdb", "ppo_gt_trl", "checkpoint.every", 100, "2.2"),
  ("imdb", "dpo", "ref", "frozen", "1: the SFT policy"),
  ("imdb", "dpo", "sample.scorers", (TRUTH,), "2.2: evaluated by r*"),
  ("imdb", "dpo", "sample.prompts", "hf:stanfordnlp/imdb:test", "2.2"),
  ("imdb", "ppo", "rollout.scorer", "reward:runs/imdb/reward", "2.2"),
  ("imdb", "ppo", "rollout.prompts", 1024, "2.2: samples of a PPO step"),
  ("imdb", "ppo_gt", "rollout.prompts", 1024, "2.2"),
  ("imdb", "ppo_gt", "rollout.scorer", TRUTH, "2.2"),
  ("imdb", "ppo_gt", "loss.whiten", "both", "2.2: normalised rewards"),
  ("imdb", "ppo_gt_trl", "optim.learning_rate", 1.41e-5, "2.2: TRL 0.4.1"),
  ("imdb", "ppo_gt_trl", "loss.beta", 0.2, "2.2"),
  ("imdb", "ppo_gt_trl", "rollout.kl_horizon", 10_000, "2.2"),
  ("imdb", "ppo_gt_trl", "rollout.prompts", 256, "2.2"),
  ("imdb", "ppo_gt_trl", "data.batch_size", 16, "2.2"),
  ("imdb", "ppo_gt_trl", "rollout.epochs", 4, "2.2"),
  ("imdb", "ppo_gt_trl", "loss.gamma", 1.0, "2.2"),
  ("imdb", "ppo_gt_trl", "loss.lam", 0.95, "2.2"),
  ("imdb", "ppo_gt_trl", "loss.clip", 0.2, "2.2"),
  ("imdb", "ppo_gt_trl", "loss.value_clip", 0.2, "2.2"),
  ("imdb", "ppo_gt_trl", "loss.value_weight", 0.1, "2.2"),
  ("imdb", "best_of,temperature=1.0", "sample.draws", 128, "2: Best-of-N"),
  # TL;DR: 2.3, section 6.2.
  ("tldr", "sft", "init_from", "hf:EleutherAI/gpt-j-6b", "2.3"),
  (
    *("tldr", "sft", "data.train"),
    *("hf:CarperAI/openai_summarize_tldr:train", "2.3"),
  ),
  (
    *("tldr", "dpo", "data.train"),
    *("hf:CarperAI/openai_summarize_comparisons:train", "2.3"),
  ),
  ("tldr", "dpo", "loss.beta", 0.5, "2.3"),
  ("tldr", "dpo", "init_from", "runs/tldr/sft", "2.3"),
  ("tldr", "preferred", "init_from", "runs/tldr/sft", "2"),
  ("tldr", "ppo", "rollout.scorer", "reward:runs/tldr/reward", "2.3"),
  (
    *("tldr", "samples,policy=base,temperature=0.0", "init_from"),
    *("hf:EleutherAI/gpt-j-6b", "2: zero-shot"),
  ),
  ("tldr", "samples,policy=base,temperature=0.0", "sample.shots", 0, "2"),
  ("tldr", "best_of,temperature=0.5", "sample.best_of", (64, 128, 256), "2.4"),
  ("tldr", "samples,policy=dpo,temperature=0.0", "sample.count", 256, "2.3"),
  # HH: 2.4, section 6.2.
  ("hh", "preferred", "init_from", "hf:EleutherAI/pythia-2.8b", "2.4"),
  ("hh", "preferred", "algo", "sft", "2.4"),
  ("hh", "preferred", "data.train", "hf:Anthropic/hh-rlhf:train", "2.4"),
  ("hh", "preferred", "data.long_prompt", "keep_end", "2.1"),
  ("hh", "preferred", "data.max_prompt_length", 256, "2.1"),
  ("hh", "preferred", "eval.every", 20_000 // 64, "2.1"),
  ("hh", "dpo", "init_from", "runs/hh/preferred", "2.4: the reference"),
  ("hh", "dpo", "loss.beta", 0.1, "2.4"),
  ("hh", "best_of,temperature=1.0", "init_from", "runs/hh/preferred", "2"),
  (
    *("hh", "best_of,temperature=1.0", "sample.best_of"),
    *((1, 4, 16, 64, 128), "2.4"),
  ),
  ("hh", "samples,policy=base,temperature=1.0", "sample.shots", 2, "2.4"),
  (
    *("hh", "samples,policy=base,temperature=1.0", "sample.stop"),
    *(("\n\nHuman:",), "2.4"),
  ),
  (
    *("hh", "samples,policy=dpo,temperature=1.0", "sample.prompts"),
    *("one_turn:Anthropic/hh-rlhf:test", "2.4"),
  ),
]


@pytest.mark.parametrize("task", TASKS)
def test_every_constant_is_the_papers(task):
  made = stages(task)
  for of, stage, field, value, section in CONSTANTS:
    if of != task:
      continue
    got = made[stage]
    for name in field.split("."):
      got = got[name]
    assert got == value, (stage, field, section)


def test_the_sweeps_of_the_figure_are_22_runs():
  """PAPER 2.2."""
  axes = axes_of("imdb")
  targets = ["3.0", "6.0", "9.0", "12.0"]
  assert axes.pop("reward") == ["1.0", "2.0", "3.0"]  # its epochs
  assert axes == {
    "dpo": ["0.05", "0.1", "1.0", "5.0"],
    "unlikelihood": ["0.05", "0.1", "0.5", "1.0"],
    "preferred": ["0", "1"],
    "ppo": targets,
    "ppo_gt": targets,
    "ppo_gt_trl": targets,
  }
  assert sum(map(len, axes.values())) == 22


@pytest.mark.parametrize(
  ("task", "methods", "temperatures"),
  [
    (
      "tldr",
      ("base", "sft", "preferred", "dpo", "ppo"),
      (0.0, 0.25, 0.5, 0.75, 1.0),
    ),
    ("hh", ("base", "preferred", "dpo"), (0.25, 0.7, 1.0)),
  ],
)
def test_every_method_is_sampled_at_every_temperature(
  task, methods, temperatures
):
  """PAPER 2.3 and 2.4; the best of N draws of one text is that text."""
  made = stages(task)
  for temperature in temperatures:
    for method in methods:
      c = made.pop(f"samples,policy={method},temperature={temperature}")
      assert c.sample.temperature == temperature
      assert c.workdir.endswith(f"samples/{method}/T={temperature}")
    if temperature:
      c = made.pop(f"best_of,temperature={temperature}")
      assert c.sample.temperature == temperature
      assert c.sample.draws == max(c.sample.best_of)
      assert c.sample.scorers == (f"reward:runs/{task}/reward",)
  assert not [name for name in made if "temperature" in name]


@pytest.fixture
def no_network(monkeypatch):
  def refused(*_, **__):
    raise AssertionError("the network was asked")

  monkeypatch.setattr(datasets, "load_dataset", refused)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
  # Out of reach, and kept from before.
  monkeypatch.setattr(verbs.host, "hub_or_cache", lambda: "the hub is far")
  monkeypatch.setattr(verbs.preflight, "cached", lambda names, reason: None)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
  "spec", [*TASKS, "tldr:model=hf:EleutherAI/pythia-2.8b"]
)
def test_every_stage_is_a_config_that_can_run_and_is_planned(
  spec, capsys, monkeypatch
):
  for _, name, _, c in steps(spec):
    build.check(c)
    # What it reads is there, or is written by a stage before it.
    assert c.workdir.startswith("runs/"), name
  begun = []
  monkeypatch.setattr(verbs, "run", lambda *args: begun.append(args) or 0)
  source = load.load(spec, ("plan.device=A100", "plan.mfu=0.4"))
  assert verbs.train(source.config, source.config.workdir, source) == 0
  assert [verb for verb, *_ in begun] == [s[0] for s in source.config.stages]
  for verb, options, overrides in begun:
    assert ("sweep" in options) == (verb == "sweep")
    assert not overrides
  said = capsys.readouterr().out.partition("━━")[0].splitlines()
  *plan, far = said
  assert far.startswith("the hub is far: of ")
  assert plan[0].split() == [
    *("stage", "examples", "tokens", "FLOPs", "GiB/device", "hours")
  ]
  assert len(plan) == len(begun) + 3  # the head, the sum, what is assumed
  assert not any("not known" in line for line in plan)
  assert "A100 at 312 TFLOP/s each; training and scoring reach 40%" in plan[-1]


def test_the_recipes_show_the_plan_as_it_is(capsys, monkeypatch):
  """But for what is assumed, its last line, which they say in words."""
  page = (conftest.ROOT / "scripts/results/recipes.md").read_text()
  monkeypatch.setattr(verbs, "run", lambda *args: 0)
  monkeypatch.setattr(verbs.host, "hub_or_cache", lambda: None)
  for task in TASKS:
    source = load.load(task, ())
    assert verbs.train(source.config, source.config.workdir, source) == 0
    plan = capsys.readouterr().out.partition("━━")[0].splitlines()[:-1]
    total = float(plan[-1].split()[-1])
    if task == "imdb":
      assert "\n".join(plan) in page
    else:
      assert round(total, 1) == {"tldr": 2.9, "hh": 1.0}[task]


def test_a_plan_is_told_where_the_hub_is_out_of_reach(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(verbs.host, "hub_or_cache", lambda: "the hub is far")
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
  spec = f"hh:root={tmp_path / 'runs'}"
  assert cli.main(["train", "--config", spec]) == 2
  out, err = capsys.readouterr()
  assert "train dpo" in out
  assert "GiB/device" in out
  assert "is no folder here, the hub is far" in err
  assert not (tmp_path / "runs").exists()


def test_a_stage_starts_from_what_an_earlier_one_leaves():
  for task in TASKS:
    there = set()
    for _, name, _, c in steps(task):
      folders = [c.init_from, *c.sample.scorers]
      folders += [c.rollout.scorer] if c.rollout else []
      folders += [c.data.train, c.data.eval] if c.data.train else []
      for text in folders:
        found = re.match(rf"(?:reward:)?(runs/{task}/\w+)", text or "")
        assert found is None or found[1] in there, (name, text)
      there.add(c.workdir)


def test_what_is_wrong_with_a_later_stage_is_said_before_the_first(
  tmp_path, capsys
):
  spec = f"imdb:smoke,root={tmp_path / 'runs'},data={tmp_path}/none.jsonl"
  assert cli.main(["train", "--config", spec]) == 2
  assert "none.jsonl" in capsys.readouterr().err
  assert not (tmp_path / "runs").exists()


# ── End to end, on the columns and splits that the hub's data sets have ───────

SOME = range(16)
WORDS = (
  *("film", "plot", "cast", "hotel", "friend", "money", "week", "house"),
  *("dog", "job", "train", "warm", "dull", "clever", "slow", "funny", "grim"),
  *("lovely", "late", "early", "broken"),
)


def text(number, count):
  """Words that differ from those of another number."""
  return " ".join(
    WORDS[(number + k * (k + 1)) % len(WORDS)] for k in range(count)
  )


def write(folder, **splits):
  """A data set as the hub keeps one: parquet files, named by their splits."""
  (folder / "data").mkdir(parents=True)
  for name, rows in splits.items():
    made = datasets.Dataset.from_list(rows)
    if "text" in rows[0]:
      classes = datasets.ClassLabel(names=["neg", "pos"])
      made = made.cast_column("label", classes)
    made.to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
  return f"hf:{folder}"


def imdb(folder):
  """stanfordnlp/imdb: text, label; the class of "unsupervised" is −1."""

  def rows(start, labels):
    return [
      {"text": f"{text(start + n, 12).capitalize()}.<br />", "label": label}
      for n, label in enumerate(labels)
    ]

  return write(
    folder,
    train=rows(0, [0, 1] * 12),
    test=rows(24, [1, 0] * 12),
    unsupervised=rows(48, [-1] * 24),
  )


def post(number):
  title, said = text(number, 4), text(number, 16)
  return f"SUBREDDIT: r/advice\nTITLE: {title}\nPOST: {said}.\n"


def demonstrations(folder):
  """CarperAI/openai_summarize_tldr: prompt, label."""

  def rows(start):
    return [
      {"prompt": f"{post(n)}TL;DR:", "label": f" {text(n, 5)}"}
      for n in range(start, start + 16)
    ]

  return write(folder, train=rows(0), valid=rows(16), test=rows(32))


def comparisons(folder):
  """CarperAI/openai_summarize_comparisons: prompt, chosen, rejected."""

  def rows(start):
    sides = [(f"TL;DR: {text(n, 5)}", f"TL;DR: {text(n + 1, 3)}") for n in SOME]
    return [
      {"prompt": post(start + n), "chosen": a, "rejected": b}
      for n, (a, b) in zip(SOME, sides, strict=True)
    ]

  same = {"prompt": post(0), "chosen": "TL;DR: x", "rejected": "TL;DR: x"}
  splits = {name: rows(48) for name in ("test", "valid1", "valid2")}
  return write(folder, train=[*rows(0), same], **splits)


def dialogues(folder):
  """Anthropic/hh-rlhf: chosen, rejected; every other one has two turns."""

  def rows(start):
    for n in range(start, start + 24):
      talk = f"\n\nHuman: {text(n, 4)}?\n\nAssistant:"
      if n % 2:
        talk += f" {text(n, 3)}.\n\nHuman: {text(n + 1, 3)}?\n\nAssistant:"
      yield {
        "chosen": f"{talk} {text(n, 5)}.",
        "rejected": f"{talk} {text(n + 2, 4)}.",
      }

  odd = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c"}
  return write(folder, train=[*rows(0), odd], test=[*rows(24)])


def model(folder, task):
  """A checkpoint of the task's architecture with a tokenizer of its own."""
  folder.mkdir()
  whole = " ".join(WORDS)
  templates.write(folder, None, size=300, marks=(), text=whole)
  limits = {"n_positions": 512, "n_ctx": 512}
  raw = parity.small(ARCHITECTURE[task], vocab_size=300)
  raw |= {k: v for k, v in limits.items() if k in raw}
  parity.write(raw, folder)
  return f"hf:{folder}"


def argument(task, folder):
  """The argument of a task's smallest form, on data of the real columns."""
  parts = {"model": model(folder / "model", task), "root": folder / "runs"}
  if task == "imdb":
    data = imdb(folder / "imdb")
    parts |= {"data": data, "scorer": f"tfidf:{data}:train"}
  elif task == "tldr":
    parts["data"] = comparisons(folder / "comparisons")
    parts["sft"] = demonstrations(folder / "demonstrations")
  else:
    parts["data"] = dialogues(folder / "hh")
  return ",".join(["smoke", *(f"{k}={v}" for k, v in parts.items())])


@pytest.fixture
def one_device(monkeypatch):
  """As a user's machine has it; eight fake ones compile longer."""
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: one)


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def finite(workdir):
  """A run trained two steps."""
  rows = [
    r for r in lines_of(workdir / "metrics.jsonl") if r["kind"] == "train"
  ]
  assert [row["step"] for row in rows] == [1, 2], workdir
  assert all(row["loss"] is not None for row in rows), workdir


def run(task, folder, capsys):
  """(argv, folder of the stages, what was printed)."""
  argv = ["train", "--config", f"{task}:{argument(task, folder)}"]
  assert cli.main(argv) == 0, capsys.readouterr().err
  out = capsys.readouterr().out
  plan, *done = out.split("━━ ")
  assert "GiB/device" in plan
  assert "not known" not in plan
  names = [f"{verb} {name}" for verb, name, *_ in steps(argv[-1])]
  assert [stage.splitlines()[0] for stage in done] == names
  return argv, folder / "runs", out


@pytest.mark.slow
def test_hh_runs_end_to_end(tmp_path, capsys, one_device):
  _, root, out = run("hh", tmp_path, capsys)
  for name in ("preferred", "reward", "dpo"):
    finite(root / name)
  assert "24 × dialogue cut behind its last 'Assistant:'" in out
  assert "1 skipped" in out
  for policy in ("base", "preferred", "dpo"):
    drawn = lines_of(root / f"samples/{policy}/T=0.25/completions.jsonl")
    assert len(drawn) == 8
    assert all(row["prompt"].count("Human:") == 1 for row in drawn)
  best = json.loads((root / "best_of/T=1.0/best_of.json").read_text())
  assert [item["n"] for item in best["best_of"]] == [1, 4]
  assert best["ranking"] == "reward/reward"


@pytest.mark.slow
def test_tldr_runs_end_to_end(tmp_path, capsys, one_device):
  argv, root, out = run("tldr", tmp_path, capsys)
  for name in ("sft", "preferred", "reward", "dpo", "ppo"):
    finite(root / name)
  assert "16 × 'label' of words read as 'completion'" in out
  assert "'TL;DR:' before both replies read as the end of the prompt" in out
  assert "1 skipped: identical pair" in out
  for policy in ("base", "sft", "preferred", "dpo", "ppo"):
    for temperature in (0.0, 0.25):
      folder = root / f"samples/{policy}/T={temperature}"
      drawn = lines_of(folder / "completions.jsonl")
      assert len(drawn) == 8
      assert all(row["prompt"].endswith("\nTL;DR:") for row in drawn)
  assert cli.main(argv) == 0  # goes on where it was: all is done
  assert "1/2  loss" not in capsys.readouterr().out


@pytest.mark.slow
def test_imdb_runs_end_to_end(tmp_path, capsys, one_device):
  _, root, _ = run("imdb", tmp_path, capsys)
  finite(root / "sft")
  pairs = lines_of(root / "pairs/pairs.jsonl")
  assert len(pairs) == 8
  assert all(len(row["completions"]) == 4 for row in pairs)
  points = {
    **{"dpo": "beta=0.05", "unlikelihood": "alpha=0.05", "preferred": "seed=0"},
    **dict.fromkeys(("ppo", "ppo_gt", "ppo_gt_trl"), "kl_target=3.0"),
    "reward": "epochs=1.0",
  }
  for name, point in points.items():
    finite(root / name / point)
    told = json.loads((root / name / point / "evaluation.json").read_text())
    if name == "reward":
      assert 0 <= told["comparisons"]["rewards/accuracies"] <= 1
    else:
      assert {"reward/tfidf", "kl", "log_ratio"} <= told["means"].keys()
    assert (root / name / "report.html").exists()
  best = json.loads((root / "best_of/T=1.0/best_of.json").read_text())
  assert best["ranking"] == "reward/reward"
  assert "reward/tfidf" in best["best_of"][1]["means"]


def test_the_scorers_of_the_tasks_are_known():
  for task in TASKS:
    for _, _, _, c in steps(task):
      specs = [*c.sample.scorers, *([c.rollout.scorer] if c.rollout else [])]
      assert {spec.partition(":")[0] for spec in specs} <= set(rewards.SCORERS)
