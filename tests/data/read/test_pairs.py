"""Prompts that are beginnings of texts, and comparisons drawn from rewards."""

import itertools
import json
import math

import numpy as np
import pytest

from dpo_jax.data.read import pairs, sources
from dpo_jax.data.tokens import tokenize

BYTES = tokenize.load("bytes")


def twos(texts):
  """Tokens of two characters each, which stand across words."""
  return [[t[i : i + 2] for i in range(0, len(t), 2)] for t in texts]


CODECS = pytest.mark.parametrize(
  ("encode", "decode"),
  [(BYTES.encode, BYTES.decode), (twos, "".join)],
  ids=["bytes", "twos"],
)
TEXTS = [
  "a plot of two words and more",
  "short",
  "",
  "  indented,  with  gaps  between  words",
  "one\nline and\n another line",
  "une idée très folle, 文 字 😀 et plus",
  "withoutanyspaceuntilfarbehindthespan at all",
  "ab cd ef gh ij kl mn",
]
LEFT_OUT = {1, 2, 6}
SPAN = (3, 12)


@CODECS
def test_a_beginning_is_within_the_span_and_a_new_word_follows(encode, decode):
  for seed in range(40):
    cut = pairs.beginnings(TEXTS, encode, decode, SPAN, seed)
    assert [i for i, _ in cut] == sorted(set(range(len(TEXTS))) - LEFT_OUT)
    for index, start in cut:
      text = TEXTS[index]
      assert text.startswith(start)
      assert text[len(start) :].startswith(" ")
      assert text[len(start) :].strip()
      assert SPAN[0] <= len(encode([start])[0]) <= SPAN[1]


@pytest.mark.parametrize(
  ("text", "span", "starts"),
  [
    ("ab cd ef", (1, 9), {"ab", "ab cd"}),
    ("ab cd ef", (2, 5), {"ab", "ab cd"}),
    ("ab cd ef", (3, 5), {"ab cd"}),
    ("ab cd ef", (2, 4), {"ab"}),
    ("ab cd ef", (3, 4), set()),
    ("ab cd ef", (6, 20), set()),  # nothing would be left
    ("ab", (1, 9), set()),
    ("é 😀 b", (1, 4), {"é"}),  # two bytes; four are inside the next one
    ("é 😀 b", (1, 7), {"é", "é 😀"}),
  ],
)
def test_each_place_in_the_span_where_a_word_begins_is_a_cut(
  text, span, starts
):
  cuts = [
    pairs.beginnings([text], BYTES.encode, BYTES.decode, span, seed)
    for seed in range(40)  # two places: one is missed by 1 in 2⁴⁰
  ]
  assert {start for cut in cuts for _, start in cut} == starts


def test_the_cuts_of_a_text_are_uniform_over_its_places():
  count, starts = 2000, ["a", "a b", "a b c", "a b c d"]
  texts = ["a b c d e"] * count
  cut = pairs.beginnings(texts, BYTES.encode, BYTES.decode, (1, 9), 0)
  found = [start for _, start in cut]
  assert len(found) == count
  # Each is drawn with p = 1/4: 4 binomial standard errors.
  margin = 4 * math.sqrt(count * 0.25 * 0.75)
  for start in starts:
    assert abs(found.count(start) - count / 4) < margin


@CODECS
def test_a_cut_does_not_depend_on_the_other_texts(encode, decode):
  want = dict(pairs.beginnings(TEXTS, encode, decode, SPAN, 5))
  for index, other in itertools.product(range(len(TEXTS)), ("", TEXTS[0])):
    texts = [other] * len(TEXTS)
    texts[index] = TEXTS[index]
    got = dict(pairs.beginnings(texts, encode, decode, SPAN, 5))
    assert got.get(index) == want.get(index)


@CODECS
def test_cuts_change_with_the_seed_and_with_nothing_else(encode, decode):
  def cut(seed):
    return tuple(pairs.beginnings(TEXTS, encode, decode, SPAN, seed))

  assert cut(3) == cut(3)
  assert len({cut(seed) for seed in range(20)}) > 10


