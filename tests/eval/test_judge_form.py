"""A form for people: written blind, read back as a judge."""

import csv
import json
import re

import pytest

from dpo_jax import cli
from dpo_jax.config import load
from dpo_jax.eval.judge import form, matched, verdicts
from tests.eval import judge_stub

PAIRS = [
  matched.Pair(name, f"post {n}", f"ours {name} {n}", f"their {n}")
  for name in ("cold", "warm")
  for n in range(20)
]
SAME = matched.Pair("cold", "post", "equal", "equal")


def options(**fields):
  values = {f"judge.{name}": value for name, value in fields.items()}
  return load.plain(load.load_config("judge", values).judge)


def judge(path, pairs=PAIRS, **fields):
  return form.judge(str(path), pairs, options(**fields))


def rows_of(path):
  with open(path, newline="", encoding="utf-8-sig") as file:
    return list(csv.DictReader(file))


def fill(path, rows):
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def test_a_form_has_every_pair_once_on_random_sides_and_tells_no_names(
  tmp_path,
):
  decided, _, told = judge(tmp_path / "form.csv", [*PAIRS, SAME])
  assert decided is None
  assert "40 pairs to judge" in told[0]
  rows = rows_of(tmp_path / "form.csv")
  assert list(rows[0]) == ["number", "prompt", "A", "B", "preferred"]
  assert len(rows) == 40  # equal texts are nobody's work
  got = {(r["prompt"], frozenset((r["A"], r["B"]))) for r in rows}
  assert got == {(p.prompt, frozenset((p.ours, p.theirs))) for p in PAIRS}
  assert {r["preferred"] for r in rows} == {""}
  left = sum(r["A"].startswith("ours") for r in rows)
  assert 10 <= left <= 30  # of 40 coins: outside once in a thousand seeds
  assert [r["prompt"] for r in rows] != [p.prompt for p in PAIRS]
  # Pairs of both files from the start: neither comes first.
  begins = " ".join(r["A"] + r["B"] for r in rows[:10])
  assert "cold" in begins
  assert "warm" in begins


def test_the_seed_decides_sides_and_order(tmp_path):
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    judge(tmp_path / f"{name}.csv", seed=seed)
  a, b, c = ((tmp_path / f"{n}.csv").read_text() for n in "abc")
  assert a == b != c


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_people_prefer_is_read_by_the_key(tmp_path, suffix):
  """Somebody who prefers ours, ties on post 3, and leaves the rest."""
  path = tmp_path / f"form{suffix}"
  judge(path, [*PAIRS, SAME])
  if suffix == ".csv":
    rows = rows_of(path)
  else:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in rows:
    ours = "A" if row["A"].startswith("ours") else "B"
    # As a person writes; and a program that saves texts its own way.
    row["preferred"] = f" {ours.lower()} "
    row["A"], row["B"] = row["A"].upper(), "lost"
    if row["prompt"] == "post 3":
      row["preferred"] = "Can't tell"
    if row["prompt"] in ("post 4", "post 5"):
      row["preferred"] = ""
    if row["prompt"] == "post 6":
      row["preferred"] = "A or B"
  rows.reverse()
  fill(path, rows) if suffix == ".csv" else judge_stub.write(path, rows)
  decided, _, told = judge(path, [*PAIRS, SAME])
  assert told == ["34 of 40 pairs are filled in"]
  want = {3: 0.5, 4: None, 5: None, 6: None}
  values = [verdict.value for verdict in decided]
  assert values == [want.get(n, 1.0) for _ in range(2) for n in range(20)] + [
    0.5
  ]
  assert decided[6].why == "malformed"
  assert "'A or B' is not A, B or tie" in decided[6].about["reasons"][0]
  assert decided[-1] == verdicts.identical(SAME)


def test_a_cell_is_no_formula(tmp_path):
  pairs = [
    matched.Pair("f", "=1+1", "@x", "-y"),
    matched.Pair("f", "p", "é", "b"),
  ]
  judge(tmp_path / "form.csv", pairs)
  cells = [c for r in rows_of(tmp_path / "form.csv") for c in r.values()]
  assert {"'=1+1", "'@x", "'-y", "é"} <= set(cells)
  # What makes a spreadsheet read it as UTF-8.
  assert (tmp_path / "form.csv").read_bytes().startswith(b"\xef\xbb\xbfnumber")


def test_two_people_fill_in_copies_of_one_form(tmp_path):
  judge(tmp_path / "form.csv")
  rows = rows_of(tmp_path / "form.csv")
  for name, letter in (("ann", "A"), ("bob", "B")):
    fill(tmp_path / f"{name}.csv", [{**r, "preferred": letter} for r in rows])
  key = str(tmp_path / "form.key.json")
  ann, bob = (
    judge(tmp_path / f"{name}.csv", form_key=key)[0] for name in ("ann", "bob")
  )
  assert [a.value + b.value for a, b in zip(ann, bob, strict=True)] == [
    1.0
  ] * 40
  with pytest.raises(ValueError, match=r"and .*ann.key.json is not there"):
    judge(tmp_path / "ann.csv")
  with pytest.raises(ValueError, match="no such form"):
    judge(tmp_path / "eve.csv", form_key=key)
  (tmp_path / "form.csv").unlink()
  with pytest.raises(ValueError, match="may be with people"):
    judge(tmp_path / "form.csv")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda rows: rows + rows[:1], "the number 1 stands there twice"),
    (lambda rows: [{**rows[0], "number": "99"}], "knows no number 99"),
    (lambda rows: [{"prompt": "x"}], "field 'number' is missing"),
  ],
)
def test_a_form_that_was_changed_is_refused(tmp_path, change, message):
  path = tmp_path / "form.csv"
  judge(path)
  fill(path, change(rows_of(path)))
  with pytest.raises(ValueError, match=message):
    judge(path)


def test_a_form_of_other_pairs_is_refused(tmp_path):
  judge(tmp_path / "form.csv", PAIRS[:10])
  with pytest.raises(ValueError, match="is not of these pairs"):
    judge(tmp_path / "form.csv", PAIRS)


def test_a_form_is_a_csv_or_jsonl(tmp_path):
  with pytest.raises(ValueError, match=r"suffix of the form = '.xlsx'"):
    judge(tmp_path / "form.xlsx")


def test_the_same_command_writes_the_form_and_reads_it(tmp_path, capsys):
  path = tmp_path / "form.csv"
  ours, theirs = ({f"p{n}": f"{who} {n}" for n in range(4)} for who in "ab")
  words = ["judge", f"--workdir={tmp_path / 'out'}"]
  words.append(f"--config.judge.by=form:{path}")
  for name, texts in (("samples", ours), ("against", theirs)):
    file = judge_stub.samples(tmp_path / f"{name}.jsonl", texts)
    words.append(f"--config.judge.{name}={file}")
  assert cli.main(words) == 0
  assert not (tmp_path / "out").exists()
  assert "4 pairs to judge" in capsys.readouterr().out
  rows = rows_of(path)
  for row in rows:
    row["preferred"] = "A" if row["A"].startswith("a") else "B"
  fill(path, rows)
  assert cli.main(words) == 0
  assert re.search(r"4 of 4 +1\.000", capsys.readouterr().out)
