"""Every record form, and every bad input with the place where it stands."""

import json
import random

import pytest

from dpo_jax.data.read import sources

GOOD = {"prompt": "The plot is", "chosen": " warm.", "rejected": " dull."}
RANKED = {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]]}

# name: (line, reason it is counted under, words of the message)
BAD_IN_ANY_FORM = {
  "misspelt prompt": (
    {"promt": "p", "chosen": "a", "rejected": "b"},
    "missing field",
    ("'prompt' is missing", "did you mean 'promt'"),
  ),
  "misspelt chosen": (
    {"prompt": "p", "chosenn": "a", "rejected": "b"},
    "missing field",
    ("'chosen' is missing", "did you mean 'chosenn'"),
  ),
  "no field at all": ({}, "missing field", ("'prompt' is missing",)),
  "empty chosen": ({**GOOD, "chosen": ""}, "empty", ("'chosen' is empty",)),
  "number for a prompt": (
    {**GOOD, "prompt": 3},
    "wrong type",
    ("'prompt' must be str, not int",),
  ),
  "null for a prompt": (
    {**GOOD, "prompt": None},
    "missing field",
    ("'prompt' is missing", "a row is {"),
  ),
  "list for chosen": (
    {**GOOD, "chosen": ["a"]},
    "wrong type",
    ("'chosen' must be str, not list",),
  ),
  "a list for a record": (["p", "a", "b"], "wrong type", ("an object",)),
  "a string for a record": ("prompt", "wrong type", ("an object",)),
  "null for a record": (None, "wrong type", ("an object",)),
  "invalid UTF-8": (
    b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}',
    "invalid UTF-8",
    ("not UTF-8",),
  ),
  "half a surrogate": (
    b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}',
    "invalid UTF-8",
    ("'prompt'",),
  ),
  "not JSON": (b"prompt,chosen,rejected", "invalid JSON", ("not JSON",)),
  "two records in a line": (b"{} {}", "invalid JSON", ("not JSON",)),
  "a number too long to parse": (
    b'{"prompt": ' + b"1" * 5000 + b"}",
    "invalid JSON",
    ("not JSON",),
  ),
  "lists too deep to parse": (
    b"[" * 100_000,
    "invalid JSON",
    ("not JSON",),
  ),
  "a key twice": (
    b'{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}',
    "key twice",
    ("the key 'chosen' stands twice",),
  ),
  "completions are a string": (
    {**RANKED, "completions": "ab"},
    "wrong type",
    ("'completions' must be list, not str",),
  ),
  "no completions": (
    {**RANKED, "completions": []},
    "empty",
    ("'completions'", "empty"),
  ),
  "an empty completion": (
    {**RANKED, "completions": ["a", ""]},
    "empty",
    ("'completions'[1]", "non-empty"),
  ),
  "a number for a completion": (
    {**RANKED, "completions": ["a", 5]},
    "wrong type",
    ("'completions'[1]", "string"),
  ),
  "half a surrogate among completions": (
    b'{"prompt": "p", "completions": ["a", "\\ud83d"], "pairs": [[0, 1]]}',
    "invalid UTF-8",
    ("'completions'[1]",),
  ),
  "completions without a prompt": (
    {"completions": ["a", "b"], "pairs": [[0, 1]]},
    "missing field",
    ("'prompt' is missing",),
  ),
}
BAD_PREFERENCE = {
  "misspelt rejected": (
    {"prompt": "p", "chosen": "a", "rejectd": "b"},
    "missing field",
    ("'rejected' is missing", "did you mean 'rejectd'"),
  ),
  "empty rejected": (
    {**GOOD, "rejected": ""},
    "empty",
    ("'rejected' is empty",),
  ),
  "number for rejected": (
    {**GOOD, "rejected": 0.5},
    "wrong type",
    ("'rejected' must be str, not float",),
  ),
  "chosen is rejected": (
    {**GOOD, "rejected": GOOD["chosen"]},
    "identical pair",
    ("'chosen' and 'rejected'", "same text"),
  ),
  "no pairs field": (
    {"prompt": "p", "completions": ["a", "b"]},
    "missing field",
    ("'pairs' is missing",),
  ),
  "pairs are an object": (
    {**RANKED, "pairs": {"0": 1}},
    "wrong type",
    ("'pairs' must be list, not dict",),
  ),
  "no pairs": ({**RANKED, "pairs": []}, "empty", ("'pairs'", "empty")),
  "two completions alike": (
    {**RANKED, "completions": ["a", "a"]},
    "identical pair",
    ("[0, 1]", "same text"),
  ),
  **{
    f"pair {pair!r}": (
      {**RANKED, "pairs": [[1, 0], pair]},
      "bad pair",
      ("'pairs'", repr(pair), "below 2"),
    )
    for pair in (
      [0, 2],
      [-1, 0],
      [0, 0],
      [0],
      [0, 1, 2],
      [0, 1.0],
      [True, 0],
      ["0", "1"],
      "01",
      7,
      None,
    )
  },
}
BAD_PREFERENCE |= {
  f"an SFT record with {name}": (
    row,
    "missing field",
    (f"{missing!r} is missing",),
  )
  for name, row, missing in (
    ("text", {"text": "a"}, "prompt"),
    ("completion", {"prompt": "p", "completion": "a"}, "chosen"),
  )
}
BAD_SFT = {
  "empty text": ({"text": ""}, "empty", ("'text' is empty",)),
  "number for a text": ({"text": 3}, "wrong type", ("'text' must be str",)),
  "empty completion": (
    {"prompt": "p", "completion": ""},
    "empty",
    ("'completion' is empty",),
  ),
  "list for a completion": (
    {"prompt": "p", "completion": []},
    "wrong type",
    ("'completion' must be str, not list",),
  ),
  "completion without a prompt": (
    {"completion": "a"},
    "missing field",
    ("'prompt' is missing",),
  ),
}
CASES = [
  pytest.param(form, *case, id=f"{form}: {name}")
  for form, table in (
    ("preference", BAD_IN_ANY_FORM | BAD_PREFERENCE),
    ("sft", BAD_IN_ANY_FORM | BAD_SFT),
  )
  for name, case in table.items()
]


