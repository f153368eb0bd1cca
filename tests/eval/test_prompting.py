"""What a model is asked, what ends its answer, and what is read of it."""

import json
import re
import string

import numpy as np
import pytest

from dpo_jax import preflight
from dpo_jax.config import load as load_lib
from dpo_jax.config import saved
from dpo_jax.data.tokens import tokenize
from dpo_jax.eval import (
  best_of,
  completions,
  frontier,
  generate,
  prompting,
  rewards,
)
from dpo_jax.run import build, checks, trained
from tests import conftest, folders, templates, worlds

TOLD = '{"prompt": "Q%d?", "completion": " A%d."}\n'
LIMIT = "data.max_prompt_length=50"


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  sampled = (
    *("sample.prompts=toy", "sample.count=6", "sample.draws=8"),
    *("sample.max_new_tokens=8", "sample.batch_size=48"),
    *(LIMIT, "data.max_shapes=1"),
  )
  return load_lib.load_config(config, (*sampled, *overrides))


@pytest.fixture(scope="module")
def setup():
  return build.prepare_model(load())


@pytest.fixture(scope="module")
def trees(setup):
  """The parameters of a policy and of its reference."""
  ref = worlds.noisy(trained.initial(setup), 1, 0.3)
  return worlds.noisy(ref, 2, 0.05), ref


def asked(setup, *overrides):
  """{bare prompt: text of the ids that the model is given}."""
  given = generate.prompts(folders.asking(setup, load(*overrides)))
  return {text: setup.tokenizer.decode(ids) for text, ids in given}


@pytest.fixture
def told(tmp_path):
  path = tmp_path / "told.jsonl"
  path.write_text("".join(TOLD % (n, n) for n in range(6)))
  return f"sample.shots_from={path}"


def test_the_ids_are_of_what_is_asked_and_the_text_is_bare(setup, tmp_path):
  plain = asked(setup)
  assert all(text == whole for text, whole in plain.items())
  literal = asked(setup, "sample.template=Film. {prompt}\nTL;DR:")
  assert literal == {text: f"Film. {text}\nTL;DR:" for text in plain}
  path = tmp_path / "tldr.txt"
  path.write_text("Film. {prompt}\nTL;DR:\n")
  assert asked(setup, f"sample.template={path}") == literal


def test_examples_are_the_same_for_all_prompts_and_drawn_by_the_seed(
  setup, told
):
  shots = ("sample.shots=2", told)
  fronts = {}
  for seed in range(6):
    here = asked(setup, *shots, f"sample.seed={seed}")
    assert here == asked(setup, *shots, f"sample.seed={seed}")
    (fronts[seed],) = {whole.removesuffix(text) for text, whole in here.items()}
    first, second = fronts[seed].split(".")[:-1]
    assert first != second
  assert len(set(fronts.values())) > 3


def test_no_prompt_is_its_own_example(setup, told):
  own = f"sample.prompts={told.partition('=')[2]}"
  for seed in range(4):
    for text, whole in asked(
      setup, own, told, "sample.shots=5", f"sample.seed={seed}"
    ).items():
      others = {f"Q{n}? A{n}." for n in range(6)} - {f"{text} A{text[1]}."}
      front = whole.removesuffix(text)
      assert {part + "." for part in front.split(".")[:-1]} == others
  with pytest.raises(ValueError, match=r"sample.shots = 6: .* 5 examples"):
    asked(setup, own, told, "sample.shots=6")


@pytest.mark.parametrize("rule", ["error", "keep_start"])
def test_a_long_prompt_is_long_with_its_examples(rule, setup, told):
  here = (told, "sample.shots=6", f"data.long_prompt={rule}")
  message = r"max_prompt_length = 50.*sample.shots = 6 examples and sample.temp"
  with pytest.raises(ValueError, match=message) as caught:
    asked(setup, *here)
  said = "keep_start would cut what is asked" in str(caught.value)
  assert said == (rule == "keep_start")


def test_of_a_long_prompt_the_end_may_be_kept(setup, told):
  more = (told, "sample.shots=6", "data.long_prompt=keep_end")
  for text, whole in asked(setup, *more).items():
    assert len(whole) == 50
    assert whole.endswith(text)