@pytest.mark.parametrize("text", ["a\ufffd", "a ", "a  \n"])
def test_a_text_with_no_word_after_a_cut_is_left_out(text):
  assert pairs.beginnings([text], BYTES.encode, BYTES.decode, (1, 9), 0) == []


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_bradley_terry_wins_are_as_frequent_as_the_sigmoid_of_the_gap(scale):
  rewards, count = (0.0, 1.0, -0.5, 3.0), 12_000
  wins = np.zeros((4, 4))
  for seed in range(count):
    for winner, loser in pairs.compare(
      "abcd", rewards, "bradley_terry", [seed, 1], scale=scale
    ):
      wins[winner, loser] += 1
  for i, j in itertools.permutations(range(4), 2):
    p = 1 / (1 + math.exp(scale * (rewards[j] - rewards[i])))
    # 4 binomial standard errors.
    assert abs(wins[i, j] / count - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_the_comparisons_of_a_prompt_are_drawn_independently():
  outcomes = {
    str(pairs.compare("abcd", [0.0] * 4, "bradley_terry", [seed]))
    for seed in range(2000)
  }
  # Six fair draws; each of 2⁶ outcomes is expected 31 times.
  assert len(outcomes) == 64


@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_a_huge_gap_decides_without_overflow(kind):
  with np.errstate(all="raise"):
    for seed, gap in itertools.product(range(50), (1e4, -1e4)):
      got = pairs.compare("ab", [kind(gap), kind(0)], "bradley_terry", [seed])
      assert got == ([[0, 1]] if gap > 0 else [[1, 0]])


def test_a_reward_that_is_not_a_number_is_refused():
  with pytest.raises(ValueError, match="not all finite"):
    pairs.compare(["a", "b"], [1.0, math.nan], "bradley_terry", [0])


def test_the_higher_reward_wins_and_ties_are_left_out():
  for seed in range(20):
    got = pairs.compare("abcd", [1.0, 3.0, 1.0, 2.0], "deterministic", [seed])
    assert got == [[1, 0], [3, 0], [1, 2], [1, 3], [3, 2]]


@pytest.mark.parametrize("labels", ["bradley_terry", "deterministic"])
def test_equal_completions_are_not_compared(labels):
  for seed in range(20):
    got = pairs.compare("aba", [0.0, 1.0, 5.0], labels, [seed])
    assert [sorted(pair) for pair in got] == [[0, 1], [1, 2]]


@pytest.mark.parametrize("labels", ["bradley_terry", "deterministic"])
def test_four_completions_have_six_comparisons(labels):
  got = pairs.compare("abcd", [0.0, 1.0, 2.0, 3.0], labels, [0])
  want = list(itertools.combinations(range(4), 2))
  assert sorted(tuple(sorted(pair)) for pair in got) == want


REWARDS = {
  "": 9.0,
  " warm.": 2.0,
  " dull.": 0.5,
  " naïve\n": 1.0,
  " so 😀": 0.0,
}
DRAWN = {
  0: ("", " dull.", " warm.", " naïve\n", ""),
  1: (" warm.", " warm.", " dull.", " so 😀"),
  2: (" so 😀", " so 😀", " so 😀"),  # nothing to compare
  5: (" dull.", "", " so 😀"),
  6: ("", " warm."),  # nothing to compare it with
}


def draws(*numbers):
  """Draws of some prompts; the tokens are the bytes of the text, and EOS."""
  return [
    {
      "id": number,
      "prompt": f"prompt {number}",
      "completion": text,
      "tokens": [*text.encode(), BYTES.eos_id],
      "reward": REWARDS[text],
    }
    for number in numbers or DRAWN
    for text in DRAWN[number]
  ]


def test_empty_completions_are_dropped_and_counted():
  out, left_out = pairs.records(draws(), "deterministic", 0)
  assert left_out["empty completions"] == 4
  assert {r["prompt"]: tuple(r["completions"]) for r in out} == {
    f"prompt {n}": tuple(text for text in DRAWN[n] if text) for n in (0, 1, 5)
  }


def test_equal_pairs_are_counted():
  _, left_out = pairs.records(draws(), "deterministic", 0)
  assert left_out["pairs of equal completions or rewards"] == 1 + 3


def test_a_scale_makes_the_higher_reward_win():
  certain, _ = pairs.records(draws(), "bradley_terry", 0, scale=1e3)
  exact, _ = pairs.records(draws(), "deterministic", 0)
  kept = {tuple(map(tuple, r["pairs"])) for r in exact}
  assert kept & {tuple(map(tuple, r["pairs"])) for r in certain}


def test_tokens_stay_beside_their_completions():
  out, _ = pairs.records(draws(), "bradley_terry", 0)
  for record in out:
    assert list(map(BYTES.decode, record["tokens"])) == record["completions"]


def test_pairs_index_the_completions_that_were_kept():
  out, _ = pairs.records(draws(), "deterministic", 0)
  for record in out:
    texts = record["completions"]
    for winner, loser in record["pairs"]:
      assert REWARDS[texts[winner]] > REWARDS[texts[loser]]
  assert [len(record["pairs"]) for record in out] == [3, 5, 1]


def test_records_change_with_the_seed_and_with_nothing_else():
  first, _ = pairs.records(draws(), "bradley_terry", 0)
  again, _ = pairs.records(draws(), "bradley_terry", 0)
  assert first == again
  seeds = [pairs.records(draws(), "bradley_terry", s)[0] for s in range(20)]
  assert len({str(out) for out in seeds}) > 10


def test_the_comparisons_of_a_prompt_do_not_depend_on_other_prompts():
  for seed in range(20):
    out, _ = pairs.records(draws(), "bradley_terry", seed)
    backwards, _ = pairs.records(draws(5, 1, 0), "bradley_terry", seed)
    alone = [
      pairs.records(draws(n), "bradley_terry", seed)[0][0] for n in (0, 1, 5)
    ]
    assert out == alone == backwards[::-1]


def test_two_prompts_have_draws_of_their_own():
  """Equal rewards and texts, yet not the same comparisons."""
  group = [{**d, "reward": 0.0} for d in draws(1)]
  many = [{**d, "id": number} for number in range(20) for d in group]
  out, _ = pairs.records(many, "bradley_terry", 0)
  assert len(out) == 20
  assert len({str(record["pairs"]) for record in out}) > 10


@pytest.mark.parametrize("labels", ["bradley_terry", "deterministic"])
def test_the_records_load_back_as_they_were_written(tmp_path, labels):
  out, _ = pairs.records(draws(), labels, 0)
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in out))
  got = sources.load(str(path), "preference", sources.Policy("error"))
  assert [(r.prompt, r.completions, r.pairs, r.tokens) for r in got] == [
    (
      record["prompt"],
      tuple(record["completions"]),
      tuple(map(tuple, record["pairs"])),
      tuple(record["tokens"]),
    )
    for record in out
  ]