def write(folder, *lines, end=b"\n"):
  """A .jsonl file of objects, or of bytes as they are."""
  path = folder / "my.jsonl"
  encoded = [
    x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines
  ]
  path.write_bytes(b"\n".join(encoded) + end)
  return str(path)


def load(path, form="preference", on_bad="error"):
  policy = sources.Policy(on_bad)
  return sources.load(path, form, policy), policy.skipped


def error_of(path, form="preference", on_bad="error"):
  with pytest.raises(ValueError) as caught:
    load(path, form, on_bad)
  return str(caught.value)


@pytest.mark.parametrize(("form", "line", "reason", "words"), CASES)
def test_a_bad_record_is_an_error_naming_line_and_field(
  tmp_path, form, line, reason, words
):
  del reason
  path = write(tmp_path, GOOD, line, GOOD)
  message = error_of(path, form)
  for word in (f"{path}:2: ", *words, "data.bad_records='skip'"):
    assert word in message


@pytest.mark.parametrize(("form", "line", "reason", "words"), CASES)
def test_a_bad_record_can_be_skipped_and_is_counted(
  tmp_path, form, line, reason, words
):
  del words
  path = write(tmp_path, GOOD, line, GOOD)
  records, skipped = load(path, form, "skip")
  assert skipped == {reason: 1}
  assert [r.origin for r in records] == [f"{path}:1", f"{path}:3"]
  clean, _ = load(write(tmp_path, GOOD), form)
  assert [r[:3] for r in records] == [clean[0][:3]] * 2


def test_every_bad_record_is_counted_by_its_reason(tmp_path):
  lines = [b"{", GOOD, {**GOOD, "chosen": ""}, {**GOOD, "rejected": ""}, []]
  _, skipped = load(write(tmp_path, *lines), on_bad="skip")
  assert skipped == {"invalid JSON": 1, "empty": 2, "wrong type": 1}


@pytest.mark.parametrize("cut", ["object", "character"])
def test_a_last_line_cut_short_is_named_as_such_or_skipped(tmp_path, cut):
  last = '{"prompt": "p", "chosen": "café'.encode()
  last = last if cut == "object" else last[:-1]
  path = write(tmp_path, GOOD, last, end=b"")
  message = error_of(path)
  assert f"{path}:2: " in message
  assert cut == "character" or "cut short" in message
  records, skipped = load(path, on_bad="skip")
  assert len(records) == 1
  assert sum(skipped.values()) == 1


def test_a_file_that_ends_without_a_newline_is_whole(tmp_path):
  records, skipped = load(write(tmp_path, GOOD, GOOD, end=b""))
  assert len(records) == 2
  assert not skipped


def test_blank_lines_count_as_lines_and_not_as_records(tmp_path):
  path = write(tmp_path, b"", GOOD, b"  ", GOOD, b"")
  records, skipped = load(path)
  assert [r.origin for r in records] == [f"{path}:2", f"{path}:4"]
  assert not skipped


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
  line = json.dumps(GOOD).encode() + b"\r"
  records, _ = load(write(tmp_path, b"\xef\xbb\xbf" + line, line))
  assert [r.completions for r in records] == [(" warm.", " dull.")] * 2


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
  text = "a\u2028b\u0085c\nd"
  line = json.dumps({**GOOD, "chosen": text}, ensure_ascii=False).encode()
  records, _ = load(write(tmp_path, line, GOOD))
  assert records[0].completions[0] == text
  assert len(records) == 2


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_missing_file_is_an_error_even_when_records_may_be_skipped(
  tmp_path, on_bad
):
  path = str(tmp_path / "none.jsonl")
  message = error_of(path, on_bad=on_bad)
  assert path in message
  assert "cannot be read" in message


