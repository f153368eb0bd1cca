"""Rows as public data sets have them: read, with a word how, or refused."""

import json

import pytest

from dpo_jax.data.read import fields, records, several, sources


def user(content):
  return {"role": "user", "content": content}


def said(content):
  return {"role": "assistant", "content": content}


ASKED, COLD, WARM = user("Oslo?"), said("Cold."), said("Warm.")
PAIR = ((ASKED,), ((COLD,), (WARM,)))
TEXT = ("Oslo?", ("Cold.", "Warm."))
GIVEN = {"prompt": [ASKED], "chosen": [COLD], "rejected": [WARM]}
WHOLE = {"chosen": [ASKED, COLD], "rejected": [ASKED, WARM]}
HUMAN = {"from": "human", "value": "Oslo?"}


def gpt(text):
  return {"from": "gpt", "value": text}


def spelt(write, row):
  return {name: write(value) for name, value in row.items()}


TURNS = "\n\nHuman: Oslo?\n\nAssistant: Cold.\n\nHuman: Rome?\n\nAssistant:"
# name: (row, (prompt, completions), a word of the remark).
PREFERENCE = {
  "messages in JSON": (spelt(json.dumps, GIVEN), PAIR, "JSON"),
  "dialogues in JSON": (spelt(json.dumps, WHOLE), PAIR, "JSON"),
  "one message in JSON": (
    {**GIVEN, "chosen": json.dumps(COLD), "rejected": json.dumps(WARM)},
    PAIR,
    "JSON",
  ),
  "messages as Python writes them": (spelt(str, GIVEN), PAIR, "repr"),
  "messages in JSON whose first key is another": (
    {
      name: json.dumps([{"id": 3, **message} for message in talk])
      for name, talk in GIVEN.items()
    },
    (
      ({"id": 3, **ASKED},),
      (({"id": 3, **COLD},), ({"id": 3, **WARM},)),
    ),
    "JSON",
  ),
  "messages in JSON in JSON": (
    spelt(json.dumps, spelt(json.dumps, WHOLE)),
    PAIR,
    "JSON",
  ),
  "a text beside dialogues in JSON": (
    {"prompt": "Oslo?", **spelt(json.dumps, WHOLE)},
    PAIR,
    "JSON",
  ),
  "lists of roles and contents": (
    {
      name: {key: [m[key] for m in talk] for key in ("role", "content")}
      for name, talk in GIVEN.items()
    },
    PAIR,
    "lists",
  ),
  "messages, and single replies": (
    {"messages": [ASKED], "chosen": COLD, "rejected": WARM},
    PAIR,
    "'messages' read as 'prompt'",
  ),
  "single messages": (
    {"prompt": ASKED, "chosen": COLD, "rejected": WARM},
    PAIR,
    "list of one",
  ),
  "single messages of several": (
    {"prompt": [ASKED], "completions": [COLD, WARM], "pairs": [[0, 1]]},
    PAIR,
    "list of one",
  ),
  "conversations of from and value": (
    {
      "conversations": [HUMAN],
      "chosen": gpt("Cold."),
      "rejected": gpt("Warm."),
    },
    PAIR,
    "from, value",
  ),
  "the roles human and gpt": (
    {
      "prompt": [{"role": "human", "content": "Oslo?"}],
      "chosen": [{"role": "gpt", "content": "Cold."}],
      "rejected": [{"role": "gpt", "content": "Warm."}],
    },
    PAIR,
    "human and gpt",
  ),
  "a prompt and whole dialogues": (
    {"prompt": [ASKED], **WHOLE},
    PAIR,
    "taken off",
  ),
  "a prompt of text and whole dialogues of parts": (
    {
      "prompt": [ASKED],
      "chosen": [user([{"type": "text", "text": "Oslo?"}]), COLD],
      "rejected": [ASKED, WARM],
    },
    PAIR,
    "taken off",
  ),
  "messages, and replies of text": (
    {"prompt": [ASKED], "chosen": "Cold.", "rejected": "Warm."},
    PAIR,
    "replies of text",
  ),
  "a text, and replies of one message": (
    {"prompt": "Oslo?", "chosen": [COLD], "rejected": [WARM]},
    PAIR,
    "message of the user",
  ),
  "a dialogue and a worse end": (
    {"messages": [ASKED, COLD], "rejected_response": "Warm."},
    PAIR,
    "another end",
  ),
  "a dialogue and a worse one": (
    {"messages": [ASKED, COLD], "rejected_messages": [ASKED, WARM]},
    PAIR,
    "another end",
  ),
  "a question": (
    {"question": "Oslo?", "chosen": "Cold.", "rejected": "Warm."},
    TEXT,
    "'question'",
  ),
  "an instruction and its input": (
    {
      "instruction": "Answer.",
      "input": "Oslo?",
      "chosen": "Cold.",
      "rejected": "Warm.",
    },
    ("Answer.\n\nOslo?", TEXT[1]),
    "'instruction'",
  ),
  "an instruction without input": (
    {
      "instruction": "Oslo?",
      "input": "",
      "chosen": "Cold.",
      "rejected": "Warm.",
    },
    TEXT,
    "'instruction'",
  ),
  "responses j and k": (
    {"question": "Oslo?", "response_j": "Cold.", "response_k": "Warm."},
    TEXT,
    "'response_j'",
  ),
  "helpful and harmless": (
    {"chosen": TURNS + " Warm.", "rejected": TURNS + " Assistant: no."},
    (TURNS, (" Warm.", " Assistant: no.")),
    "last 'Assistant:'",
  ),
  "human preferences, A": (
    {"history": "Q?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    ("\n\nHuman: Q?\n\nAssistant:", (" a", " b")),
    "human_ref",
  ),
  "human preferences, B": (
    {"history": "Q?", "human_ref_A": "a", "human_ref_B": "b", "labels": "0"},
    ("\n\nHuman: Q?\n\nAssistant:", (" b", " a")),
    "human_ref",
  ),
  "summaries behind TL;DR": (
    {"prompt": "POST: Sun.", "chosen": "TL;DR: Hot.", "rejected": "TL;DR: No."},
    ("POST: Sun.\nTL;DR:", (" Hot.", " No.")),
    "'TL;DR:'",
  ),
}


@pytest.mark.parametrize(
  ("row", "want", "word"), PREFERENCE.values(), ids=PREFERENCE
)
def test_pairs_of_another_shape_are_read_and_it_is_said_how(row, want, word):
  got = records.make(row, "preference", "f:1")
  assert (got.prompt, got.completions) == want
  assert got.pairs == ((0, 1),)
  assert any(word in remark for remark in got.remarks)
  assert not any("is not read" in remark for remark in got.remarks)


@pytest.mark.parametrize("label", [0, 0.0, False, "0", "0.0", "False"])
@pytest.mark.parametrize("scores", [(3, 7), ("3", "7.0")])
def test_the_scores_of_human_preferences_go_with_their_answers(label, scores):
  row = {
    **{"history": "Q?", "human_ref_A": "a", "human_ref_B": "b"},
    **{"labels": label, "domain": "askcooking"},
    **dict(zip(("score_A", "score_B"), scores, strict=True)),
  }
  got = records.make(row, "preference", "f:1")
  assert got.completions == (" b", " a")
  assert got.scores == (7.0, 3.0)
  assert "column 'domain' is not read" in got.remarks


# The same for one completion: (row, form, prompt, completion, label).
SINGLE = {
  "feedback in messages": (
    {"prompt": [ASKED], "completion": [COLD], "label": True},
    "feedback",
    ((ASKED,), (COLD,), 1.0),
  ),
  "feedback on a dialogue": (
    {"messages": [ASKED, COLD], "label": False},
    "feedback",
    ((ASKED,), (COLD,), 0.0),
  ),
  "feedback by a tag": (
    {"conversations": [HUMAN, gpt("Cold.")], "kto_tag": True},
    "feedback",
    ((ASKED,), (COLD,), 1.0),
  ),
  "feedback in capitals": (
    {"prompt": "p", "completion": " c", "label": "TRUE"},
    "feedback",
    ("p", " c", 1.0),
  ),
  "feedback by a number in a text": (
    {"prompt": "p", "completion": " c", "kto_tag": "-1"},
    "feedback",
    ("p", " c", -1.0),
  ),
  "an instruction and its output": (
    {"instruction": "Add.", "input": "2 2", "output": "4"},
    "sft",
    ("Add.\n\n2 2", "4", None),
  ),
  "a question and its answer": (
    {"question": "2+2?", "answer": "4"},
    "sft",
    ("2+2?", "4", None),
  ),
  "a prompt and a label of words": (
    {"prompt": "POST: Sun.\nTL;DR:", "label": " Hot, true."},
    "sft",
    ("POST: Sun.\nTL;DR:", " Hot, true.", None),
  ),
  "conversations": (
    {"conversations": [HUMAN, gpt("Cold.")]},
    "sft",
    ((ASKED,), (COLD,), None),
  ),
}


@pytest.mark.parametrize(("row", "form", "want"), SINGLE.values(), ids=SINGLE)
def test_single_completions_of_another_shape_are_read(row, form, want):
  got = records.make(row, form, "f:1")
  label = None if got.labels is None else got.labels[0]
  assert (got.prompt, *got.completions, label) == want


def test_comparisons_of_summaries_ask_as_demonstrations_do():
  """CarperAI's two sets differ in where "TL;DR:" stands."""
  shown = {"prompt": "POST: Sun.\nTL;DR:", "label": " Hot."}
  compared = {"prompt": "POST: Sun.", "chosen": "TL;DR: Hot."}
  compared["rejected"] = "TL;DR: Cold."
  one = records.make(shown, "sft", "f:1")
  two = records.make(compared, "sft", "f:2")
  assert (one.prompt, one.completions) == (two.prompt, two.completions)
  # Whether a set has the space between, or not.
  bare = {**shown, "label": "Hot."}
  three = records.make(bare, "sft", "f:4")
  assert three.completions == one.completions
  assert "space put between 'TL;DR:' and the summary" in three.remarks
  assert not any("space" in remark for remark in one.remarks)
  # Where one of them does not, nothing is cut.
  odd = records.make({**compared, "rejected": "Cold."}, "preference", "f:3")
  assert odd.completions == ("TL;DR: Hot.", "Cold.")


@pytest.mark.parametrize("label", ["1", "true", "-0.5"])
def test_a_label_that_is_a_number_is_no_completion(label):
  with pytest.raises(fields.BadRecord, match="missing"):
    records.make({"prompt": "p", "label": label}, "sft", "f:1")


def test_prompts_to_be_sampled_may_be_questions_and_open_dialogues():
  for row, want in (
    ({"question": "Oslo?"}, "Oslo?"),
    ({"messages": [ASKED]}, (ASKED,)),
    ({"conversations": [HUMAN]}, (ASKED,)),
  ):
    assert records.make(row, "prompt", "f:1").prompt == want


def test_the_standard_forms_are_read_without_a_word():
  for row, form in (
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference"),
    (GIVEN, "preference"),
    (WHOLE, "preference"),
    ({"text": "[a list, or so]"}, "sft"),
    ({"messages": [ASKED, COLD]}, "sft"),
    ({"text": "t", "label": 1}, "label"),
  ):
    assert records.make(row, form, "f:1").remarks == ()


# name: replies that are text, though they begin like lists or messages.
ORDINARY = {
  "a list": ("[1, 2]", "[3]"),
  "a remark": ("[laughs] Cold.", "[sighs] Warm."),
  "JSON of other roles": ('[{"role": "admin", "content": "x"}]', "[]"),
  "one answer is a list of messages": (json.dumps([COLD]), "I cannot."),
  "an object": ('{"content": "x"}', '{"content": "y"}'),
  "an object with a key twice": ('{"a": 1, "a": 2}', '{"a": 1}'),
  "an object cut short": ('{"id": 3, "from": "Oslo", ', '{"id": 3, "to": '),
}


@pytest.mark.parametrize(("one", "other"), ORDINARY.values(), ids=ORDINARY)
def test_text_that_begins_like_a_list_stays_text(one, other):
  row = {"prompt": "[Scene] Oslo", "chosen": one, "rejected": other}
  got = records.make(row, "preference", "f:1")
  assert got == records.Record("[Scene] Oslo", (one, other), ((0, 1),), "f:1")


TWICE = '"content": "a", "content": "b"'
# name: (row, form, reason, words).
REFUSED = {
  "messages as numpy writes them": (
    {
      "chosen": f"[{ASKED}\n {COLD}]",
      "rejected": f"[{ASKED}\n {WARM}]",
    },
    "preference",
    "wrong type",
    ("neither JSON nor Python's repr", "json.dumps"),
  ),
  "a reply in JSON that is cut short": (
    {**spelt(json.dumps, GIVEN), "rejected": json.dumps([WARM])[:-3]},
    "preference",
    "wrong type",
    ("one reply are messages written as text, another reply is not",),
  ),
  "a prompt in JSON that is cut short": (
    {**spelt(json.dumps, GIVEN), "prompt": json.dumps([ASKED])[:-3]},
    "preference",
    "wrong type",
    ("neither JSON nor Python's repr", "cut short"),
  ),
  "messages of which one reply alone is text": (
    {**spelt(json.dumps, GIVEN), "rejected": "Warm."},
    "preference",
    "wrong type",
    ("another reply is not",),
  ),
  "messages in JSON with a key that is there twice": (
    {**spelt(json.dumps, GIVEN), "prompt": f'{{"role": "user", {TWICE}}}'},
    "preference",
    "key twice",
    ("the key 'content' stands twice",),
  ),
  "tools in JSON with a key that is there twice": (
    {**GIVEN, "tools": f"[{{{TWICE}}}]"},
    "preference",
    "key twice",
    ("the key 'content' stands twice",),
  ),
  "conversations with a role of their own": (
    {"conversations": [HUMAN, {"from": "function_cal", "value": "{}"}]},
    "sft",
    "bad role",
    ("'conversations'[1]: role 'function_cal' is not known", "gpt"),
  ),
  "feedback without its label": (
    {"prompt": "p", "completion": "c", "label": None},
    "feedback",
    "missing field",
    ("'label' is missing", "or one for preferences"),
  ),
  "two answers of which none is said to be better": (
    {"instruction": "Oslo?", "input": "", "output": ["Cold", "No"]},
    "preference",
    "missing field",
    ("'chosen' is missing", 'a row is {"prompt", "chosen", "rejected"}'),
  ),
  "summaries and a choice": (
    {"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0},
    "preference",
    "missing field",
    ("'prompt' is missing", 'a row is {"prompt", "chosen", "rejected"}'),
  ),
  "dialogues that part early": (
    {
      "chosen": TURNS + " Warm.",
      "rejected": "\n\nHuman: Oslo?\n\nAssistant: No.",
    },
    "preference",
    "different prompts",
    ("before their last 'Assistant:'",),
  ),
  "a label of yes": (
    {"prompt": "p", "completion": "c", "label": "yes"},
    "feedback",
    "wrong type",
    ("'label' must be a number or a bool",),
  ),
  "a second system": (
    {"system": "Be brief.", **GIVEN, "prompt": [{**ASKED, "role": "system"}]},
    "preference",
    "two systems",
    ("'Be brief.'", "'prompt' begins with another system turn", "'Oslo?'"),
  ),
  "a system that is no text": (
    {"system": ["Be brief."], **GIVEN},
    "preference",
    "wrong type",
    ("'system' must be str, not list",),
  ),
  "a ranking of thousands": (
    {
      "prompt": "p",
      "completions": [str(k) for k in range(several.MOST_RANKED + 1)],
      "ranking": list(range(several.MOST_RANKED + 1)),
    },
    "preference",
    "bad ranking",
    ("2 to 256 completions, not 257", "'pairs'"),
  ),
  "comparisons by the hundred thousand": (
    {
      **{"prompt": "p", "completions": ["a", "b"]},
      "pairs": [[0, 1]] * (several.MOST_PAIRS + 1),
    },
    "preference",
    "bad pair",
    ("has 32,641 comparisons, a record at most 32,640",),
  ),
  "tools that are no list": (
    {**GIVEN, "tools": '"weather"'},
    "preference",
    "bad tools",
    ("'tools' must be a list of tools",),
  ),
  "tools that are not JSON": (
    {**GIVEN, "tools": "weather"},
    "preference",
    "bad tools",
    ("'tools' is a text that is not JSON",),
  ),
}


@pytest.mark.parametrize(
  ("row", "form", "reason", "words"), REFUSED.values(), ids=REFUSED
)
def test_what_can_be_read_in_two_ways_is_refused(row, form, reason, words):
  with pytest.raises(fields.BadRecord) as caught:
    records.make(row, form, "my.jsonl:7")
  assert caught.value.reason == reason
  for word in ("my.jsonl:7: ", *words):
    assert word in str(caught.value)


BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
  "row",
  [
    GIVEN,
    WHOLE,
    {"prompt": "Oslo?", **WHOLE},
    {"prompt": [BRIEF, ASKED], "chosen": [COLD], "rejected": [WARM]},
    {"prompt": "Oslo?", "chosen": [COLD], "rejected": [WARM]},
  ],
)
@pytest.mark.parametrize(
  "system", ["Be brief.", [BRIEF], BRIEF, json.dumps([BRIEF]), str(BRIEF)]
)
def test_a_system_column_is_the_first_turn(column, row, system):
  got = records.make({column: system, **row}, "preference", "f:1")
  assert got.prompt == (BRIEF, ASKED)
  assert got.completions == PAIR[1]
  assert any("system" in remark for remark in got.remarks)


def test_a_system_column_stands_in_front_of_text():
  row = {"prompt": "Oslo?", "chosen": "a", "rejected": "b"}
  for system, want in (
    ("Be brief.", "Be brief.\n\nOslo?"),
    ("Be brief.\n", "Be brief.\nOslo?"),
    ("", "Oslo?"),
    (None, "Oslo?"),
  ):
    got = records.make({"system": system, **row}, "preference", "f:1")
    assert got.prompt == want
    assert len(got.remarks) == (want != "Oslo?")
  got = records.make({"system": "Be brief.", "prompt": "Oslo?"}, "prompt", "f")
  assert got.prompt == "Be brief.\n\nOslo?"


def test_what_no_form_reads_is_named_and_what_is_empty_is_not():
  row = {
    **{"prompt": "p", "chosen": "a", "rejected": "b"},
    **{"id": 0, "messages": [ASKED, COLD], "meta": {}, "note": "", "more": []},
  }
  got = records.make(row, "preference", "f:1")
  assert got.remarks == (
    "column 'id' is not read",
    "column 'messages' is not read",
  )


def test_a_system_column_that_nothing_needs_may_be_anything():
  got = records.make({"text": "t", "system": 3}, "sft", "f:1")
  assert got.remarks == ("column 'system' is not read",)


TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
  "tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], str([TOOL])]
)
def test_tools_are_a_list_or_its_json_and_go_with_messages(tools):
  for row, form in (
    (GIVEN, "preference"),
    ({"messages": [ASKED, COLD]}, "sft"),
    ({"messages": [ASKED]}, "prompt"),
  ):
    got = records.make({**row, "tools": tools}, form, "f:1")
    assert got.tools == (TOOL,)
    assert not got.remarks
  text = {"prompt": "p", "chosen": "a", "rejected": "b", "tools": tools}
  got = records.make(text, "preference", "f:1")
  assert got.tools is None
  assert got.remarks == ("column 'tools' is not read",)


