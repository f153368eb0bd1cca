"""Files of rows: the same records whatever the format, and what is damaged."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.read import files, sources

PAIRS = [
  {"prompt": "The plot is", "chosen": " warm.", "rejected": ' "dull",\nno.'},
  {"prompt": "The café", "chosen": " 日本", "rejected": "\u2028b"},
]
RANKED = [
  {"prompt": "p", "completions": ["a", "b", "c"], "pairs": [[2, 0], [0, 1]]}
]
CHAT = [
  {
    "messages": [
      {"role": "user", "content": "a"},
      {"role": "assistant", "content": "b"},
    ]
  }
]
LABELS = [{"text": "a", "label": 1}, {"text": "b", "label": 0.5}]
SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])


def save(path, rows):
  """Writes rows in the format of the suffix."""
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif path.suffix == ".csv":
    with path.open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      for row in rows:
        writer.writerow(
          {
            k: v if isinstance(v, str) else json.dumps(v)
            for k, v in row.items()
          }
        )
  else:
    pq.write_table(pa.Table.from_pylist(rows), path)
  return str(path)


def load(path, form="preference", on_bad="error"):
  policy = sources.Policy(on_bad)
  return sources.load(str(path), form, policy), policy.skipped


def error_of(path, form="preference", on_bad="error"):
  with pytest.raises(ValueError) as caught:
    load(path, form, on_bad)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@SUFFIXES
@pytest.mark.parametrize(
  ("rows", "form"),
  [(PAIRS, "preference"), (RANKED, "preference"), (CHAT, "sft")],
)
def test_every_format_holds_the_same_records(tmp_path, suffix, rows, form):
  got, _ = load(save(tmp_path / f"my{suffix}", rows), form)
  want, _ = load(save(tmp_path / "want.jsonl", rows), form)
  assert [r[:3] for r in got] == [r[:3] for r in want]


@SUFFIXES
def test_the_content_of_a_file_is_its_bytes_and_about_how_many_rows(
  tmp_path, suffix
):
  path = save(tmp_path / f"my{suffix}", RANKED)
  _, rows = one = files.content(path)
  assert 1 <= rows <= 2  # a .csv has a line of names
  assert files.content(save(tmp_path / f"again{suffix}", RANKED)) == one
  assert files.content(save(tmp_path / f"b{suffix}", RANKED * 2)) != one


@SUFFIXES
def test_every_format_holds_labels(tmp_path, suffix):
  got, _ = load(save(tmp_path / f"my{suffix}", LABELS), "label")
  assert [r.labels for r in got] == [(1.0,), (0.5,)]


@SUFFIXES
def test_a_misspelt_column_is_named_with_the_row(tmp_path, suffix):
  path = save(
    tmp_path / f"my{suffix}", [{"prompt": "p", "chosn": "a", "rejected": "b"}]
  )
  message = error_of(path)
  first = 2 if suffix == ".csv" else 1  # the first line of a .csv names columns
  assert f"{path}:{first}: field 'chosen' is missing" in message
  assert "did you mean 'chosn'" in message


@SUFFIXES
def test_a_bad_row_between_good_ones_can_be_skipped(tmp_path, suffix):
  bad = {**PAIRS[0], "chosen": PAIRS[0]["rejected"]}
  path = save(tmp_path / f"my{suffix}", [PAIRS[0], bad, PAIRS[1]])
  records, skipped = load(path, on_bad="skip")
  assert len(records) == 2
  assert skipped == {"identical pair": 1}


@SUFFIXES
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_missing_file_of_any_format_is_an_error(tmp_path, suffix, on_bad):
  path = tmp_path / f"none{suffix}"
  message = error_of(path, on_bad=on_bad)
  assert f"{path}: cannot be read" in message


@SUFFIXES
def test_an_empty_file_of_any_format_is_an_error_with_its_name(
  tmp_path, suffix
):
  path = tmp_path / f"my{suffix}"
  path.write_bytes(b"")
  assert str(path) in error_of(path, on_bad="skip")


def test_csv_rows_are_named_by_the_line_they_begin_on(tmp_path):
  path = save(tmp_path / "my.csv", [PAIRS[0], *PAIRS])
  records, _ = load(path)
  # Two lines each for the first two: their text holds a newline.
  assert [r.origin for r in records] == [f"{path}:{n}" for n in (2, 4, 6)]


def test_an_empty_csv_cell_is_a_missing_field(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text("prompt,chosen,rejected\np,a,b\n\np,,b\n")
  assert f"{path}:4: field 'chosen' is missing" in error_of(path)


def test_unused_empty_columns_do_not_decide_the_form(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text("text,prompt,completion,messages\na,,,\n,p,c,\n")
  records, _ = load(path, "sft")
  assert [r[:2] for r in records] == [("", ("a",)), ("p", ("c",))]


def test_a_null_of_parquet_is_a_missing_field(tmp_path):
  rows = [{"text": "a", "prompt": None}, {"text": None, "prompt": "p"}]
  path = save(tmp_path / "my.parquet", rows)
  assert f"{path}:2: field 'chosen' is missing" in error_of(path, "sft")


@pytest.mark.parametrize("line", ["p,a", "p,a,b,c"])
def test_a_csv_row_of_another_width_is_an_error_with_its_line(tmp_path, line):
  path = tmp_path / "my.csv"
  path.write_text(f"prompt,chosen,rejected\np,a,b\n{line}\n")
  message = error_of(path)
  assert f"{path}:3: {line.count(',') + 1} cells" in message
  records, skipped = load(path, on_bad="skip")
  assert len(records) == 1
  assert skipped == {"wrong columns": 1}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_csv_quote_never_closed_is_an_error_where_it_opens(tmp_path, on_bad):
  """All below it is one cell: skipping would lose the rest in silence."""
  path = tmp_path / "my.csv"
  path.write_text('prompt,chosen,rejected\np,a,b\np,"a,b\np,a,b\n')
  message = error_of(path, on_bad=on_bad)
  assert f"{path}:3: not CSV" in message
  assert "cut short" in message


def test_a_csv_cell_longer_than_the_library_allows_is_read(tmp_path):
  long = "a" * 200_000
  limit = csv.field_size_limit()
  path = save(tmp_path / "my.csv", [{**PAIRS[0], "chosen": long}])
  records, _ = load(path)
  assert records[0].completions[0] == long
  assert csv.field_size_limit() == limit


def test_a_csv_from_a_spreadsheet_has_a_byte_order_mark(tmp_path):
  path = tmp_path / "my.csv"
  path.write_bytes("\ufefftext\r\na\r\nb\r\n".encode())
  records, _ = load(path, "sft")
  assert [r.completions for r in records] == [("a",), ("b",)]


def test_csv_that_is_not_utf8_is_an_error_with_its_line(tmp_path):
  path = tmp_path / "my.csv"
  path.write_bytes(b"text\na\ncaf\xe9\n")
  assert f"{path}:3: field 'text' is not text" in error_of(path, "sft")
  records, skipped = load(path, "sft", "skip")
  assert len(records) == 1
  assert skipped == {"invalid UTF-8": 1}


def test_a_csv_cell_of_a_list_must_be_json(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text("prompt,completions,pairs\np,a|b,0>1\n")
  message = error_of(path)
  assert f"{path}:2: field " in message
  assert "is not JSON" in message
  path.write_text('messages\n"[{""role"": 1, ""role"": 2}]"\n')
  assert f"{path}:2: the key 'role' stands twice" in error_of(path, "sft")


def test_a_file_that_is_one_list_says_so_once(tmp_path):
  path = tmp_path / "my.jsonl"
  path.write_text(json.dumps(PAIRS, indent=2))
  for on_bad in ("error", "skip"):
    assert "is one JSON list; write one object a line" in error_of(
      path, on_bad=on_bad
    )


def test_a_csv_cell_of_a_list_may_be_as_python_writes_it(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text(
    "prompt,completions,pairs,scores,bos\n"
    """p,"[' it\\'s', "" b""]","[[0, 1]]","[1.0, None]",False\n"""
  )
  (row,) = [row for _, row in files.csv_rows(path)]
  assert row == {
    **{"prompt": "p", "completions": [" it's", " b"], "pairs": [[0, 1]]},
    **{"scores": [1.0, None], "bos": False},
  }


def test_a_class_by_its_name_in_csv_is_ignored_by_sft_only(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text("text,label\na,pos\n")
  assert load(path, "sft")[0][0].completions == ("a",)
  assert "'label' must be a number or a bool, not str" in error_of(
    path, "label"
  )


def test_two_columns_of_one_name_are_an_error(tmp_path):
  path = tmp_path / "my.csv"
  path.write_text("text,text\na,b\n")
  assert f"{path}:1: two columns" in error_of(path, "sft")
  path = tmp_path / "my.parquet"
  pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
  assert f"{path}: two columns have one name" in error_of(path, "sft")


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_parquet_file_cut_short_is_an_error_with_its_name(
  tmp_path, keep, on_bad
):
  path = tmp_path / "my.parquet"
  save(path, PAIRS * 50)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(keep * len(whole))])
  assert f"{path}: not a whole Parquet file" in error_of(path, on_bad=on_bad)


def test_parquet_text_that_is_not_utf8_is_an_error_with_its_name(tmp_path):
  path = tmp_path / "my.parquet"
  column = pa.array([b"caf\xe9"]).cast(pa.string(), safe=False)
  pq.write_table(pa.table({"text": column}), path)
  assert f"{path}: not a whole Parquet file" in error_of(path, "sft")


def test_parquet_rows_are_numbered_across_its_row_groups(tmp_path):
  path = tmp_path / "my.parquet"
  table = pa.Table.from_pylist([{"text": f"t{n}"} for n in range(3000)])
  pq.write_table(table, path, row_group_size=700)
  records, _ = load(path, "sft")
  assert [r.origin for r in records] == [f"{path}:{n}" for n in range(1, 3001)]
  assert [r.completions for r in records] == [(f"t{n}",) for n in range(3000)]


def test_a_map_of_parquet_is_an_object_as_in_jsonl(tmp_path):
  """Not a list of its items, which a template would write as such."""
  strings = pa.map_(pa.string(), pa.string())
  call = pa.struct([("name", pa.string()), ("arguments", strings)])
  message = pa.struct(
    [
      *(("role", pa.string()), ("content", pa.string())),
      ("tool_calls", pa.list_(call)),
    ]
  )
  calls = [{"name": "weather", "arguments": [("city", "Oslo")]}]
  talk = [
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": calls},
  ]
  path = tmp_path / "my.parquet"
  table = pa.table({"messages": pa.array([talk], pa.list_(message))})
  pq.write_table(table, path)
  ((_, row),) = files.parquet(path)
  (call,) = row["messages"][1]["tool_calls"]
  assert call == {"name": "weather", "arguments": {"city": "Oslo"}}


def test_a_map_of_parquet_with_a_key_twice_is_an_error_with_its_name(tmp_path):
  strings = pa.map_(pa.string(), pa.string())
  path = tmp_path / "my.parquet"
  table = pa.table({"prompt": pa.array([[("a", "1"), ("a", "2")]], strings)})
  pq.write_table(table, path)
  with pytest.raises(ValueError, match=r"my\.parquet: a map has a key twice"):
    list(files.parquet(path))