def test_a_file_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
  # A folder: root, who runs the tests in a container, may read any file.
  path = tmp_path / "folder.jsonl"
  path.mkdir()
  message = error_of(str(path))
  assert f"{path}: cannot be read" in message


def test_an_unknown_suffix_shows_the_nearest_one(tmp_path):
  message = error_of(str(tmp_path / "my.jsnl"))
  assert "'.jsnl'" in message
  assert "did you mean '.jsonl'" in message


def test_an_unknown_source_shows_the_nearest_one():
  assert "did you mean 'toy'" in error_of("toys")


def test_a_folder_is_read_as_a_data_set_and_the_error_says_how(tmp_path):
  assert f"'hf:{tmp_path}'" in error_of(str(tmp_path))


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("reviews", "'reviews' needs an argument"),
    ("plain:x", "'plain' takes nothing"),
  ],
)
def test_a_source_with_or_without_its_argument_is_an_error(
  spec, words, monkeypatch
):
  monkeypatch.setitem(sources.SOURCES, "plain", lambda: [GOOD])
  message = error_of(spec)
  assert f"data.train = {spec!r}" in message
  assert words in message


def test_toy_has_as_many_comparisons_as_asked_for():
  few, all_ = load("toy:64")[0], load("toy")[0]
  assert [r[:3] for r in few] == [r[:3] for r in all_[:64]]
  assert "must be toy:COUNT" in error_of("toy:x")


def test_a_source_is_told_from_another_by_its_content(tmp_path, monkeypatch):
  path = write(tmp_path, GOOD, GOOD)
  one = sources.identity(path)
  assert one.rows == 2
  assert one == sources.identity(write(tmp_path, GOOD, GOOD))
  assert one.value != sources.identity(write(tmp_path, GOOD)).value
  assert sources.identity("toy:5") == sources.identity("toy:5")
  assert sources.identity("toy:5") != sources.identity("toy:6")
  # Of these nothing is known until they are read, or the error is another's.
  monkeypatch.setitem(sources.SOURCES, "mine", list)
  for source in ("mine", "hf", "tois", "a.txt", str(tmp_path)):
    assert sources.identity(source) is None
  monkeypatch.setitem(sources.SOURCES, "toy", list)
  assert sources.identity("toy:5") is None
  with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read"):
    sources.identity("none.jsonl")


def test_a_notebook_adds_a_source_of_rows(monkeypatch):
  monkeypatch.setitem(sources.SOURCES, "mine", lambda n: [GOOD] * int(n))
  records, _ = load("mine:2")
  assert [r.origin for r in records] == ["mine:2:0", "mine:2:1"]
  bad = iter([GOOD, {"prompt": "p"}])
  monkeypatch.setitem(sources.SOURCES, "mine", lambda: bad)
  assert "mine:1: field 'chosen' is missing" in error_of("mine")


@pytest.mark.parametrize(
  ("spec", "parts"),
  [
    ("toy", [(1, "toy")]),
    ("2*toy", [(2, "toy")]),
    (" 0.5 * toy ", [(0.5, "toy")]),
    ("1e-1*a.jsonl + 2*b.csv", [(0.1, "a.jsonl"), (2, "b.csv")]),
    (
      "0.5*a.jsonl + hf:x@y:train + toy",
      [(0.5, "a.jsonl"), (1, "hf:x@y:train"), (1, "toy")],
    ),
    ("c++/a+b.jsonl", [(1, "c++/a+b.jsonl")]),
    ("runs/2*3/a.jsonl", [(1, "runs/2*3/a.jsonl")]),
    ("2*runs/2*3/a.jsonl", [(2, "runs/2*3/a.jsonl")]),
    ("gs://b/2*a.jsonl", [(1, "gs://b/2*a.jsonl")]),
  ],
)
def test_a_spec_is_weights_and_sources(spec, parts):
  assert sources.parse(spec) == parts


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "half", "", "1,5"])
def test_a_weight_that_is_none_names_the_field_and_the_source(weight):
  with pytest.raises(ValueError, match=r"data\.eval: the weight") as caught:
    sources.parse(f"toy + {weight}*my.jsonl", "data.eval")
  assert f"{weight!r} of 'my.jsonl'" in str(caught.value)


def test_a_mixture_is_its_parts_in_order_with_their_numbers(tmp_path):
  path = write(tmp_path, GOOD, GOOD)
  records, _ = load(f"0.5*{path} + toy + 3*{path}")
  mine, toy = load(path)[0], load("toy")[0]
  assert [r.source for r in records] == [0] * 2 + [1] * len(toy) + [2] * 2
  assert [r[:4] for r in records] == [r[:4] for r in mine + toy + mine]
  assert {r.source for r in toy} == {0}


