"""Labels, messages, drawn tokens: every form, every bad row with its place."""

import pytest

from dpo_jax.data.read import fields, records, sources


def user(content):
  return {"role": "user", "content": content}


def assistant(content):
  return {"role": "assistant", "content": content}


ASKED = [{"role": "system", "content": "Be kind."}, user("How is the plot?")]
WARM, DULL = assistant("Warm."), assistant("Dull.")
EXPLICIT = {"prompt": ASKED, "chosen": [WARM], "rejected": [DULL]}
IMPLICIT = {"chosen": [*ASKED, WARM], "rejected": [*ASKED, DULL]}
RANKED = {
  "prompt": ASKED,
  "completions": [[WARM], [DULL]],
  "pairs": [[1, 0]],
}
LABELLED = {"text": "a", "label": 1}


def error_of(row, form):
  with pytest.raises(fields.BadRecord) as caught:
    records.make(row, form, "my.jsonl:7")
  return caught.value


@pytest.mark.parametrize(
  ("label", "value"),
  [(True, 1.0), (False, 0.0), (3, 3.0), (-1, -1.0), (0.25, 0.25)],
)
def test_a_label_is_a_number_or_a_bool(label, value):
  got = records.make({"text": "a", "label": label}, "label", "f:1")
  assert got == records.Record("", ("a",), (), "f:1", labels=(value,))


def test_a_labelled_completion_keeps_its_prompt():
  row = {"prompt": "p", "completion": "c", "label": 0}
  got = records.make(row, "label", "f:1")
  assert got == records.Record("p", ("c",), (), "f:1", labels=(0.0,))


def test_a_labelled_reply_may_be_messages():
  row = {"prompt": ASKED, "completion": [WARM], "label": 1}
  got = records.make(row, "label", "f:1")
  assert (got.prompt, got.completions) == (tuple(ASKED), ((WARM,),))
  assert got.labels == (1.0,)


@pytest.mark.parametrize(
  ("row", "reason", "words"),
  [
    ({"text": "a"}, "missing field", ("'label' is missing",)),
    (
      {"text": "a", "labels": 1},
      "missing field",
      ("'label' is missing", "did you mean 'labels'"),
    ),
    (
      {"txt": "a", "label": 1},
      "missing field",
      ("'text' is missing", "did you mean 'txt'"),
    ),
    (
      {"completion": "a", "label": 1},
      "missing field",
      ("'prompt' is missing",),
    ),
    (
      {"text": "a", "label": "pos"},
      "wrong type",
      ("'label'", "a number or a bool", "not str"),
    ),
    (
      {"text": "a", "label": None},
      "missing field",
      ("'label' is missing", 'a row is {"prompt", "completion", "label"}'),
    ),
    ({"text": "a", "label": float("nan")}, "bad label", ("finite", "nan")),
    ({"text": "a", "label": float("-inf")}, "bad label", ("finite", "-inf")),
    ({"text": "a", "label": 10**400}, "bad label", ("finite", "1000")),
    ({"text": "", "label": 1}, "empty", ("'text' is empty",)),
  ],
)
def test_a_bad_labelled_row_is_an_error_naming_its_field(row, reason, words):
  error = error_of(row, "label")
  assert error.reason == reason
  for word in ("my.jsonl:7: ", *words):
    assert word in str(error)
  assert "\n" not in str(error)


def test_the_label_of_a_text_is_not_looked_at_in_sft():
  got = records.make({"text": "a", "label": "?"}, "sft", "f:1")
  assert got == records.Record(
    "", ("a",), (), "f:1", remarks=("column 'label' is not read",)
  )


def test_an_unknown_form_shows_the_nearest_one():
  with pytest.raises(ValueError, match="did you mean 'preference'"):
    records.make(LABELLED, "preferences", "f:1")


PAIR = (tuple(ASKED), ((WARM,), (DULL,)), ((0, 1),))
ONE = (tuple(ASKED), ((WARM,),), ())
GOOD = {
  "explicit": (EXPLICIT, "preference", PAIR),
  "implicit": (IMPLICIT, "preference", PAIR),
  "implicit with the prompt as text": (
    {**IMPLICIT, "prompt": "How is the plot?"},
    "preference",
    PAIR,
  ),
  "ranked": (RANKED, "preference", (*PAIR[:2], ((1, 0),))),
  "explicit for SFT": (EXPLICIT, "sft", ONE),
  "implicit for SFT": (IMPLICIT, "sft", ONE),
  "ranked for SFT": (RANKED, "sft", (ONE[0], ((DULL,),), ())),
  "a completion": ({"prompt": ASKED, "completion": [WARM]}, "sft", ONE),
  "messages": ({"messages": [*ASKED, WARM], "text": "t"}, "sft", ONE),
  "nulls in a message": (
    {"messages": [*ASKED, {**WARM, "language": None, "name": None}]},
    "sft",
    ONE,
  ),
  "replies as text": (
    {**EXPLICIT, "chosen": "Warm.", "rejected": "Dull."},
    "preference",
    PAIR,
  ),
  "one reply as text": (
    {**EXPLICIT, "rejected": "Dull."},
    "preference",
    PAIR,
  ),
  "a ranked reply as text": (
    {**RANKED, "completions": [[WARM], "Dull."]},
    "preference",
    (*PAIR[:2], ((1, 0),)),
  ),
}