def test_no_tools_at_all_are_as_good_as_none():
  for tools in ([], "[]", "", None, [None], "null", "None"):
    got = records.make({**GIVEN, "tools": tools}, "preference", "f:1")
    assert got.tools is None
    assert not got.remarks


CALL = {"id": "1", "function": {"name": "weather", "arguments": '{"a": null}'}}


def test_messages_keep_what_they_hold_and_lose_nulls_only():
  call = {**CALL, "type": None}
  reply = {
    **{"role": "assistant", "content": None, "tool_calls": [call]},
    **{"reasoning_content": "hm", "name": None, "weight": 1},
  }
  row = {"messages": [{**ASKED, "tool_calls": None}, reply]}
  got = records.make(row, "sft", "f:1")
  assert got.prompt == (ASKED,)
  assert got.completions == (
    (
      {
        **{"role": "assistant", "content": "", "tool_calls": [CALL]},
        **{"reasoning_content": "hm", "weight": 1},
      },
    ),
  )


@pytest.mark.parametrize("write", [json.dumps, lambda calls: calls])
def test_calls_are_a_list_or_its_json(write):
  reply = {"role": "assistant", "content": "", "tool_calls": write([CALL])}
  got = records.make({"messages": [ASKED, reply]}, "sft", "f:1")
  assert got.completions[0][0]["tool_calls"] == [CALL]
  for calls in ("weather", '"weather"', "{", CALL, [None], write([3])):
    bad = {"messages": [ASKED, {**reply, "tool_calls": calls}]}
    with pytest.raises(fields.BadRecord, match="must be a list of calls"):
      records.make(bad, "sft", "f:1")
  for none in ("", [], "[]"):  # templates may ask for the key alone
    reply = {**COLD, "tool_calls": none}
    got = records.make({"messages": [ASKED, reply]}, "sft", "f:1")
    assert got.completions == ((COLD,),)


