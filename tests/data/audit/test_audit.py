"""What the audit finds in data with planted defects, and how it says so."""

import json

import pytest

from configs import base
from dpo_jax.data.audit import audit, counts
from dpo_jax.data.audit import text as text_lib
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import comparisons, tokenize
from tests import templates

TEMPLATES = {
  None: None,
  "chatml": templates.CHATML,
  # A turn ends in what any text may hold.
  "words": templates.CHATML.replace("<|im_end|>", " The end"),
  # The end of turn is the EOS; the text begins with a BOS.
  "eos": "{{ bos_token }}"
  + templates.CHATML.replace("<|im_end|>", "{{ eos_token }}"),
  # Every turn begins with a BOS.
  "bos": templates.CHATML.replace("<|im_start|>", "{{ bos_token }}").replace(
    "<|im_end|>", "{{ eos_token }}"
  ),
}


def audited(config, kind, scored):
  sections = config.tokenizer, config.data, config.audit
  return audit.audit(*sections, kind, scored)


def kind_of(config):
  return "sft" if config.algo == "sft" else "pairs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """name of a template -> the folder of a tokenizer."""
  out = {}
  for name, template in TEMPLATES.items():
    folder = tmp_path_factory.mktemp("tokenizer")
    out[name] = templates.write(folder, template, size=290)
  return out


@pytest.fixture
def look(folders, tmp_path):
  """Audits rows; returns the report of data.train."""

  def run(*parts, template=None, algo="preference", **fields):
    config = base.get_config()
    config.algo = algo
    config.tokenizer = folders[template]
    paths = []
    for number, rows in enumerate(parts):
      paths.append(tmp_path / f"{number}.jsonl")
      lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
      paths[-1].write_text("".join(line + "\n" for line in lines))
    config.data.train = " + ".join(map(str, paths))
    for name, value in fields.items():
      group = config.audit if name in config.audit else config.data
      group[name] = value
    (report,) = audited(config, kind_of(config), False)
    return report

  return run


def row(prompt="the plot is", chosen=" warm.", rejected=" clever."):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def user(text):
  return {"role": "user", "content": text}


def reply(text):
  return {"role": "assistant", "content": text}


def chat(text="the plot?", chosen="warm.", rejected="clever."):
  return row([user(text)], [reply(chosen)], [reply(rejected)])


def failed(report):
  return [check["name"] for check in report["checks"] if check["failed"]]


GOOD = [row(f"the plot {n} is") for n in range(9)]


def test_good_data_passes_every_check(look):
  report = look(GOOD)
  assert not failed(report)
  assert [c["name"] for c in report["checks"]] == list(counts.CHECKS)
  (part,) = report["parts"]
  assert part["records"] == part["examples"] == part["comparisons"] == 9
  assert not part["found"]
  assert part["bos"] == {1: 9}
  assert part["eos"] == {1: 18}


# name of the check: (a row that has the defect, settings under which it has).
PLANTED = {
  "skipped": [
    (row(chosen=""), {}),
    (row(rejected=" warm."), {}),
    (row("warm " * 300), {}),
    (row(chosen=" warm.<|eos|> clever."), {}),
    ('{"prompt": ', {}),
    (
      row(chosen=" warm. the a", rejected=" warm. the b"),
      {"max_completion_length": 3},
    ),
  ],
  "boundary_merges": [(row("the plot is ", "warm.", "clever."), {})],
  "cut": [
    (row("warm " * 300), {"long_prompt": "keep_end"}),
    (row(rejected=" clever." * 300), {}),
  ],
  "double_bos": [
    (row("<|bos|><|bos|>the plot is"), {}),
    (row("the <|bos|> plot is"), {}),
    (row(chosen="<|bos|> warm."), {}),
    (row(rejected=" <|bos|>"), {}),
    (chat(chosen="<|bos|>warm."), {"template": "eos"}),
  ],
  "special_tokens": [
    (row("<|im_start|>the plot is"), {}),
    (row("the plot<|eos|> is"), {}),
    (row(rejected=" <|im_end|>clever."), {}),
    (chat("the <|im_end|> plot?"), {"template": "eos"}),
    (chat("the plot?<|eos|>"), {"template": "eos"}),
    (chat(rejected="<|im_start|>clever."), {"template": "eos"}),
  ],
  "empty": [(row(chosen="<|eos|>"), {})],
  "other_end": [(chat(), {"template": "words"})],
}


@pytest.mark.parametrize(
  ("name", "bad", "fields"),
  [(name, *case) for name, cases in PLANTED.items() for case in cases],
)
def test_a_planted_defect_is_found_and_is_the_only_one(look, name, bad, fields):
  good = [chat(f"the plot {n}?") for n in range(3)]
  if "template" not in fields:
    good = GOOD
  elif fields["template"] == "words":
    good = []
  report = look([*good, bad], boundary_merges=0.0, cut=0.0, **fields)
  assert failed(report) == [name]
  check = report["checks"][list(counts.CHECKS).index(name)]
  assert check["count"] == 1
  assert check["of"] == len(good) + 1
  text = text_lib.text(report)
  assert f"FAILED  {name:17}1 of {len(good) + 1} " in text
  assert f"0.jsonl:{len(good) + 1}" in text.replace("\n", "")
  assert counts.CHECKS[name].split()[0] in text


def test_a_bos_that_begins_every_turn_is_no_bos_and_no_defect(look):
  report = look([chat(), chat("the cast?")], template="bos")
  assert not failed(report)
  assert report["parts"][0]["bos"] == {0: 2}


def test_specials_that_a_template_writes_are_not_text(look):
  turns = [
    {"role": "system", "content": "be warm."},
    *(user("the plot?"), reply("warm."), user("is it clever?")),
  ]
  report = look([row(turns, [reply("a")], [reply("b")])], template="eos")
  assert not failed(report)


def test_why_a_record_is_skipped_is_counted_by_reason_with_the_first(look):
  bad = [row(chosen=""), row(chosen=""), row("warm " * 300), "{"]
  (part,) = look([*GOOD, *bad])["parts"]
  assert part["records"] == 13
  assert part["examples"] == 9
  assert part["skipped"] == {"empty": 2, "long prompt": 1, "invalid JSON": 1}
  assert "0.jsonl:10: field 'chosen' is empty" in part["why"]["empty"]
  assert "0.jsonl:12: field 'prompt' has" in part["why"]["long prompt"]


def test_identical_pairs_are_listed_even_if_there_are_none(look):
  assert "  skipped: identical pair                0\n" in (
    text_lib.text(look(GOOD))
  )
  text = text_lib.text(look([{"text": "the plot."}], algo="sft"))
  assert "skipped: identical" not in text


def test_a_completion_that_is_cut_has_no_eos(look):
  (part,) = look([row(rejected=" clever." * 300)])["parts"]
  assert part["eos"] == {1: 1, 0: 1}
  assert part["found"] == {"completion_cut": 1, "cut": 1}


def test_lengths_are_those_of_comparisons(look):
  rows = [
    {
      "prompt": "p",
      "completions": ["a", "bcd", "bcde"],
      "pairs": [[0, 1], [2, 1], [2, 0]],
    },
    row("q", "ab", "cd"),
  ]
  (part,) = look([json.dumps(r) for r in rows])["parts"]
  assert part["comparisons"] == 4
  assert part["completions"] == 5
  lengths = part["lengths"]  # each letter is a token, and the EOS
  assert lengths["prompt"] == {"mean": 2, "median": 2, "p95": 2, "max": 2}
  assert lengths["chosen"]["mean"] == (2 + 5 + 5 + 3) / 4
  assert lengths["rejected"]["mean"] == (4 + 4 + 2 + 3) / 4
  assert lengths["chosen"]["median"] == 4
  assert lengths["rejected"]["max"] == 4
  assert part["longer"] == {"share": 0.5, "equal": 0.25, "difference": 0.5}


def test_sft_has_lengths_of_completions_and_no_comparisons(look):
  rows = [{"text": "abc"}, {"prompt": "p", "completion": "a"}]
  (part,) = look(rows, algo="sft")["parts"]
  assert part["comparisons"] == 0
  assert part["longer"] is None
  assert part["lengths"]["completion"]["mean"] == 3
  assert "chosen" not in text_lib.text(look(rows, algo="sft"))


def test_a_part_of_a_mixture_fails_though_the_whole_would_not(look):
  bad = row(chosen="")
  report = look(GOOD * 10, [*GOOD, bad], skipped=0.05)
  assert [p["source"][-7:] for p in report["parts"]] == [
    *("0.jsonl", "1.jsonl", "all"),
  ]
  assert [p["records"] for p in report["parts"]] == [90, 10, 100]
  assert [len(p["skipped"]) for p in report["parts"]] == [0, 1, 1]
  (check,) = (c for c in report["checks"] if c["failed"])
  assert check["source"].endswith("1.jsonl")
  assert (check["count"], check["of"], check["limit"]) == (1, 10, 0.05)


def test_a_limit_is_exceeded_above_it_and_not_checked_if_none(look):
  rows = [*GOOD, row(chosen="")]
  assert failed(look(rows, skipped=0.09)) == ["skipped"]
  assert not failed(look(rows, skipped=0.1))
  report = look(rows, skipped=None)
  assert not failed(report)
  assert "–       skipped          not checked" in text_lib.text(report)


def test_a_source_of_which_nothing_is_left_fails_whatever_the_limit(look):
  for rows in ([row(chosen="")], []):
    report = look(GOOD, rows, skipped=None)
    assert failed(report) == ["skipped"]
    assert "nothing is left of it to train on" in text_lib.text(report)


def test_how_rows_were_read_is_counted_and_said(look):
  odd = [{**row(p), "system": "Be brief.", "id": 7} for p in ("it is", "so")]
  report = look(GOOD, [*odd, *GOOD])
  once = {"system text put in front of the prompt": 2}
  once["column 'id' is not read"] = 2
  assert [part["remarks"] for part in report["parts"]] == [{}, once, once]
  text = text_lib.text(report)
  assert text.count("    2 × column 'id' is not read\n") == 2
  assert not failed(report)
  assert "how records were read" not in text_lib.text(look(GOOD))


def test_soft_labels_are_named_and_are_one_comparison_each(look):
  soft = [{**row(), "probability": 0.75}, {**row("so"), "probability": 0.5}]
  (part,) = look(soft)["parts"]
  assert part["comparisons"] == 2
  assert part["remarks"] == {
    "comparison with a soft label, the probability that it is right": 2
  }
  assert part["longer"] == look([row(), row("so")])["parts"][0]["longer"]


def test_pairs_that_come_again_or_turned_round_are_counted(look):
  turned = row(chosen=" clever.", rejected=" warm.")
  other = row("the cast is", " clever.", " warm.")
  (part,) = look([row(), other, row(), turned, row(rejected=" a.")])["parts"]
  assert part["remarks"] == {
    "comparison that an earlier record has": 1,
    "comparison that an earlier record has the other way round": 1,
  }


def test_the_bos_that_a_template_does_not_write_is_not_counted(look):
  for template, want in (("chatml", {0: 1}), ("eos", {1: 1})):
    (part,) = look([chat()], template=template)["parts"]
    assert part["bos"] == want


def test_bos_of_a_tokenizer_whose_bos_is_the_eos_are_counted_in_front():
  tokenizer = tokenize.Tokenizer(None, None, 9, bos_id=7, eos_id=7)
  example = comparisons.Example(0, 0, [7, 1, 7, 2], ([3, 7],), ())
  assert counts.count_bos(example, tokenizer) == 1
  double = example._replace(prompt=[7, 7, 1])
  assert counts.count_bos(double, tokenizer) == 2


def test_the_audit_counts_what_training_counts(look, folders):
  """The same records by tokenize.encode: its examples and its counts."""
  bad = [case for cases in PLANTED.values() for case, more in cases if not more]
  rows = [*GOOD, *bad]
  report = look(rows, show=99)
  (part,) = report["parts"]
  policy = sources.Policy("skip")
  config = base.get_config()
  records = sources.load(report["spec"], "preference", policy)
  examples, changed = tokenize.encode(
    records, tokenize.load(folders[None]), config.data, policy
  )
  assert part["examples"] == len(examples)
  assert part["skipped"] == policy.skipped
  assert part["found"]["boundary_merges"] == 1
  assert changed["boundary merge"] == 2
  assert part["found"]["completion_cut"] == changed["completion cut"] == 1
  for shown, example in zip(report["shown"], examples, strict=True):
    assert [i for i, _, _ in shown["prompt"]] == example.prompt
    for side, ids in zip(
      shown["completions"], example.completions, strict=True
    ):
      assert [i for i, _, _ in side["tokens"]] == ids


def test_the_words_of_the_tokens_are_the_text(look):
  report = look([row("the plot is", " warm: é文😀.", " a�b")], show=1)
  (shown,) = report["shown"]
  assert shown["origin"].endswith("0.jsonl:1")
  assert shown["prompt"][0][1:] == ("<|bos|>", True)
  texts = [
    "".join(word or "" for _, word, special in tokens if not special)
    for tokens in (
      shown["prompt"],
      *(side["tokens"] for side in shown["completions"]),
    )
  ]
  assert texts == ["the plot is", " warm: é文😀.", " a�b"]
  assert [side["name"] for side in shown["completions"]] == [
    *("chosen", "rejected"),
  ]
  assert shown["completions"][0]["tokens"][-1][1:] == ("<|eos|>", True)


def test_an_example_is_shown_with_its_ids_and_its_boundary(look):
  text = text_lib.text(look([row(rejected=" warm." * 99), *GOOD], show=1))
  start = text.index("example 1 · ")
  shown = text[start : text.index("\n\n", start)]
  assert "prompt · 4 tokens, not scored\n    0 <|bos|> │ " in shown
  assert "▸ chosen · 3 tokens, scored\n" in shown
  assert "1 <|eos|>" in shown
  assert "… 167 more …" in shown
  assert "example 2" not in text


def test_no_example_is_shown_if_none_is_asked_for(look):
  assert "example 1" not in text_lib.text(look(GOOD, show=0))


def test_of_several_completions_it_says_which_are_better(look):
  rows = [
    {"prompt": "p", "completions": ["a", "b", "c"], "pairs": [[2, 0], [2, 1]]},
    {"prompt": "p", "completions": ["a", "b"], "pairs": [[1, 0]]},
  ]
  text = text_lib.text(look(rows))
  assert "▸ completion 2 · 2 tokens, scored · better than 0, 1" in text
  assert "▸ completion 0 · 2 tokens, scored\n" in text
  assert text.index("▸ rejected") < text.index("▸ chosen")


def test_the_report_is_at_most_88_columns_wide(look):
  bad = [c for cases in PLANTED.values() for c, more in cases if not more]
  for parts in ([GOOD], [GOOD, bad], [GOOD, bad, GOOD, GOOD, bad]):
    lines = text_lib.text(look(*parts)).splitlines()
    for line in lines:
      assert len(line) <= 88 or ".jsonl" in line, line


def test_the_report_is_plain_values(look):
  report = look([*GOOD, row(chosen="")], GOOD)
  assert json.loads(json.dumps(report))["field"] == "data.train"


def test_the_held_out_data_is_audited_too(folders):
  config = base.get_config()
  config.data.train, config.data.eval = "toy:9", "toy:3"
  reports = audited(config, kind_of(config), False)
  assert [r["field"] for r in reports] == ["data.train", "data.eval"]
  assert [r["parts"][0]["examples"] for r in reports] == [9, 3]
  assert text_lib.verdict(reports) == "no limit is exceeded"
  config.data.eval = None
  assert len(audited(config, kind_of(config), False)) == 1


def test_every_limit_is_a_field_of_the_config():
  fields = set(base.get_config().audit)
  assert fields == {"show", *counts.CHECKS}


def test_records_are_encoded_each_in_its_place(folders):
  records = [
    sources.Record("p", (text,), (), f"my.jsonl:{n}")
    for n, text in enumerate(("a", "b<|eos|>c", " warm." * 300, "d"))
  ]
  tokenizer = tokenize.load(folders[None])
  options = base.get_config().data
  each = list(tokenize.encode_each(records, tokenizer, options))
  assert [e.example and e.example.example_id for e in each] == [0, None, 2, 3]
  assert [e.error and e.error.reason for e in each] == [
    *(None, "EOS inside", None, None),
  ]
  assert [sum(e.changed.values()) for e in each] == [0, 0, 1, 0]


def test_what_a_loss_cannot_use_is_skipped_with_its_reason(tmp_path, folders):
  """As training would: graded labels for KTO, and no scores for ODPO."""
  path = tmp_path / "my.jsonl"
  rows = [
    {"prompt": "a", "completion": "b", "label": 0.5},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = base.get_config()
  config.tokenizer, config.data.train = folders[None], str(path)
  for kind, scored, reason in (
    ("mismatched", False, "bad label"),
    ("labels", True, "missing scores"),
  ):
    (report,) = audited(config, kind, scored)
    assert reason in report["parts"][0]["skipped"]