@pytest.mark.parametrize(("row", "form", "want"), GOOD.values(), ids=GOOD)
def test_each_form_of_messages_becomes_the_same_record(row, form, want):
  got = records.make(row, form, "f:1")
  assert got._replace(remarks=()) == records.Record(*want, "f:1")


def test_only_the_last_of_several_replies_is_the_completion():
  turns = [user("a"), assistant("b"), user("c"), assistant("d")]
  got = records.make({"messages": turns}, "sft", "f:1")
  assert got.prompt == tuple(turns[:3])
  assert got.completions == ((turns[3],),)


def of(*messages):
  return {"messages": list(messages)}


# name: (row, form, reason, words of the message)
BAD = {
  "the same reply": (
    {**EXPLICIT, "rejected": [WARM]},
    "preference",
    "identical pair",
    ("'chosen' and 'rejected'",),
  ),
  "the same reply in conversations": (
    {**IMPLICIT, "rejected": IMPLICIT["chosen"]},
    "preference",
    "identical pair",
    ("'chosen' and 'rejected'",),
  ),
  "the same reply among several": (
    {**RANKED, "completions": [[WARM], [WARM]]},
    "preference",
    "identical pair",
    ("[1, 0]",),
  ),
  "prompts that differ": (
    {**IMPLICIT, "rejected": [user("And the cast?"), DULL]},
    "preference",
    "different prompts",
    ("'chosen' and 'rejected' differ",),
  ),
  "a prompt that nobody said": (
    {**IMPLICIT, "prompt": "Where is the plot?"},
    "preference",
    "different prompts",
    ("'prompt' is none of the messages of 'chosen'",),
  ),
  "no rejected": (
    {"chosen": IMPLICIT["chosen"], "rejectd": IMPLICIT["rejected"]},
    "preference",
    "missing field",
    ("'rejected' is missing", "did you mean 'rejectd'"),
  ),
  "a conversation and a text": (
    {**IMPLICIT, "rejected": "Dull."},
    "preference",
    "wrong type",
    ("'rejected' must be list, not str",),
  ),
  "turns in the reply": (
    {**EXPLICIT, "chosen": [WARM, user("Sure?"), WARM]},
    "preference",
    "several turns",
    ("'chosen' has 3 messages", "belong to 'prompt'"),
  ),
  "a reply of the user": (
    {**EXPLICIT, "chosen": [user("Warm?")]},
    "preference",
    "bad role",
    ("'chosen' must end in a message of the assistant", "the user"),
  ),
  "an empty reply": (
    {**EXPLICIT, "chosen": [assistant("")]},
    "preference",
    "empty",
    ("'chosen'", "empty"),
  ),
  "no messages before the reply": (
    of(WARM),
    "sft",
    "empty",
    ("'messages' has one message", "a prompt must come before"),
  ),
  "no messages": (of(), "sft", "empty", ("'messages'", "list of messages")),
  "an empty prompt": (
    {**EXPLICIT, "prompt": []},
    "preference",
    "empty",
    ("'prompt'", "list of messages"),
  ),
  "messages that end with the user": (
    of(user("a"), WARM, user("b")),
    "sft",
    "bad role",
    ("'messages' must end in a message of the assistant",),
  ),
  "messages are text": (
    {"messages": "hello"},
    "sft",
    "wrong type",
    ("'messages' must be list, not str",),
  ),
  "a text among messages": (
    of("hello", WARM),
    "sft",
    "wrong type",
    ("'messages'[0] must be a message", "'hello'"),
  ),
  "an unknown role": (
    of({"role": "asistant", "content": "a"}, WARM),
    "sft",
    "bad role",
    ("'messages'[0]", "did you mean 'assistant'"),
  ),
  "a role that is a number": (
    of({"role": 1, "content": "a"}, WARM),
    "sft",
    "wrong type",
    ("'messages'[0]", "'role' must be str, not int"),
  ),
  "no role": (
    of({"rôle": "user", "content": "a"}, WARM),
    "sft",
    "missing field",
    ("'messages'[0]", "'role' is missing"),
  ),
  "no content": (
    of(user("a"), {"role": "assistant", "contents": "b"}),
    "sft",
    "missing field",
    ("'messages'[1]", "'content' is missing", "did you mean 'contents'"),
  ),
  "content that is null": (
    of(user("a"), assistant(None)),
    "sft",
    "missing field",
    ("'messages'[1]", "'content' is missing"),
  ),
  "content that is an object": (
    of(user({"text": "a"}), WARM),
    "sft",
    "wrong type",
    ("'messages'[0]", "'content' must be text, not dict"),
  ),
  "an image": (
    of(user([{"type": "text", "text": "a"}, {"type": "image"}]), WARM),
    "sft",
    "not text",
    ("'messages'[0]: field 'content'[1]", "the type 'image'", "'text'"),
  ),
  "no parts": (
    of(user([]), WARM),
    "sft",
    "empty",
    ("'messages'[0]: field 'content' is an empty list",),
  ),
  "half a surrogate": (
    of(user("\ud83d"), WARM),
    "sft",
    "invalid UTF-8",
    ("'messages'[0]", "'content'"),
  ),
}