def test_a_part_with_no_usable_record_is_an_error_naming_it(tmp_path):
  path = write(tmp_path, {**GOOD, "chosen": ""})
  message = error_of(f"toy + {path}", on_bad="skip")
  assert message.startswith(f"{path}: no usable record")


def test_an_unknown_part_shows_the_nearest_one():
  assert "did you mean 'toy'" in error_of("toy + 2*toys")


def test_no_source_says_how_to_give_one():
  message = error_of(None)
  assert "data.train is not set" in message
  assert "--config.data.train=" in message


@pytest.mark.parametrize("lines", [[b""], [b"{"], [{**GOOD, "chosen": ""}]])
def test_a_file_with_no_usable_record_is_an_error(tmp_path, lines):
  path = write(tmp_path, *lines)
  message = error_of(path, on_bad="skip")
  assert path in message
  assert "no usable record" in message


def test_an_unknown_policy_shows_the_nearest_one():
  with pytest.raises(ValueError, match="did you mean 'skip'") as caught:
    sources.Policy("skipp")
  assert "data.bad_records = 'skipp'" in str(caught.value)


FORMS = {
  "pair": (GOOD, "preference", (" warm.", " dull."), ((0, 1),)),
  "pair for SFT": (GOOD, "sft", (" warm.",), ()),
  "SFT needs no rejected": (
    {"prompt": "The plot is", "chosen": "a"},
    "sft",
    ("a",),
    (),
  ),
  "SFT may repeat the chosen": (
    {**GOOD, "rejected": GOOD["chosen"]},
    "sft",
    (" warm.",),
    (),
  ),
  "ranked": (
    {
      "prompt": "The plot is",
      "completions": ["a", "b", "c"],
      "pairs": [[2, 0], [0, 1], [2, 1]],
    },
    "preference",
    ("a", "b", "c"),
    ((2, 0), (0, 1), (2, 1)),
  ),
  "ranked with a completion that no pair uses": (
    {
      "prompt": "The plot is",
      "completions": ["a", "a", "b"],
      "pairs": [[0, 2]],
    },
    "preference",
    ("a", "a", "b"),
    ((0, 2),),
  ),
  "ranked for SFT": (
    {"prompt": "The plot is", "completions": ["a", "b"]},
    "sft",
    ("a",),
    (),
  ),
  "SFT takes the winner": (
    {
      "prompt": "The plot is",
      "completions": ["a", "b", "c"],
      "pairs": [[1, 0], [2, 1]],
    },
    "sft",
    ("c",),
    (),
  ),
  "SFT takes the first of a ranking": (
    {
      "prompt": "The plot is",
      "completions": ["a", "b", "c"],
      "ranking": [1, 0, 2],
    },
    "sft",
    ("b",),
    (),
  ),
  "SFT takes one of those that beat each other in a circle": (
    {
      "prompt": "The plot is",
      "completions": ["a", "b"],
      "pairs": [[1, 0], [0, 1]],
    },
    "sft",
    ("b",),
    (),
  ),
  "completion": (
    {"prompt": "The plot is", "completion": "a"},
    "sft",
    ("a",),
    (),
  ),
  "extra fields": (
    {**GOOD, "id": 7, "meta": {"by": None}},
    "preference",
    (" warm.", " dull."),
    ((0, 1),),
  ),
}


@pytest.mark.parametrize(
  ("row", "form", "completions", "pairs"), FORMS.values(), ids=FORMS
)
def test_each_form_becomes_the_same_record(
  tmp_path, row, form, completions, pairs
):
  path = write(tmp_path, row)
  records, _ = load(path, form)
  want = sources.Record("The plot is", completions, pairs, f"{path}:1")
  assert [record._replace(remarks=()) for record in records] == [want]


def test_a_text_is_a_completion_of_an_empty_prompt(tmp_path):
  records, _ = load(write(tmp_path, {"text": "a"}), "sft")
  assert records[0][:3] == ("", ("a",), ())


def test_a_prompt_may_be_empty(tmp_path):
  records, _ = load(write(tmp_path, {**GOOD, "prompt": ""}))
  assert records[0].prompt == ""


def test_toy_is_the_same_on_every_read():
  random.seed(1)
  first, _ = load("toy")
  random.seed(2)
  assert load("toy")[0] == first


def test_toy_holds_960_comparisons_that_pass_every_check():
  records, skipped = load("toy")
  assert len(records) == 960
  assert not skipped
  assert {r.pairs for r in records} == {((0, 1),)}
  assert len({r.origin for r in records}) == 960
  sft, _ = load("toy", "sft")
  assert [r.completions for r in sft] == [r.completions[:1] for r in records]