def test_earlier_turns_are_examples_of_messages(setup, tmp_path):
  def path(name, rows):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

  def said(role, content):
    return {"role": role, "content": content}

  def template(messages, *, add_generation_prompt):
    text = "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)
    return text + "<a>" * add_generation_prompt

  prompts = path("prompts.jsonl", [{"prompt": [said("user", "Why?")]}])
  talk = {
    "prompt": [said("user", "How?")],
    "completion": [said("assistant", "So.")],
  }
  talks = path("talks.jsonl", [talk])
  words = (f"sample.prompts={prompts}", f"sample.shots_from={talks}")

  def ask(*overrides):
    here = folders.asking(setup, load(*words, "sample.shots=1", *overrides))
    chatty = here.tokenizer._replace(apply_template=template)
    ((text, ids),) = generate.prompts(here._replace(tokenizer=chatty))
    return text, setup.tokenizer.decode(ids)

  assert ask() == ("<u>Why?<a>", "<u>How?<a>So.<u>Why?<a>")
  with pytest.raises(ValueError, match=r"prompts\.jsonl:1: sample\.template"):
    ask("sample.template={prompt}!")


# Pieces that a stop text may straddle, each a token.
PIECES = ("a", "b", ".", "\n", ".\n\n", "\n\nH", "H", ":", "H:", "é"[:1])
PIECED = tokenize.Tokenizer(
  encode=lambda texts: [_greedy(text) for text in texts],
  decode=lambda ids: "".join(PIECES[i] for i in ids if i < len(PIECES)),
  vocab_size=len(PIECES) + 1,
  bos_id=None,
  eos_id=len(PIECES),
)


def _greedy(text):
  ids = []
  while text:
    piece = max(filter(text.startswith, PIECES), key=len)
    ids.append(PIECES.index(piece))
    text = text.removeprefix(piece)
  return ids


def draw_of(tokenizer, ids, prompt=(0,)):
  prompt = list(prompt)
  text = tokenize.continuation(tokenizer, prompt, ids)
  return generate.Draw(3, "a", prompt, text, list(ids), False)


def test_a_draw_ends_before_the_first_stop_text_that_is_whole():
  rng = np.random.default_rng(0)
  stop, seen = ("\n\nH:", "bb", "a:"), {"whole": 0, "cut": 0, "straddled": 0}
  for _ in range(600):
    ids = rng.integers(0, len(PIECES), rng.integers(1, 9)).tolist()
    draw = draw_of(PIECED, ids)
    ended, through = prompting.cut(draw, PIECED, stop)
    heard = [PIECED.decode(ids[:n]) for n in range(len(ids) + 1)]
    whole = [n for n, text in enumerate(heard) if any(s in text for s in stop)]
    if not whole:
      assert (ended, through) == (draw, ids)
      seen["whole"] += 1
      continue
    assert through == ids[: whole[0]]
    text = min((heard[whole[0]].split(s)[0] for s in stop), key=len)
    assert ended.completion == text
    assert ended.finished
    assert ended.ids[-1] == PIECED.eos_id
    # What is kept spells the text, so that it can be trained on.
    assert tokenize.continuation(PIECED, [0], ended.ids) == text
    kept = ended.ids[:-1]
    seen["cut" if kept == ids[: len(kept)] else "straddled"] += 1
  assert min(seen.values()) > 20


def test_a_stop_text_inside_a_character_waits_for_it(setup):
  tokenizer = setup.tokenizer
  (ids,) = tokenizer.encode(["né€ ich"])
  ended, through = prompting.cut(draw_of(tokenizer, ids), tokenizer, ("€",))
  assert ended.completion == "né"
  assert tokenizer.decode(through) == "né€"
  assert ended.ids == [*tokenizer.encode(["né"])[0], tokenizer.eos_id]


@pytest.fixture
def letters(monkeypatch):
  """Scorers of any bytes: `codes:N` is the sum of their codes modulo N."""
  read = []

  def make(modulus):
    def score(prompts, completions):
      read.extend(zip(prompts, completions, strict=True))
      texts = [p + c for p, c in zip(prompts, completions, strict=True)]
      return np.asarray([sum(map(ord, t)) % int(modulus) for t in texts], float)

    return score

  monkeypatch.setitem(rewards.SCORERS, "codes", make)
  return read


def drawn(setup, params, workdir, *overrides):
  here = folders.asking(setup, load(*overrides))
  rows = completions.write(here, params, {}, workdir)
  lines = (workdir / "completions.jsonl").read_text().splitlines()
  assert rows == [json.loads(line) for line in lines]
  return rows


def test_scorers_and_files_have_prompt_and_answer_alone(
  setup, trees, told, letters, tmp_path
):
  words = (told, "sample.shots=2", "sample.scorers=codes:97")
  template = "sample.template={prompt} So:"
  rows = drawn(setup, trees[0], tmp_path, *words, template)
  bare = set(asked(setup))
  assert {row["prompt"] for row in rows} == bare
  assert letters == [(row["prompt"], row["completion"]) for row in rows]
  plain = drawn(setup, trees[0], tmp_path / "plain")
  assert [r["tokens"] for r in rows] != [r["tokens"] for r in plain]