@pytest.mark.parametrize(
  ("row", "form", "reason", "words"), BAD.values(), ids=BAD
)
def test_bad_messages_are_an_error_naming_field_and_message(
  row, form, reason, words
):
  error = error_of(row, form)
  assert error.reason == reason
  for word in ("my.jsonl:7: ", *words):
    assert word in str(error)
  assert "\n" not in str(error)


DRAWN = {
  "prompt": "p",
  "completions": [" a", " b", "c"],
  "pairs": [[2, 0], [0, 1]],
  "tokens": [[5, 0], [7], [8, 8, 256]],
}


def test_tokens_are_kept_beside_their_completions():
  got = records.make(DRAWN, "preference", "f:1")
  assert got == records.Record(
    "p",
    (" a", " b", "c"),
    ((2, 0), (0, 1)),
    "f:1",
    tokens=([5, 0], [7], [8, 8, 256]),
  )


def test_a_record_without_tokens_has_none():
  row = {k: v for k, v in DRAWN.items() if k != "tokens"}
  assert records.make(row, "preference", "f:1").tokens is None


@pytest.mark.parametrize(
  ("row", "form"),
  [
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference"),
    ({k: v for k, v in DRAWN.items() if k != "pairs"}, "sft"),
    ({"prompt": "p", "completion": "a"}, "sft"),
    (LABELLED, "label"),
  ],
)
def test_other_forms_do_not_look_at_tokens(row, form):
  got = records.make({**row, "tokens": "?"}, form, "f:1")
  assert got.tokens is None
  assert "column 'tokens' is not read" in got.remarks
  row = {k: v for k, v in row.items() if k != "tokens"}
  want = records.make(row, form, "f:1")
  assert got._replace(remarks=want.remarks) == want


BAD_TOKENS = {
  "too few": [[5, 0], [7]],
  "too many": [[5, 0], [7], [8], [9]],
  "none": [],
  "an empty list": [[5, 0], [], [8]],
  "no list": [[5, 0], 7, [8]],
  "null": [[5, 0], None, [8]],
  "ids for one completion": [5, 7, 8],
  "text": [[5, 0], "7", [8]],
  "ids as text": [[5, 0], ["7"], [8]],
  "a negative id": [[5, 0], [-1], [8]],
  "a bool": [[5, 0], [True], [8]],
  "a float": [[5, 0], [7.0], [8]],
  "a null among ids": [[5, 0], [None], [8]],
  "deeper": [[5, 0], [[7]], [8]],
}


@pytest.mark.parametrize("tokens", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_malformed_tokens_are_an_error_naming_what_is_wanted(tokens):
  error = error_of({**DRAWN, "tokens": tokens}, "preference")
  assert error.reason == "bad tokens"
  for word in ("my.jsonl:7: 'tokens'", "non-empty list of ids", "each of 3"):
    assert word in str(error)
  assert "\n" not in str(error)


@pytest.mark.parametrize(
  ("tokens", "kind"), [("567", "str"), ({"0": [5]}, "dict")]
)
def test_tokens_that_are_no_list_are_of_the_wrong_type(tokens, kind):
  error = error_of({**DRAWN, "tokens": tokens}, "preference")
  assert error.reason == "wrong type"
  assert f"my.jsonl:7: field 'tokens' must be list, not {kind}" in str(error)


def test_messages_cannot_have_tokens():
  error = error_of({**RANKED, "tokens": [[5], [7]]}, "preference")
  assert error.reason == "bad tokens"
  assert "my.jsonl:7: 'tokens'" in str(error)
  assert "completions that are text" in str(error)


CSV = """prompt,completions,pairs,tokens
p,"[""a"", ""b""]","[[1, 0]]","[[5, 0], [7]]"
q,"[""a"", ""b""]","[[0, 1]]",
"""


def test_tokens_in_a_csv_are_read_as_json(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text(CSV)
  got = sources.load(str(path), "preference", sources.Policy("error"))
  assert [r.tokens for r in got] == [([5, 0], [7]), None]
  assert [r.pairs for r in got] == [((1, 0),), ((0, 1),)]


def test_tokens_in_a_csv_that_are_not_json_are_an_error(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text(CSV.replace("[[5, 0], [7]]", "5 0; 7"))
  with pytest.raises(
    ValueError, match=r"my\.csv:2: field 'tokens' is not JSON"
  ):
    sources.load(str(path), "preference", sources.Policy("error"))