def test_a_prompt_that_is_empty_says_nothing_beside_whole_dialogues():
  got = records.make({"prompt": "", **WHOLE}, "preference", "f:1")
  assert (got.prompt, got.completions, got.remarks) == (*PAIR, ())


def test_arguments_of_a_call_keep_their_nulls():
  call = {"function": {"name": "weather", "arguments": {"city": None}}}
  reply = {"role": "assistant", "tool_calls": [call]}
  got = records.make({"messages": [ASKED, reply]}, "sft", "f:1")
  assert got.completions[0][0]["tool_calls"] == [call]


def test_two_calls_to_tools_are_a_pair_though_no_text_is_in_them():
  one, other = (
    {"role": "assistant", "content": "", "tool_calls": [{"id": name}]}
    for name in "ab"
  )
  row = {"prompt": [ASKED], "chosen": [one], "rejected": [other]}
  assert len(records.make(row, "preference", "f:1").completions) == 2
  with pytest.raises(fields.BadRecord, match="the same text"):
    records.make({**row, "rejected": [one]}, "preference", "f:1")


def test_keys_that_say_nothing_make_no_other_prompt():
  chosen = [{**ASKED, "id": 1}, COLD]
  rejected = [{**ASKED, "id": 2}, WARM]
  row = {"chosen": chosen, "rejected": rejected}
  assert len(records.make(row, "preference", "f:1").completions) == 2


