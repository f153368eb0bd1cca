"""Prompts and draws by seed alone, resumed files, comparisons of what came."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpo_jax.config import load as load_lib
from dpo_jax.data.audit import audit
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import tokenize
from dpo_jax.eval import completions, generate, rewards
from dpo_jax.run import build, trained
from tests import conftest, folders, templates, worlds
from tests.models import parity

IDENTITY = {"policy": "mine", "sample": {"prefix": (2, 8)}}


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  sampled = (
    *("sample.prompts=toy", "sample.count=12", "sample.draws=4"),
    *("sample.max_new_tokens=12", "sample.batch_size=8"),
  )
  return load_lib.load_config(config, (*sampled, *overrides))


@pytest.fixture(scope="module")
def setup():
  return build.prepare_model(load())


@pytest.fixture(scope="module")
def params(setup):
  initial = jax.device_get(trained.initial(setup))
  return jax.device_get(worlds.noisy(initial, 5, 0.3))


def at(setup, *overrides):
  """The same model with other fields of config.sample."""
  return folders.asking(setup, load(*overrides))


def drawn(setup, params, **kwargs):
  given = generate.prompts(setup)
  return [d for b in generate.draws(setup, params, given, **kwargs) for d in b]


@pytest.fixture(scope="module")
def draws(setup, params):
  return drawn(setup, params)


def test_prompts_are_distinct_seeded_and_no_more_than_asked_for(setup):
  records = sources.load("toy", "sft", sources.Policy("error"))
  there = {record.prompt for record in records}
  given = generate.prompts(setup)
  texts = [text for text, _ in given]
  assert len(set(texts)) == len(texts) == 12 < len(there)
  assert set(texts) < there
  assert [ids for _, ids in given] == setup.tokenizer.encode(texts)
  assert generate.prompts(setup) == given
  assert generate.prompts(at(setup, "sample.seed=1")) != given
  # Fewer are the first of more; all of them are not more than there are.
  assert generate.prompts(at(setup, "sample.count=5")) == given[:5]
  everything = generate.prompts(at(setup, "sample.count=1000"))
  assert len(everything) == len(there)
  assert {text for text, _ in everything} == there


def test_beginnings_have_as_many_tokens_as_the_prefix_says(setup, tmp_path):
  texts = [f"a {n} of b or c it is {n}" for n in range(9)]
  texts += ["unbreakable from the start", "a b"]
  path = tmp_path / "texts.jsonl"
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  here = (f"sample.prompts={path}", "sample.count=100")
  given = generate.prompts(at(setup, *here, "sample.prefix=(3, 8)"))
  lengths = {len(ids) for _, ids in given}
  assert min(lengths) >= 3
  assert max(lengths) <= 8
  assert len(lengths) > 1
  for text, ids in given:
    assert setup.tokenizer.decode(ids) == text
    assert any(t.startswith(f"{text} ") for t in texts)
  assert not {text[0] for text, _ in given} - {"a"}


def test_without_prompts_there_is_nothing_to_draw(setup):
  with pytest.raises(ValueError, match=r"sample.prompts is not set"):
    generate.prompts(at(setup, "sample.prompts=None"))


def test_no_usable_prompt_is_an_error(setup):
  config = ("data.max_prompt_length=2", "data.bad_records=skip")
  with pytest.raises(ValueError, match=r"no usable prompt .*long prompt"):
    generate.prompts(at(setup, *config))


PLAIN = [{"prompt": "The plot"}, {"prompt": "The cast", "completion": "x"}]


@pytest.mark.parametrize(
  ("rows", "found"),
  [
    (PLAIN, {"The plot", "The cast"}),
    ([{"prompt": "A", "chosen": "b", "rejected": "c"}], {"A"}),
  ],
)
def test_a_file_of_prompts_needs_no_completions(setup, tmp_path, rows, found):
  path = tmp_path / "my.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  given = generate.prompts(at(setup, f"sample.prompts={path}"))
  assert {text for text, _ in given} == found


def test_texts_without_a_prompt_ask_for_a_prefix(setup, tmp_path):
  path = tmp_path / "my.jsonl"
  path.write_text('{"text": "The plot is thin."}\n')
  with pytest.raises(ValueError, match=r"my.jsonl:1: .*set sample.prefix"):
    generate.prompts(at(setup, f"sample.prompts={path}"))


def test_messages_become_prompts_by_the_chat_template(setup, tmp_path):
  path = tmp_path / "my.jsonl"
  asked = [{"role": "user", "content": "How is the plot?"}]
  path.write_text(json.dumps({"prompt": asked}) + "\n")
  here = at(setup, f"sample.prompts={path}")
  with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
    generate.prompts(here)

  def template(messages, *, add_generation_prompt):
    assert add_generation_prompt
    return "".join(f"[{m['content']}]" for m in messages)

  chatty = here.tokenizer._replace(apply_template=template)
  ((text, _),) = generate.prompts(here._replace(tokenizer=chatty))
  assert text == "[How is the plot?]"


def test_a_prompt_that_the_template_refuses_is_named_or_skipped(
  setup, tmp_path
):
  path = tmp_path / "my.jsonl"
  rows = [[{"role": "user", "content": text}] for text in ("no", "yes")]
  path.write_text("".join(json.dumps({"prompt": r}) + "\n" for r in rows))

  def template(messages, *, add_generation_prompt):
    if messages[0]["content"] == "no":
      raise ValueError("no such turn")
    return messages[0]["content"]

  def prompts(*overrides):
    here = at(setup, f"sample.prompts={path}", *overrides)
    chatty = here.tokenizer._replace(apply_template=template)
    return generate.prompts(here._replace(tokenizer=chatty))

  with pytest.raises(ValueError, match=r"my\.jsonl:1: .*no such turn"):
    prompts()
  ((text, _),) = prompts("data.bad_records=skip")
  assert text == "yes"


def test_weights_of_prompts_are_refused(setup):
  with pytest.raises(ValueError, match="weights have no effect"):
    generate.prompts(at(setup, "sample.prompts=2*toy + toy"))


def test_a_draw_does_not_depend_on_its_batch_or_on_where_it_resumes(
  setup, params, draws
):
  assert [d.id for d in draws] == list(range(48))
  large = at(setup, "sample.batch_size=40")  # the last batch has 8
  assert_same(drawn(large, params), draws)
  assert_same(drawn(setup, params, skip=11), draws[11:])
  assert_same(drawn(setup, params, room=40), draws)


def assert_same(draws, others):
  """The same tokens; products of another batch size round otherwise."""
  for one, other in zip(draws, others, strict=True):
    assert one._replace(logps=()) == other._replace(logps=())
    np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


@pytest.mark.parametrize(("skip", "together"), [(0, 4), (16, 4), (11, 1)])
def test_draws_of_a_prompt_in_one_pass_are_those_of_their_own(
  setup, params, draws, skip, together
):
  shared = at(setup, "sample.batch_size=32")  # on eight devices: four a prompt
  assert generate._together(4, 32, 8, skip) == together
  assert_same(drawn(shared, params, skip=skip), draws[skip:])


def test_batches_by_length_hold_each_prompt_once_and_come_window_by_window():
  lengths = np.random.default_rng(0).integers(1, 100, 203).tolist()
  turns, padded = generate._plan(lengths, 100, 8)
  assert sorted(place for turn in turns for place in turn) == list(range(203))
  assert set(padded) == {32, 56, 100}
  in_order = 0
  for number, (turn, length) in enumerate(zip(turns, padded, strict=True)):
    assert len(turn) == 8 or number == len(turns) - 1
    assert {place // 64 for place in turn} == {number // 8}
    assert max(lengths[place] for place in turn) <= length
    in_order += length * len(turn)
  assert in_order < 0.75 * 100 * 203  # of what padding to the longest takes
  # Seven batches are not worth another compilation.
  turns, padded = generate._plan(lengths[:56], 100, 8)
  in_order = [place for turn in turns for place in sorted(turn)]
  assert in_order == list(range(56))
  assert set(padded) == {100}


@pytest.mark.slow
def test_draws_of_prompts_sorted_by_length_come_in_order_and_unchanged(
  setup, params
):
  rng = np.random.default_rng(1)
  words = ["the", "plot", "is", "thin", "and", "cast", "wooden", "long"]
  texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 12, 64)]
  given = list(zip(texts, setup.tokenizer.encode(texts), strict=True))
  lengths = [len(ids) for _, ids in given]
  assert min(lengths) < max(lengths) / 4
  one = at(setup, "sample.draws=1", "sample.batch_size=64")
  by_length = at(setup, "sample.draws=1", "sample.batch_size=8")
  (want,) = generate.draws(one, params, given)
  batches = list(generate.draws(by_length, params, given))
  assert [len(batch) for batch in batches] == [8] * 8
  assert_same([draw for batch in batches for draw in batch], want)
  assert [draw.id for draw in want] == list(range(64))


def test_draws_differ_by_prompt_number_and_seed(setup, params, draws):
  assert len({tuple(d.ids) for d in draws}) > 40
  other = drawn(at(setup, "sample.seed=1"), params)
  assert not {tuple(d.ids) for d in draws} & {tuple(d.ids) for d in other}


def test_a_draw_ends_with_the_eos_or_at_the_limit(setup, draws):
  eos = setup.tokenizer.eos_id
  assert 0 < sum(d.finished for d in draws) < len(draws)
  given = generate.prompts(setup)
  for d in draws:
    assert (d.prompt, d.prompt_ids) == given[d.id // 4]
    assert d.completion == setup.tokenizer.decode(d.ids)
    assert d.finished == (d.ids[-1] == eos)
    assert eos not in d.ids[:-1]
    assert d.finished or len(d.ids) == 12
    assert 1 <= len(d.ids) <= 12


def test_temperature_zero_draws_one_completion_of_a_prompt(setup, params):
  greedy = drawn(at(setup, "sample.temperature=0.0"), params)
  by_prompt = {d.prompt: d.ids for d in greedy}
  assert len(by_prompt) == 12
  assert all(d.ids == by_prompt[d.prompt] for d in greedy)
  assert len(set(map(tuple, by_prompt.values()))) > 1


@pytest.fixture(scope="module")
def unbroken(setup, params, tmp_path_factory):
  """The folder of an unbroken run of six batches."""
  workdir = tmp_path_factory.mktemp("whole")
  here = at(setup, "sample.scorers=vader")
  rows = completions.write(here, params, IDENTITY, workdir)
  assert len(rows) == 48
  return workdir


@pytest.fixture(scope="module")
def whole(unbroken):
  """The bytes of its completions.jsonl."""
  return (unbroken / "completions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def about(unbroken):
  """What its completions.json says the draws depend on."""
  return json.loads((unbroken / "completions.json").read_text())


def test_a_file_has_a_line_for_each_draw(whole, draws):
  rows = [json.loads(line) for line in whole.splitlines()]
  vader = rewards.load("vader")
  for row, d in zip(rows, draws, strict=True):
    (score,) = vader.score([d.prompt], [d.completion])
    assert row == {
      "id": d.id // 4,
      "prompt": d.prompt,
      "completion": d.completion,
      "finished": d.finished,
      "length": len(d.ids),
      "tokens": d.ids,
      "reward/vader": score,
    }


def ends(data):
  """Where each line ends, its newline counted."""
  return np.cumsum([len(line) for line in data.splitlines(keepends=True)])


# {what has come of a file: (draws that are kept, function of the whole)}
DAMAGES = {
  "cut at the start": (0, lambda data: b""),
  "cut in the first line": (0, lambda data: data[:9]),
  "cut in the third batch": (16, lambda data: data[: ends(data)[20] - 7]),
  "cut before a newline": (16, lambda data: data[: ends(data)[22] - 1]),
  "cut between two batches": (24, lambda data: data[: ends(data)[23]]),
  "cut in the last line": (40, lambda data: data[:-3]),
  # A draw has its place by its number: those behind are drawn again too.
  "a line inside is damaged": (
    8,
    lambda data: data[: ends(data)[9]] + b"\0" * 9 + data[ends(data)[9] :],
  ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_ends_as_that_of_an_unbroken_run(
  name, setup, params, whole, about, tmp_path, monkeypatch
):
  skip, damaged = DAMAGES[name]
  (tmp_path / "completions.json").write_text(json.dumps(about))
  (tmp_path / "completions.jsonl").write_bytes(damaged(whole))
  right, skipped = generate.draws, []

  def recorded(*args, **kwargs):
    skipped.append(kwargs["skip"])
    return right(*args, **kwargs)

  monkeypatch.setattr(generate, "draws", recorded)
  here = at(setup, "sample.scorers=vader")
  rows = completions.write(here, params, IDENTITY, tmp_path)
  assert skipped == [skip]
  assert (tmp_path / "completions.jsonl").read_bytes() == whole
  assert rows == [json.loads(line) for line in whole.splitlines()]


@pytest.mark.parametrize("tail", [b"", b'{"id": 12, "pro'])
def test_a_complete_file_is_left_alone(
  tail, setup, params, whole, about, tmp_path, monkeypatch
):
  (tmp_path / "completions.json").write_text(json.dumps(about))
  (tmp_path / "completions.jsonl").write_bytes(whole + tail)
  monkeypatch.setattr(
    generate, "draws", lambda *_, **__: pytest.fail("drawn again")
  )
  here = at(setup, "sample.scorers=vader")
  rows = completions.write(here, params, IDENTITY, tmp_path)
  assert rows == [json.loads(line) for line in whole.splitlines()]
  assert (tmp_path / "completions.jsonl").read_bytes() == whole


@pytest.mark.parametrize("changed", ["policy", "prompts", None])
def test_draws_of_something_else_are_refused_and_kept(
  changed, setup, params, whole, about, tmp_path
):
  if changed is not None:
    other = {**about, changed: "another"}
    (tmp_path / "completions.json").write_text(json.dumps(other))
  (tmp_path / "completions.jsonl").write_bytes(whole)
  with pytest.raises(ValueError, match="another policy, prompts or settings"):
    completions.write(setup, params, IDENTITY, tmp_path)
  assert (tmp_path / "completions.jsonl").read_bytes() == whole


def test_labels_need_a_scorer(setup, params, tmp_path):
  here = at(setup, "sample.labels=bradley_terry")
  with pytest.raises(ValueError, match=r"sample.labels needs a scorer"):
    completions.write(here, params, IDENTITY, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_scorer_sees_the_prompts_before_anything_is_drawn(
  setup, params, monkeypatch, tmp_path
):
  seen = []

  def make(_):
    def check(prompts):
      seen.extend(prompts)
      raise ValueError("too long")

    def score(prompts, completions):
      raise AssertionError

    score.check = check
    return score

  monkeypatch.setitem(rewards.SCORERS, "short", make)
  here = at(setup, "sample.scorers=short:1")
  with pytest.raises(ValueError, match="too long"):
    completions.write(here, params, IDENTITY, tmp_path)
  assert seen == [text for text, _ in generate.prompts(here)]
  assert not (tmp_path / "completions.jsonl").exists()


@pytest.fixture
def codes(monkeypatch):
  """A scorer of any bytes: `codes:N` is the sum of their codes modulo N."""

  def make(modulus):
    return lambda prompts, completions: np.asarray(
      [sum(map(ord, text)) % int(modulus) for text in completions], float
    )

  monkeypatch.setitem(rewards.SCORERS, "codes", make)


def records_of(workdir):
  path = str(workdir / "pairs.jsonl")
  return sources.load(path, "preference", sources.Policy("error"))


@pytest.mark.parametrize("labels", ["bradley_terry", "deterministic"])
def test_comparisons_train_on_the_tokens_that_were_drawn(
  labels, setup, params, draws, codes, tmp_path
):
  here = at(setup, f"sample.labels={labels}", "sample.scorers=codes:97")
  rows = completions.write(here, params, IDENTITY, tmp_path)
  records = records_of(tmp_path)
  examples, changed = tokenize.encode(
    records, setup.tokenizer, here.data, sources.Policy("error")
  )
  assert not changed
  assert len(examples) == 12
  by_prompt = {}
  for d in draws:
    if d.completion:
      by_prompt.setdefault(tuple(d.prompt_ids), []).append(d.ids)
  assert any(len(d.ids) > 1 and d.finished for d in draws)
  assert {tuple(e.prompt): list(e.completions) for e in examples} == by_prompt
  reward = {tuple(row["tokens"]): row["reward/codes"] for row in rows}
  ranked = [
    reward[tuple(e.completions[w])] > reward[tuple(e.completions[l])]
    for e in examples
    for w, l, _ in e.pairs
  ]
  assert len(ranked) > 60
  # With gaps of tens a Bradley–Terry loss is rare, but for ties.
  assert all(ranked) if labels == "deterministic" else np.mean(ranked) > 0.9


def test_labels_do_not_change_the_draws_and_are_seeded(
  setup, params, whole, codes, tmp_path
):
  labels = ("sample.labels=bradley_terry", "sample.scorers=codes:2,vader")
  texts = []
  for name in ("one", "other"):
    completions.write(at(setup, *labels), params, IDENTITY, tmp_path / name)
    texts.append((tmp_path / name / "pairs.jsonl").read_bytes())
  assert texts[0] == texts[1]
  plain = [json.loads(line) for line in whole.splitlines()]
  lines = (tmp_path / "one/completions.jsonl").read_text().splitlines()
  for row, want in zip(map(json.loads, lines), plain, strict=True):
    assert row.pop("reward/codes") in (0, 1)
    assert row == want
  # Rewards of 0 and 1 leave the labels to chance, σ(0) and σ(1).
  pairs = [p for record in records_of(tmp_path / "one") for p in record.pairs]
  assert 0.2 < np.mean([winner < loser for winner, loser in pairs]) < 0.8


CHAT = (
  "{% for m in messages %}<s>{{ m.content }}<end>\n{% endfor %}"
  "{% if add_generation_prompt %}<s>{% endif %}"
)
WORDS = ("<s>", "</s>", "a", "film", "<end>", "of", "warm", "dull", "the", "is")


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_the_prompts_of_earlier_samples_are_the_same_prompts_again(
  begin, codes, tmp_path
):
  """The template wrote them: no BOS comes in front, and no audit objects."""
  folder = templates.write(tmp_path, begin + templates.CHATML)
  path = tmp_path / "chats.jsonl"
  talks = [[{"role": "user", "content": text}] for text in ("warm?", "clever?")]
  path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in talks))
  config = load(
    *(f"tokenizer=hf:{folder}", f"sample.prompts={path}"),
    *("sample.labels=bradley_terry", "sample.scorers=codes:97"),
  )
  setup = build.prepare_model(config)
  assert setup.tokenizer.bos_id is not None
  completions.write(setup, trained.initial(setup), IDENTITY, tmp_path)
  given = sorted(ids for _, ids in generate.prompts(setup))
  for name in ("completions", "pairs"):
    config.sample.prompts = str(tmp_path / f"{name}.jsonl")
    again = generate.prompts(folders.asking(setup, config))
    assert sorted(ids for _, ids in again) == given
  config.data.train = config.sample.prompts
  sections = config.tokenizer, config.data, config.audit
  report, *_ = audit.audit(*sections, "pairs", False)
  assert report["parts"][0]["examples"] == len(given)
  assert not [check for check in report["checks"] if check["failed"]]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
  """(torch model, its folder): it generates up to </s> or the end of a turn."""
  import tokenizers
  import transformers

  folder = tmp_path_factory.mktemp("chatty")
  raw = parity.small(
    "meta-llama/Llama-3.2-1B",
    vocab_size=len(WORDS),
    num_hidden_layers=2,
    num_key_value_heads=2,
    tie_word_embeddings=False,
  )
  model = parity.save(raw, folder)
  model.generation_config = transformers.GenerationConfig(eos_token_id=[1, 4])
  model.generation_config.save_pretrained(folder)
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "a")
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=words,
    eos_token="</s>",
    additional_special_tokens=["<s>", "<end>"],
    chat_template=CHAT,
  ).save_pretrained(folder)
  return model, folder


def chats(folder, *overrides, model=None):
  """A config that samples greedily for questions of a file."""
  words = [w for w in WORDS if w[0] != "<"]
  texts = [f"{a} {b}" for a in words for b in words[:3]]
  rows = [{"prompt": [{"role": "user", "content": t}]} for t in texts]
  path = folder / "chats.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return load_lib.load_config(
    str(conftest.ROOT / f"configs/dpo.py:model=hf:{model or folder}"),
    [
      *(f"tokenizer=hf:{folder}", f"sample.prompts={path}"),
      *("sample.temperature=0.0", "sample.max_new_tokens=20"),
      *("data.max_prompt_length=32", "data.max_completion_length=20"),
      *("sample.batch_size=24", *overrides),
    ],
  )


@pytest.mark.slow
def test_greedy_samples_end_where_transformers_generate_does(chatty):
  """At the EOS, and at the end of turn that generation_config.json names."""
  import torch

  model, folder = chatty
  setup = build.prepare_model(chats(folder))
  assert setup.tokenizer.end_ids == (1, 4)
  got = drawn(setup, trained.initial(setup))
  assert len(got) == 21
  last = set()
  for d in got:
    ids = torch.tensor([d.prompt_ids])
    want = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=20,
      do_sample=False,
      pad_token_id=1,
    )[0, len(d.prompt_ids) :].tolist()
    assert d.ids == want
    assert d.finished == (want[-1] in (1, 4))
    last.add(want[-1])
  assert {1, 4} <= last


@pytest.mark.slow
@pytest.mark.parametrize("generation", [{"eos_token_id": 1}, None])
def test_the_end_of_a_turn_ends_a_sample_though_no_file_of_the_model_names_it(
  generation, chatty, tmp_path
):
  """A base model that is tuned on chats."""
  _, folder = chatty
  there = shutil.copytree(folder, tmp_path / "base")
  (there / "generation_config.json").unlink()
  if generation is not None:
    text = json.dumps(generation)
    (there / "generation_config.json").write_text(text)
  setup = build.prepare_model(chats(folder, model=there))
  assert setup.tokenizer.end_ids == (1, 4)
  whole = build.prepare_model(chats(folder))
  base = trained.initial(setup)
  assert drawn(setup, base) == drawn(whole, base)


@pytest.mark.slow
def test_what_an_end_of_turn_ended_is_ended_when_it_comes_back(
  chatty, tmp_path
):
  """As training data: nothing is added behind it, nothing refused."""
  _, folder = chatty
  setup = build.prepare_model(chats(folder))
  rows = completions.write(setup, trained.initial(setup), IDENTITY, tmp_path)
  ended = [row["tokens"][-1] == 4 for row in rows]
  assert True in ended
  assert False in ended
  records = [
    sources.Record(
      *(row["prompt"], (row["completion"],), (), "drawn"),
      tokens=(row["tokens"],),
    )
    for row in rows
  ]
  examples, _ = tokenize.encode(
    records, setup.tokenizer, setup.data, sources.Policy("error")
  )
  given = generate.prompts(setup)
  for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
    assert example.prompt == given[number][1]
    assert example.completions == (row["tokens"],)
    assert example.ended == (row["finished"],)