def test_stopped_draws_are_finished_and_resume_the_same(setup, trees, tmp_path):
  plain = drawn(setup, trees[0], tmp_path / "plain")
  common = max(string.ascii_letters, key=str(plain).count)
  here = (f"sample.stop={common}", "sample.batch_size=16")
  rows = drawn(setup, trees[0], tmp_path, *here)
  count = 0
  for row, before in zip(rows, plain, strict=True):
    if common in before["completion"]:
      count += 1
      assert row["completion"] == before["completion"].split(common)[0]
      assert row["finished"]
      assert row["length"] == len(row["tokens"])
      assert row["tokens"][-1] == setup.tokenizer.eos_id
    else:
      assert row == before
  assert 0 < count < len(rows)
  path = tmp_path / "completions.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  assert drawn(setup, trees[0], tmp_path, *here) == rows
  assert path.read_bytes() == whole


def test_a_stop_text_ends_a_draw_while_it_is_drawn(setup, trees):
  """What is cut off of a draw behind it costs no tokens."""

  def draws(*overrides):
    here = folders.asking(setup, load(*overrides))
    given = generate.prompts(here)
    return [d for b in generate.draws(here, trees[0], given) for d in b]

  plain = draws()
  two = re.compile("(?=([0-9A-Za-z]{2}).)")  # and something behind them
  words = [word for d in plain for word in two.findall(d.completion)]
  stop = max(words, key=words.count)
  shorter = 0
  for draw, before in zip(draws(f"sample.stop={stop}"), plain, strict=True):
    ended, through = prompting.cut(before, setup.tokenizer, (stop,))
    assert draw.ids == through
    assert draw.finished == ended.finished
    assert prompting.cut(draw, setup.tokenizer, (stop,))[0]._replace(
      logps=()
    ) == ended._replace(logps=())
    shorter += len(draw.ids) < len(before.ids)
  assert shorter > 0


RANKED = (
  *("sample.scorers=codes:97,codes:13", "sample.best_of=(1, 2, 8)"),
  "sample.rank_by=codes:13",
)


@pytest.mark.usefixtures("letters")
def test_the_best_of_the_draws_are_measured_once_more(
  setup, trees, tmp_path, capsys
):
  rows = drawn(setup, trees[0], tmp_path, *RANKED)
  result = json.loads((tmp_path / "best_of.json").read_text())
  want = best_of.measure(rows, (1, 2, 8), "reward/codes:13")
  assert result == json.loads(json.dumps(want))
  assert best_of.table(result) in capsys.readouterr().out
  groups = [rows[i : i + 8] for i in range(0, 48, 8)]
  one, _, eight = (item["means"] for item in result["best_of"])
  every = [row["reward/codes:97"] for row in rows]
  assert one["reward/codes:97"]["mean"] == pytest.approx(np.mean(every))
  tops = [max(row["reward/codes:13"] for row in group) for group in groups]
  assert eight["reward/codes:13"]["mean"] == pytest.approx(np.mean(tops))
  # Others of the same draws need no new ones.
  drawn(setup, trees[0], tmp_path, *RANKED[:1], "sample.best_of=(4,)")
  (item,) = json.loads((tmp_path / "best_of.json").read_text())["best_of"]
  assert item["n"] == 4


def test_what_is_measured_of_draws_does_not_decide_them():
  config = load(*RANKED).to_dict()["sample"]
  assert saved.drawn_by(config) == saved.drawn_by(
    load(*RANKED[:1]).to_dict()["sample"]
  )
  for override in ("stop=x", "template={prompt}:", "scorers=vader", "seed=3"):
    other = load(f"sample.{override}").to_dict()["sample"]
    assert saved.drawn_by(other) != saved.drawn_by(config)
  old = {"prompts": "toy", "draws": 4}  # of a file from before
  assert saved.drawn_by({**saved.LATER, **old}) == old


@pytest.mark.usefixtures("letters")
def test_the_best_of_a_policy_is_further_from_the_reference(setup, trees):
  here = folders.asking(setup, load(*RANKED, "sample.temperature=1.0"))
  summary, rows = frontier.measure(here, *trees)
  result = summary["best_of"]
  assert result == best_of.measure(rows, (1, 2, 8), "reward/codes:13")
  one, *_, eight = (item["means"] for item in result["best_of"])
  means = summary["means"]
  assert one["kl_from_reference"] == pytest.approx(means["log_ratio"])
  assert one["length"] == pytest.approx(means["length"])
  assert eight["kl"]["mean"] <= best_of.bound(8) + 1e-12
  cooler = folders.asking(setup, load(*RANKED, "sample.temperature=0.7"))
  summary, _ = frontier.measure(cooler, *trees)
  assert "kl_from_reference" not in summary["best_of"]["best_of"][0]["means"]


