"""Reward models as scorers: of run folders, of published checkpoints, of texts
that others wrote; and functions of one's own."""

import json
import shutil

import jax
import numpy as np
import pytest

import dpo_jax
from dpo_jax import cli
from dpo_jax.config import load as load_lib
from dpo_jax.data.tokens import vocabulary
from dpo_jax.eval import completions, generate, rewards
from dpo_jax.run import build, gain, trained
from tests import conftest, folders, templates
from tests.models import parity

PROMPTS = ["The plot is", "The plot is", "", *"ABCDEFGHI"]
COMPLETIONS = [
  " warm and clever.",
  " dull and grim.",
  *("dull" + " so" * n for n in range(10)),
]
EOS = 256  # of the bytes


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(conftest.ROOT)
    patch.setattr(jax, "devices", lambda *_: one)
    yield


def config_of(arg="smoke", *overrides):
  return load_lib.load_config(
    f"configs/reward.py:{arg}", ("data.eval=None", "train.steps=2", *overrides)
  )


def finished(config, folder, **how):
  """(Run, TrainState) of a reward model's folder, gain and bias in it."""
  run, state = folders.untrained(config, folder, **how)
  run.finish(state.params, state.frozen, 2, folder)
  return run, state


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder, Run, TrainState) of a reward model with a gain and a bias."""
  folder = tmp_path_factory.mktemp("reward")
  config = config_of("smoke", "reward.unit=true")
  return folder, *finished(config, folder)


def plain(setup, params, ids):
  """The reward of a sequence of tokens, alone in a row, before gain and bias.

  By the model's `decode`, which knows no rows.
  """
  model = setup.model
  length = len(ids)
  batch = {
    "tokens": np.asarray([ids], np.int32),
    "positions": np.arange(length, dtype=np.int32)[None],
    "segment_ids": np.ones((1, length), np.int32),
    "branch_ids": np.zeros((1, length), np.int32),
    "example_index": np.arange(length, dtype=np.int32)[None, None],
  }
  hidden, _ = model.apply(params["model"], batch)
  return float(
    hidden[0, -1] @ params["reward"]["kernel"] + params["reward"]["bias"]
  )


def ids_of(prompt, completion, end=(EOS,)):
  return [*(list(prompt.encode()) or [EOS]), *completion.encode(), *end]


def test_a_reward_is_of_the_text_and_its_end_with_gain_and_bias(made):
  folder, run, state = made
  scorer = rewards.load(f"reward:{folder}")
  assert scorer.name == "reward"
  got = scorer.score(PROMPTS, COMPLETIONS)
  saved = json.loads((folder / gain.FILE).read_text())
  few = [0, 1, 2, 11]
  want = [
    saved["gain"]
    * plain(run.setup, state.params, ids_of(PROMPTS[i], COMPLETIONS[i]))
    + saved["bias"]
    for i in few
  ]
  np.testing.assert_allclose(got[few], want, rtol=0, atol=1e-5)
  assert np.ptp(got) > 0.1
  # Alone, in another order, and twice: it does not see its mates.
  order = np.random.default_rng(0).permutation(12)
  again = scorer.score(*([x[i] for i in order] for x in (PROMPTS, COMPLETIONS)))
  np.testing.assert_allclose(again, got[order], rtol=0, atol=1e-5)
  alone = scorer.score(PROMPTS[:1], COMPLETIONS[:1])
  np.testing.assert_allclose(alone, got[:1], rtol=0, atol=1e-5)


def draws(end, ids=None, prompts=PROMPTS):
  return [
    generate.Draw(
      *(i, p, list(p.encode()) or [EOS], c, ids or [*c.encode(), *end]),
      bool(end),
    )
    for i, (p, c) in enumerate(zip(prompts, COMPLETIONS, strict=True))
  ]


def test_a_reward_of_draws_is_of_their_tokens(made):
  """Read at the last of them: one that did not end has no end to be read at.

  Of another tokenizer the text counts.
  """
  folder, run, state = made
  score = rewards.load(f"reward:{folder}").score
  texts = score(PROMPTS, COMPLETIONS)
  np.testing.assert_allclose(score.of_draws(draws([EOS])), texts, atol=1e-5)
  cut = score.of_draws(draws([]))
  assert np.abs(cut - texts).min() > 1e-4
  saved = json.loads((folder / gain.FILE).read_text())
  want = plain(run.setup, state.params, ids_of(PROMPTS[0], COMPLETIONS[0], ()))
  want = saved["gain"] * want + saved["bias"]
  np.testing.assert_allclose(cut[0], want, rtol=0, atol=1e-5)
  other = score.of_draws(draws([], ids=[7]))
  np.testing.assert_allclose(other, texts, atol=1e-5)


def test_prompts_of_a_chat_template_that_the_model_has_not_are_refused(made):
  score = rewards.load(f"reward:{made[0]}").score
  prompts = [f"<|im_start|>user\n{p}<|im_end|>" for p in PROMPTS]
  with pytest.raises(ValueError, match=r"reward:.*'<\|im_end\|>' is no token"):
    score.of_draws(draws([], ids=[7], prompts=prompts))


def test_a_reward_model_of_another_chat_template_is_refused(tmp_path):
  """Though its tokenizer is the same: before anything is drawn."""
  names = {}
  for name, template in (
    ("policy", templates.CHATML),
    ("other", templates.CHATML.replace("<|im_end|>\n", "<|im_end|>")),
    ("none", None),
  ):
    (tmp_path / name).mkdir()
    names[name] = templates.write(tmp_path / name, template)
  messages = [{"role": "user", "content": "The plot is"}]
  rows = [{"prompt": messages}, {"prompt": "The plot is"}]
  for name, row in zip(("chat", "text"), rows, strict=True):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
  scorers = {}
  for name in ("policy", "other"):
    folder = tmp_path / f"run-{name}"
    finished(config_of("smoke", f"tokenizer={names[name]}"), folder)
    scorers[name] = rewards.load(f"reward:{folder}")

  def check(scorer, prompts, policy="policy"):
    config = config_of(
      *("smoke", f"tokenizer={names[policy]}"),
      f"sample.prompts={tmp_path / prompts}.jsonl",
    )
    setup = build.prepare_model(config)
    generate.check(setup, [scorers[scorer]], generate.prompts(setup))

  with pytest.raises(
    ValueError, match=r"scorer reward: .*chat template.*'<\|im"
  ):
    check("other", "chat")
  check("policy", "chat")
  check("other", "text")  # which no template wrote
  check("other", "text", policy="none")


def test_a_reward_refuses_a_text_that_its_model_cannot_read(made):
  score = rewards.load(f"reward:{made[0]}").score
  room = made[1].setup.model.config.max_positions
  with pytest.raises(ValueError, match=r"1 texts are longer .*: \d+ tokens"):
    score(["The plot"] * 2, [" fine", " " + "a" * room])
  with pytest.raises(ValueError, match="2 texts are longer"):
    score(["a" * (room - 3)] * 2, ["aaa"] * 2)  # and its end
  assert len(score(["a" * (room - 3)], ["aa"])) == 1
  score.check(["The plot"])
  with pytest.raises(ValueError, match="1 texts are longer"):
    score.check(["a" * (room + 1)])


def test_a_folder_that_was_trained_anew_is_another_scorer(made, tmp_path):
  folder, *_ = made
  config = config_of()
  copy = shutil.copytree(folder, tmp_path / "run")
  spec = f"reward:{copy}"
  before = rewards.load(spec)
  assert rewards.load(spec) is before
  old = before.score(PROMPTS[:2], COMPLETIONS[:2])
  shutil.rmtree(copy)
  finished(config, copy, seed=5)
  new = rewards.load(spec).score(PROMPTS[:2], COMPLETIONS[:2])
  assert np.abs(new - old).max() > 1e-3


def test_of_a_sweep_the_point_of_the_best_held_out_accuracy_scores(
  made, tmp_path
):
  points = ["epochs=1.0", "epochs=2.0", "epochs=3.0"]
  about = {"points": [{"name": n, "folder": n} for n in points]}
  (tmp_path / "sweep.json").write_text(json.dumps(about))
  for name in points[:2]:
    (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match="no point of it has a held-out"):
    rewards.load(f"reward:{tmp_path}")
  shutil.copytree(made[0], tmp_path / points[1], dirs_exist_ok=True)
  for name, value in zip(points, (0.8, 0.9), strict=False):
    told = json.dumps({"comparisons": {"rewards/accuracies": value}})
    (tmp_path / name / "evaluation.json").write_text(told)
  got = rewards.load(f"reward:{tmp_path}").score(PROMPTS, COMPLETIONS)
  want = rewards.load(f"reward:{made[0]}").score(PROMPTS, COMPLETIONS)
  np.testing.assert_array_equal(got, want)


def test_a_folder_of_no_reward_model_is_refused(tmp_path, made):
  config = load_lib.load_config("configs/dpo.py:smoke", ("data.eval=None",))
  text = json.dumps(config.to_dict())
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"trained no reward model .*implicit:"):
    rewards.load(f"reward:{tmp_path}")
  copy = shutil.copytree(made[0], tmp_path / "run")
  (copy / gain.FILE).unlink()
  with pytest.raises(ValueError, match="not trained to its end"):
    rewards.load(f"reward:{copy}")


# ── Functions of one's own ───────────────────────────────────────────────────


def test_a_function_of_texts_is_a_scorer_of_ones_own(monkeypatch):
  assert dpo_jax.SCORERS is rewards.SCORERS

  def mine(prompts, completions):
    return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]

  monkeypatch.setitem(dpo_jax.SCORERS, "mine", mine)
  scorer = rewards.load("mine")
  got = scorer.score(["ab", ""], ["c", "d"])
  assert got.dtype == np.float64
  assert got.tolist() == [3, 1]
  # Another function under the name is another scorer at once.
  monkeypatch.setitem(
    dpo_jax.SCORERS, "mine", lambda prompts, completions: [0.5] * len(prompts)
  )
  assert rewards.load("mine").score(["ab"], ["c"]).tolist() == [0.5]


def test_a_function_of_an_argument_makes_a_scorer(monkeypatch):
  def times(factor):
    return lambda prompts, completions: [
      float(factor) * len(c) for c in completions
    ]

  monkeypatch.setitem(rewards.SCORERS, "times", times)
  assert rewards.load("times:2").score([""], ["abc"]).tolist() == [6]
  monkeypatch.setitem(
    rewards.SCORERS, "none", lambda: lambda prompts, completions: [1]
  )
  assert rewards.load("none").score([""], ["abc"]).tolist() == [1]


@pytest.mark.parametrize(
  ("entry", "spec", "said"),
  [
    (lambda prompts, completions: [], "mine:a", "'mine:a': see the forms"),
    (lambda argument: None, "mine", "this one is written 'mine:…'"),
    (lambda argument: None, "mine:a", "'mine:a' was made as None"),
    (lambda a, b, c: None, "mine", r"takes \['a', 'b', 'c'\]; a scorer"),
    (3, "mine", r"SCORERS\['mine'\] = 3 is no function"),
  ],
)
def test_an_entry_that_is_no_scorer_is_refused(entry, spec, said, monkeypatch):
  monkeypatch.setitem(rewards.SCORERS, "mine", entry)
  with pytest.raises(ValueError, match=said):
    rewards.load(spec)


@pytest.mark.parametrize(
  ("result", "said"),
  [
    ([1.0, float("nan")], r"returned nan for completion 1 \(1 of 2"),
    ([1.0, float("inf")], "returned inf for completion 1"),
    ([1.0], r"scores of shape \[1\] for 2 completions"),
    ([[1.0], [2.0]], r"scores of shape \[2, 1\] for 2 completions"),
    (["good", "bad"], "returned no numbers"),
    (None, "scores of shape|returned"),
  ],
)
def test_scores_that_are_not_one_number_a_text_are_refused(
  result, said, monkeypatch, tmp_path
):
  """By the scorer's name, before anything is written."""

  def mine(prompts, completions):
    return result

  monkeypatch.setitem(rewards.SCORERS, "mine", mine)
  scorer = rewards.load("mine")
  with pytest.raises(ValueError, match=f"scorer 'mine' .*({said})"):
    scorer.score(["a", "b"], ["c", "d"])
  if result == [1.0]:
    policy = load_lib.load_config(
      "configs/dpo.py:smoke",
      (
        *("sample.prompts=toy:4", "sample.count=2", "sample.max_new_tokens=2"),
        "sample.scorers=mine",
      ),
    )
    setup = build.prepare_model(policy)
    with pytest.raises(ValueError, match="scorer 'mine'"):
      completions.write(setup, trained.initial(setup), {}, tmp_path)
    assert (tmp_path / "completions.jsonl").read_text() == ""