NULLS = {
  "pairs": {"prompt": "p", "chosen": "a", "rejected": "b"},
  "several": {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]]},
}


@pytest.mark.parametrize("row", NULLS.values(), ids=NULLS)
def test_nulls_in_jsonl_are_missing_fields(tmp_path, row):
  everything = (
    *("prompt", "chosen", "rejected", "completions", "pairs", "tokens"),
    *("ranking", "scores", "score_chosen", "score_rejected", "text", "label"),
    *("messages", "completion", "system", "tools", "conversations", "history"),
  )
  path = tmp_path / "my.jsonl"
  for null in (None, [None, None]):
    line = json.dumps({**dict.fromkeys(everything, null), **row})
    path.write_text(f"{line}\n")
    (got,) = sources.load(str(path), "preference", sources.Policy("error"))
    assert got == records.make(row, "preference", f"{path}:1")


def test_nulls_that_fill_up_a_table_are_missing_keys(tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  call = {"function": {"name": "w", "arguments": {"city": "Oslo"}}}
  other = {"function": {"name": "w", "arguments": {"day": "today"}}}
  turns = [{"role": "assistant", "tool_calls": [c]} for c in (call, other)]
  rows = [{"messages": [ASKED, turn]} for turn in turns]
  path = tmp_path / "my.parquet"
  parquet.write_table(pa.Table.from_pylist(rows), path)
  got = sources.load(str(path), "sft", sources.Policy("error"))
  for record, turn in zip(got, turns, strict=True):
    assert record.prompt == (ASKED,)
    assert record.completions == (({**turn, "content": ""},),)


def test_a_table_as_pandas_writes_it_is_read(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text("prompt,completion,label\na, x,True\nb, y,False\n")
  got = sources.load(str(path), "feedback", sources.Policy("error"))
  assert [record.labels for record in got] == [(1.0,), (0.0,)]
  path.write_text(f'messages\n"{[ASKED, COLD]}"\n')
  (got,) = sources.load(str(path), "sft", sources.Policy("error"))
  assert got.completions == ((COLD,),)
  assert any("repr" in remark for remark in got.remarks)


def test_comparisons_and_completions_that_look_wrong_are_counted():
  row = {
    "prompt": "p",
    "completions": ["a", " \n", "c"],
    "pairs": [[0, 1], [0, 1], [1, 0], [0, 2]],
  }
  assert sorted(records.make(row, "preference", "f:1").remarks) == [
    "comparison given both ways round",
    "comparison given twice",
    "completion of white space only",
  ]


@pytest.mark.parametrize(
  ("row", "words"),
  [
    (
      {"prompt": [ASKED, COLD], "chosen": [COLD], "rejected": [WARM]},
      ("prompt that ends in a turn of the assistant, not continued",),
    ),
    (
      {"prompt": "Oslo?", "chosen": "Oslo? Cold", "rejected": "Oslo? Warm"},
      ("prompt that every completion repeats at its beginning",),
    ),
    ({"prompt": "Oslo?", "chosen": "Oslo? Cold", "rejected": "Warm"}, ()),
    ({"prompt": "", "chosen": "Cold", "rejected": "Warm"}, ()),
  ],
)
def test_a_prompt_that_may_be_meant_otherwise_is_counted(row, words):
  assert records.make(row, "preference", "f:1").remarks == words