def test_the_kl_of_a_stopped_policy_counts_what_stopped_it(setup, trees):
  """The rows begin alike; the KL of a cut one is that of its first tokens."""
  plain, rows = (
    frontier.measure(folders.asking(setup, load(*more)), *trees)[1]
    for more in ((), (f"sample.stop={','.join(string.ascii_letters)}",))
  )
  cut = [
    (b, r)
    for b, r in zip(plain, rows, strict=True)
    if b["completion"] != r["completion"]
  ]
  assert 4 < len(cut) < len(rows)
  for before, row in cut:
    assert row["kl"] <= before["kl"] + 1e-5  # f32 sums of eight tokens
    assert row["kl"] > 0


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["shots=2"], r"sample\.shots = 2 needs sample\.shots_from"),
    (["shots_from=toy"], r"sample\.shots_from = 'toy' has no effect"),
    (["stop=x,x"], r"sample\.stop = .* distinct texts"),
    (["stop=x,"], r"sample\.stop = .* none of them empty"),
    (["best_of=(1, 8)"], r"sample\.best_of = \(1, 8\) .*set sample\.scorers"),
    (
      ["best_of=(1, 9)", "scorers=vader"],
      r"sample\.best_of = \(1, 9\) .* than sample\.draws = 8 .*raise that to 9",
    ),
    (["best_of=1,4", "scorers=vader"], r"sample\.best_of = \('1', '4'\) .*as"),
    (["best_of=(0,)", "scorers=vader"], r"sample\.best_of = \(0,\) .*at least"),
    (["best_of=(4, 4)", "scorers=vader"], r"sample\.best_of = .*distinct"),
    (
      ["best_of=(4,)", "scorers=vader", "temperature=0.0"],
      r"sample\.best_of = \(4,\) has no effect with sample\.temperature = 0",
    ),
    (["rank_by=vader", "scorers=vader"], r"sample\.rank_by = 'vader' has no"),
    (
      ["rank_by=vade", "scorers=vader", "best_of=(4,)"],
      r"sample\.rank_by = 'vade' is not known; did you mean 'vader'",
    ),
  ],
)
def test_what_cannot_be_is_refused_by_name(overrides, message):
  config = load(*[f"sample.{override}" for override in overrides])
  with pytest.raises(ValueError, match=message):
    checks.values(config)


@pytest.mark.parametrize(
  ("override", "message"),
  [
    (
      "template=nowhere.txt",
      r"sample\.template = 'nowhere\.txt': cannot be re",
    ),
    ("template={prompt}{prompt}", r"sample\.template = .* once"),
    ("shots_from=nowhere.jsonl", r"nowhere\.jsonl: cannot be read"),
  ],
)
def test_files_that_are_not_there_are_named_before_jax_starts(
  override, message
):
  shots = ("sample.shots=1",) if override.startswith("shots") else ()
  config = load(f"sample.{override}", *shots)
  with pytest.raises(ValueError, match=message):
    preflight.config(config, ("sample.prompts", "sample.shots_from"))


def test_weights_of_examples_are_refused(setup):
  with pytest.raises(ValueError, match=r"shots_from: weights have no effect"):
    asked(setup, "sample.shots=1", "sample.shots_from=2*toy")


def test_what_a_stop_text_ended_trains_as_it_was_drawn(tmp_path):
  """A tokenizer of merges, some of which straddle the stop text."""
  folder = templates.write(tmp_path, None, text="a plot. a plot; it. it. ")
  tokenizer = tokenize.load(f"hf:{folder}")
  (ids,) = tokenizer.encode(["it is a plot. it. a plot; it"])
  (prompt,) = tokenizer.encode(["a film"])
  count = 0
  for stop in (". it", "t", "plot", ";", " a plot; i"):
    draw = draw_of(tokenizer, ids, prompt)
    ended, _ = prompting.cut(draw, tokenizer, (stop,))
    assert ended.completion == draw.completion.split(stop)[0]
    assert (
      tokenize.continuation(tokenizer, prompt, ended.ids) == ended.completion
    )
    kept = ended.ids[:-1]
    count += kept != ids[: len(kept)]
  assert count