# ── Published checkpoints, in both directions ────────────────────────────────

FAMILIES = {
  "llama": "HuggingFaceTB/SmolLM2-135M-Instruct",
  "gpt2": "gpt2",
  "qwen2": "Qwen/Qwen2.5-0.5B-Instruct",
  "gpt_neox": "EleutherAI/pythia-70m",
}


def of_torch(folder, sequences):
  """What transformers computes of sequences of tokens, each alone."""
  import torch
  import transformers

  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    rows = [model(input_ids=torch.tensor([ids])).logits for ids in sequences]
  return torch.cat(rows).double().numpy()[:, 0]


def raw_of(family):
  raw = parity.small(FAMILIES[family], vocab_size=300)
  ends = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}
  return {**raw, **ends}


@pytest.mark.slow
@pytest.mark.parametrize("pad", [None, EOS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_reward_model_scores_as_transformers_does(
  family, pad, tmp_path
):
  """Where its end pads too, transformers reads the token before it."""
  import torch
  import transformers

  raw = {**raw_of(family), "pad_token_id": pad, "num_labels": 1}
  torch.manual_seed(0)
  given = {k: v for k, v in raw.items() if k != "model_type"}
  config = transformers.AutoConfig.for_model(raw["model_type"], **given)
  model = transformers.AutoModelForSequenceClassification.from_config(config)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(tmp_path)
  vocabulary.write(vocabulary.load("bytes"), tmp_path)
  got = rewards.load(f"reward:hf:{tmp_path}").score(PROMPTS, COMPLETIONS)
  ids = [ids_of(*each) for each in zip(PROMPTS, COMPLETIONS, strict=True)]
  want = of_torch(tmp_path, ids)
  # f32 of hidden states of order 1, in another order of sums.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.ptp(got) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_scores_an_export_as_the_run_does(family, lora, tmp_path):
  model, run = tmp_path / "model", tmp_path / "run"
  model.mkdir()
  parity.write(raw_of(family), model)
  longest = ("data.max_prompt_length=32", "data.max_completion_length=32")
  config = config_of(
    f"model=hf:{model}{',lora' * lora}",
    *("tokenizer=bytes", "data.train=toy:16", "data.batch_size=8", *longest),
    "reward.unit=true",
  )
  finished(config, run)
  got = rewards.load(f"reward:{run}").score(PROMPTS, COMPLETIONS)
  folder = tmp_path / "export"
  argv = ["export", "--workdir", str(run)]
  assert cli.main([*argv, f"--config.export.folder={folder}"]) == 0
  ids = [ids_of(*each) for each in zip(PROMPTS, COMPLETIONS, strict=True)]
  about = json.loads((folder / "dpo_jax.json").read_text())
  want = of_torch(folder, ids) + about["reward"]["bias"]
  assert about["reward"]["bias"] != 0
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  again = rewards.load(f"reward:hf:{folder}").score(PROMPTS, COMPLETIONS)
  np.testing.assert_allclose(again, got, rtol=1e-5, atol=1e-5)


def test_an_adapter_alone_has_no_place_for_a_reward_head(made, capsys):
  argv = ["export", "--workdir", str(made[0])]
  assert cli.main([*argv, "--config.export.form=adapter"]) == 2
  assert "no adapter" in capsys.readouterr().err.replace("not an", "no")


def test_a_checkpoint_without_a_score_is_no_reward_model(tmp_path):
  parity.write(raw_of("gpt_neox"), tmp_path)
  with pytest.raises(ValueError, match=r"holds no score\.weight"):
    rewards.load(f"reward:hf:{tmp_path}")
