"""A source as examples: by one process or by several, made or from a cache."""

import itertools
import json
import pathlib
import re
import shutil
import warnings

import pytest
import tqdm

from configs import base
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import (
  bpe,
  cache,
  corpus,
  encoding,
  pool,
  tokenize,
)
from dpo_jax.data.tokens import examples as examples_lib
from tests import worlds

BYTES = tokenize.load("bytes")


def row(number, **changes):
  text = {"prompt": f"p{number}", "chosen": f" {number}!", "rejected": " no"}
  return {**text, **changes}


def save(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture
def path(tmp_path):
  """A file of forty comparisons."""
  return save(tmp_path / "my.jsonl", map(row, range(40)))


def load(
  spec,
  kind="pairs",
  *,
  with_scores=False,
  tokenizer=BYTES,
  policy=None,
  loud=False,
  **fields,
):
  options = base.get_config().data
  options.update(fields)
  policy = policy or sources.Policy(options.bad_records)
  args = spec, "data.train", kind, with_scores, tokenizer, options, policy
  return corpus.load(*args, loud=loud)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  """Chunks of four records; the user's cache in a folder of the test."""
  monkeypatch.setattr(examples_lib, "PER_CHUNK", 4)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def calls(monkeypatch):
  """A list that gets the number of records of every call of encoding.make."""
  right, seen = encoding.make, []

  def counted(task, tokenizer, first, records):
    seen.append(len(records))
    return right(task, tokenizer, first, records)

  monkeypatch.setattr(encoding, "make", counted)
  return seen


def test_a_kept_source_is_tokenised_once(path, tmp_path, calls):
  made = load(path, token_cache=str(tmp_path / "tokens"))
  assert sum(calls) == 40
  again = load(path, token_cache=str(tmp_path / "tokens"))
  assert sum(calls) == 40
  assert again.folder == made.folder == made.folder.parent / made.folder.name
  assert made.folder.parent == tmp_path / "tokens"
  memory = load(path)
  assert memory.folder is None
  assert (
    worlds.plain(made.examples)
    == worlds.plain(again.examples)
    == worlds.plain(memory.examples)
  )
  want = memory.examples.fingerprint()
  assert made.examples.fingerprint() == again.examples.fingerprint() == want


def test_what_was_not_read_is_said_again_by_what_is_kept(tmp_path):
  path = tmp_path / "my.jsonl"
  row = {"prompt": "p", "chosen": "a", "rejected": "b", "id": 7}
  path.write_text(f"{json.dumps(row)}\n" * 3)
  for _ in range(2):
    loaded = load(str(path), token_cache=str(tmp_path / "tokens"))
    assert loaded.changed == {"column 'id' is not read": 3}
  assert loaded.folder is not None


def test_the_address_is_that_of_earlier_versions(path, tmp_path, monkeypatch):
  """But for the version: what another one kept is tokenised again."""
  monkeypatch.setattr(cache, "_VERSION", 2)
  assert (
    load(path, token_cache=str(tmp_path)).folder.name
    == "5154a26f999d2d43e81c95c9"
  )


def test_a_file_is_what_it_holds(path, tmp_path, calls):
  folder = str(tmp_path / "tokens")
  load(path, token_cache=folder)
  other = shutil.copy(path, tmp_path / "renamed.jsonl")
  load(str(other), token_cache=folder)
  assert sum(calls) == 40
  save(other, [row(0, prompt="P0"), *map(row, range(1, 40))])
  assert load(str(other), token_cache=folder).examples[0].prompt.tolist() == [
    80,
    48,
  ]
  assert sum(calls) == 80
  load(path, token_cache=folder)
  assert sum(calls) == 80


CHANGES = (
  {"max_prompt_length": 2},
  {"max_completion_length": 2},
  {"long_prompt": "keep_start"},
  {"bad_records": "skip"},
  {"with_scores": True},
  {"kind": "rankings"},
  {"kind": "sft"},
  {"kind": "labels"},
  {"tokenizer": BYTES._replace(identity=lambda: "another")},
)


def test_all_that_decides_about_the_examples_is_in_the_address(tmp_path):
  scores = {"score_chosen": 1.0, "score_rejected": 0.0}
  path = save(tmp_path / "a.jsonl", [row(0, **scores), row(1, **scores)])
  folder = tmp_path / "tokens"
  for number, changes in enumerate(({}, *CHANGES), 1):
    for _ in range(2):
      load(path, token_cache=str(folder), **changes)
      assert len(list(folder.iterdir())) == number


def test_weights_of_a_mixture_share_the_tokens(path, tmp_path, calls):
  folder = str(tmp_path / "tokens")
  load(f"{path} + toy:4", token_cache=folder)
  load(f"0.5*{path} + 2*toy:4", token_cache=folder)
  assert sum(calls) == 44
  load(f"toy:4 + {path}", token_cache=folder)  # in another order
  assert sum(calls) == 88


def test_small_data_sets_are_not_kept_unless_asked_for(
  path, tmp_path, monkeypatch
):
  assert load(path).folder is None
  assert load("toy:40").folder is None
  assert not (tmp_path / "home").exists()
  monkeypatch.setattr(corpus, "_SMALL", 36)
  for spec in (path, "toy:41"):
    kept = load(spec)
    assert kept.folder.parent == tmp_path / "home/dpo_jax/tokens"
    assert len(kept.examples) == 40 + (spec != path)
    assert worlds.plain(load(spec).examples) == worlds.plain(kept.examples)
  assert load("toy:36").folder is None
  assert len(list(kept.folder.parent.iterdir())) == 2


def test_a_home_that_cannot_be_written_to_is_a_warning(
  path, tmp_path, monkeypatch
):
  monkeypatch.setattr(corpus, "_SMALL", 16)
  (tmp_path / "home").write_text("no folder")
  with pytest.warns(UserWarning, match="held in memory"):
    found = load(path)
  assert found.folder is None
  assert len(found.examples) == 40


def test_a_source_of_a_notebook_is_not_kept(tmp_path, monkeypatch):
  """Its rows may be others under the same name."""
  for chosen in (" a", " b"):
    rows = [row(0, chosen=chosen)]
    monkeypatch.setitem(sources.SOURCES, "toy", lambda rows=rows: rows)
    with pytest.warns(UserWarning, match="nothing tells a source from another"):
      found = load("toy", token_cache=str(tmp_path / "tokens"))
    first = found.examples[0].completions[0]
    assert first.tolist() == [*chosen.encode(), 256]
  assert not (tmp_path / "tokens").exists()


def test_a_tokenizer_that_does_not_write_itself_down_is_not_trusted(
  path, tmp_path
):
  with pytest.warns(UserWarning, match="nothing tells the tokenizer from"):
    load(
      path,
      tokenizer=BYTES._replace(identity=lambda: None),
      token_cache=str(tmp_path / "tokens"),
    )
  assert not (tmp_path / "tokens").exists()


def test_what_was_changed_and_skipped_is_said_again(tmp_path, calls):
  rows = [row(0, chosen=""), *map(row, range(1, 12)), row(12, chosen="a" * 300)]
  path = save(tmp_path / "a.jsonl", rows)
  said = []
  for _ in range(2):
    policy = sources.Policy("skip")
    found = load(
      path,
      policy=policy,
      bad_records="skip",
      token_cache=str(tmp_path / "tokens"),
    )
    said.append((found.changed, policy.skipped, policy.first))
  assert sum(calls) == 12
  assert said[0] == said[1]
  assert said[0][0] == {"completion cut": 1}
  assert said[0][1] == {"empty": 1}
  assert said[0][2]["empty"].startswith(f"{path}:1:")


def test_a_damaged_entry_is_tokenised_again(path, tmp_path, calls):
  folder = str(tmp_path / "tokens")
  made = load(path, token_cache=folder)
  (made.folder / "tokens.bin").write_bytes(b"")
  with pytest.warns(UserWarning, match="damaged"):
    again = load(path, token_cache=folder)
  assert sum(calls) == 80
  assert worlds.plain(again.examples) == worlds.plain(load(path).examples)


def test_a_file_that_changes_while_it_is_read_is_an_error(
  path, tmp_path, monkeypatch
):
  right = encoding.make

  def appending(*args):
    with open(path, "a") as file:
      file.write(json.dumps(row(99)) + "\n")
    return right(*args)

  monkeypatch.setattr(encoding, "make", appending)
  with pytest.raises(ValueError, match=r"my.jsonl changed while it was read"):
    load(path, token_cache=str(tmp_path / "tokens"))
  assert list((tmp_path / "tokens").iterdir()) == []


def test_mismatches_are_made_of_labelled_examples_that_are_kept(
  path, tmp_path, calls
):
  folder = str(tmp_path / "tokens")
  load(path, "labels", token_cache=folder)
  kept = load(path, "mismatched", token_cache=folder)
  assert sum(calls) == 40
  again = load(path, "mismatched", token_cache=folder)
  assert worlds.plain(kept.examples) == worlds.plain(again.examples)
  memory = load(path, "mismatched")
  assert worlds.plain(kept.examples) == worlds.plain(memory.examples)
  first, second, *_ = worlds.plain(kept.examples)
  assert first.completions[-1] == second.completions[0]


# In their order of the file: not JSON, not a pair, a prompt that is too long, a
# pair that is one for the tokenizer, a score that is missing.
BAD = {
  6: "{",
  9: json.dumps(row(9, chosen="")),
  13: json.dumps(row(13, prompt="p" * 300)),
  14: json.dumps(row(14, chosen="a" * 300, rejected="a" * 301)),
  22: json.dumps({k: v for k, v in row(22).items()}),
}


@pytest.fixture
def bad(tmp_path):
  """A file with something wrong in the lines of BAD."""
  scores = {"score_chosen": 1.0, "score_rejected": 0.0}
  lines = [BAD.get(k, json.dumps(row(k, **scores))) for k in range(1, 31)]
  path = tmp_path / "bad.jsonl"
  path.write_text("\n".join(lines))
  return str(path)


@pytest.fixture(params=["alone", "several"])
def processes(request, monkeypatch):
  """All by this process, or all but the first chunk by two others."""
  count = 1 if request.param == "alone" else 2
  monkeypatch.setattr(pool, "processes", lambda: count)
  monkeypatch.setattr(corpus, "_PATIENCE", 0)


def test_bad_records_are_skipped_wherever_they_are_found(processes, bad):
  policy = sources.Policy("skip")
  found = load(bad, with_scores=True, policy=policy, bad_records="skip")
  assert policy.skipped == {
    "invalid JSON": 1,
    "empty": 1,
    "long prompt": 1,
    "identical pair": 1,
    "missing scores": 1,
  }
  places = [text.split(":")[1] for text in policy.first.values()]
  assert places == list(map(str, BAD))
  # Numbers count what was read, whether it could be encoded or not.
  numbers = [e.example_id for e in found.examples]
  read = [k for k in range(1, 31) if k not in (6, 9)]
  assert numbers == [n for n, k in enumerate(read) if k not in BAD]
  assert found.examples[7].prompt.tolist() == list(b"p10")


@pytest.mark.parametrize("count", range(len(BAD)))
def test_the_first_bad_record_of_the_file_is_the_error(processes, bad, count):
  file = pathlib.Path(bad)
  lines = file.read_text().split("\n")
  for place in list(BAD)[:count]:
    lines[place - 1] = lines[0]
  file.write_text("\n".join(lines))
  place = list(BAD)[count]
  with pytest.raises(
    ValueError, match=rf"bad\.jsonl:{place}: .*skip'"
  ) as error:
    load(bad, with_scores=True)
  assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_file_comes_after_its_records(processes, tmp_path):
  path = tmp_path / "my.csv"
  lines = [f"p{k},a,b" for k in range(12)]
  path.write_text("\n".join(["prompt,chosen,rejected", *lines, 'p,"a,b']))
  with pytest.raises(ValueError, match=r"my.csv:14: not CSV"):
    load(f"toy:9 + {path}", bad_records="skip")
  empty = save(tmp_path / "empty.jsonl", [row(0, chosen="")])
  with pytest.raises(ValueError, match=r"empty.jsonl: no usable .*'empty': 1"):
    load(f"toy:9 + {empty} + {path}", bad_records="skip")
  with pytest.raises(
    ValueError, match=r"no usable record is left .*prompt': 9"
  ):
    load("toy:9", bad_records="skip", max_prompt_length=2)


def test_several_processes_make_what_one_makes(monkeypatch, capfd):
  monkeypatch.setattr(pool, "processes", lambda: 2)
  alone = [load("toy:90", kind) for kind in ("pairs", "mismatched")]
  monkeypatch.setattr(corpus, "_PATIENCE", 0)
  monkeypatch.setattr(encoding, "make", _once(encoding.make))
  others = [load("toy:90", kind) for kind in ("pairs", "mismatched")]
  for ours, theirs in zip(alone, others, strict=True):
    assert worlds.plain(ours.examples) == worlds.plain(theirs.examples)
    assert ours.changed == theirs.changed
    assert ours.examples.fingerprint() == theirs.examples.fingerprint()
  assert capfd.readouterr() == ("", "")


def _once(fn):
  """`fn`, which this process may call once for each data set."""
  calls = itertools.count()

  def limited(*args):
    assert next(calls) < 2
    return fn(*args)

  return limited


@pytest.mark.slow  # each process loads transformers
def test_several_processes_load_a_trained_tokenizer(tmp_path, monkeypatch):
  folder = str(tmp_path / "bpe")
  bpe.train(["the plot is warm and clever"] * 9, 270, folder)
  monkeypatch.setattr(pool, "processes", lambda: 2)
  used = tokenize.load(folder)
  alone = load("toy:90", tokenizer=used)
  monkeypatch.setattr(corpus, "_PATIENCE", 0)
  others = load("toy:90", tokenizer=tokenize.load(folder))
  assert worlds.plain(alone.examples) == worlds.plain(others.examples)
  # Its content names it, not its folder.
  again = tokenize.load(str(shutil.copytree(folder, tmp_path / "again")))
  assert again.identity() == used.identity()
  bpe.train(["the script seems dull"] * 9, 270, tmp_path / "other")
  other = tokenize.load(str(tmp_path / "other"))
  assert other.identity() != again.identity()


def test_what_takes_long_shows_its_rate_and_the_time_left(
  path, monkeypatch, capsys
):
  clock = itertools.count(step=10)
  monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))
  monkeypatch.setattr(pool, "processes", lambda: 1)
  load(path, loud=True)
  lines = capsys.readouterr().out.splitlines()
  # The clock is looked at for each of ten chunks, and now and then beside.
  assert lines[0].startswith(f"{path}: tokenised 4/40  ")
  assert all(re.search(r"/s  ETA \d+:\d\d$", line) for line in lines[:-1])
  assert lines[-1].startswith(f"{path}: tokenised: 40 records in ")
  load(path, loud=False)
  assert not capsys.readouterr().out


def test_what_is_quick_says_nothing(path, capsys):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    load(path, loud=True)
  assert capsys.readouterr().out == ""


def test_a_folder_elsewhere_is_refused(path):
  with pytest.raises(ValueError, match=r"data\.token_cache = 'gs:/"):
    load(path, token_cache="gs://bucket/tokens")


def test_the_version_is_that_of_the_tokens(path, tmp_path, calls, monkeypatch):
  load(path, token_cache=str(tmp_path / "tokens"))
  monkeypatch.setattr(cache, "_VERSION", cache._VERSION + 1)
  load(path, token_cache=str(tmp_path / "tokens"))
  assert sum(calls) == 80
