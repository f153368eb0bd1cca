"""What is compared in an example: pairs, rankings, labels, mismatches."""

import json

import numpy as np
import pytest

from configs import base
from dpo_jax.data.read import records, sources
from dpo_jax.data.tokens import comparisons, tokenize
from tests import worlds

TWO = comparisons.Example(
  0, 0, [1], ([2, 3], [4]), ((0, 1, 1.0),), ended=(True, False), origin="a:1"
)
FOUR = comparisons.Example(
  1,
  0,
  [5],
  ([6], [7], [8], [9]),
  tuple((w, l, 1.0) for w in range(4) for l in range(w + 1, 4)),
  ranking=(2, 0, 3, 1),
  scores=(3.0, 1.0, 4.0, 2.0),
  origin="a:2",
)
LABELLED = comparisons.Example(
  2, 0, [9], ([1],), (), labels=(1.0,), ended=(True,), origin="a:3"
)


def test_pairs_stay_as_they_are():
  assert worlds.arranged([TWO, FOUR], "pairs") == [
    TWO,
    FOUR._replace(scores=None),
  ]


def test_a_ranking_is_one_comparison_and_a_pair_is_a_ranking_of_two():
  two, four = worlds.arranged([TWO, FOUR], "rankings")
  assert two.pairs == ((0, 1, 1.0),)
  assert four.pairs == ((2, 0, 3, 1, 1.0),)
  batch = worlds.batch([two, four])
  assert batch["pairs"].shape[-1] == 4
  nothing = batch["completion_weights"][0].size
  (short,) = [p for p in batch["pairs"][0].tolist() if nothing in p[2:3]][:1]
  assert short[2:] == [nothing, nothing]


def test_a_pair_is_a_desirable_and_an_undesirable_completion():
  two, one = worlds.arranged([TWO, LABELLED], "labels")
  assert two.pairs == ((0, 1.0), (1, 1.0))
  assert two.labels == (1.0, 0.0)
  assert one.pairs == ((0, 1.0),)
  batch = worlds.batch([two, one])
  assert batch["labels"].sum() == 2
  assert batch["weights"].sum() == 3


def test_a_mismatched_completion_is_of_the_next_other_prompt():
  same = TWO._replace(example_id=5)
  items = [TWO, same, LABELLED]
  first, second, third = worlds.arranged(items, "mismatched")
  # The two of one prompt both take the third's; the third wraps around.
  assert first.completions == (*TWO.completions, [1])
  assert second.completions[-1] == [1]
  assert third.completions == ([1], [2, 3])
  assert first.pairs == ((0, 2, 1.0), (1, 2, 1.0))
  assert third.pairs == ((0, 1, 1.0),)
  assert third.labels == (1.0,)
  assert first.ended == (True, False, True)
  # The other's completion is scored, but no label is of it.
  assert worlds.batch([first])["labels"].tolist() == [[1.0, 0.0]]


def test_mismatches_do_not_depend_on_batches():
  """They are fixed with the data, so a cached reference serves them."""
  items = worlds.examples(12, seed=1)
  once = worlds.arranged(items, "mismatched")
  again = worlds.arranged(items, "mismatched")
  assert once == again
  assert all(e.completions[-1] != e.completions[0] for e in once)


def test_as_many_chosen_as_rejected_completions_are_mismatched():
  """Or KTO's reference point would be that of chosen ones alone."""
  items = worlds.examples(12, seed=1)
  taken = [
    items[(n + 1) % 12].completions.index(e.completions[-1])
    for n, e in enumerate(worlds.arranged(items, "mismatched"))
  ]
  assert taken == [0, 1] * 6


def test_one_prompt_alone_has_no_mismatch():
  with pytest.raises(ValueError, match=r"these: KTO compares .* same one"):
    worlds.arranged([TWO, TWO._replace(example_id=1)], "mismatched")


@pytest.mark.parametrize(
  ("label", "good"), [(1, 1), (True, 1), (-1, 0), (0, 0)]
)
def test_labels_are_of_two_values(label, good):
  item = LABELLED._replace(labels=(label,))
  (got,) = worlds.arranged([item], "labels")
  assert got.labels == (float(good),)


def test_a_graded_label_is_refused():
  with pytest.raises(ValueError, match=r"a:3: label 4.0 must be true or false"):
    worlds.arranged([LABELLED._replace(labels=(4.0,))], "labels")


def test_a_loss_of_scores_refuses_what_it_cannot_use():
  good = TWO._replace(scores=(2.0, 1.0))
  assert worlds.arranged([good], "pairs", with_scores=True) == [good]
  for item, words in (
    (TWO._replace(scores=(1.0, 2.0)), "won with the score 1.0 against 2.0"),
    (TWO, "needs 'scores'"),
  ):
    with pytest.raises(ValueError, match=words):
      worlds.arranged([item], "pairs", with_scores=True)


def test_the_mismatch_of_a_run_of_equal_prompts_is_the_next_other_one():
  prompts = [[1], [1], [2], [2], [2], [3], [1], [1]]
  items = [
    TWO._replace(prompt=prompt, completions=([number], [number]))
    for number, prompt in enumerate(prompts)
  ]
  taken = [e.completions[-1][0] for e in worlds.arranged(items, "mismatched")]
  # The last two have the prompt of the first two, and wrap around to the third.
  assert taken == [2, 2, 5, 5, 5, 6, 2, 2]


def read(tmp_path, rows, form):
  path = tmp_path / "my.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return sources.load(str(path), form, sources.Policy("error"))


def test_rows_bring_scores_rankings_and_labels(tmp_path):
  two = {"prompt": "p", "chosen": "a", "rejected": "b"}
  (record,) = read(
    tmp_path, [{**two, "score_chosen": 2, "score_rejected": 0.5}], "preference"
  )
  assert record.scores == (2.0, 0.5)
  many = {"prompt": "p", "completions": ["a", "b", "c"]}
  (record,) = read(
    tmp_path,
    [{**many, "ranking": [2, 0, 1], "scores": [1, 0, 3]}],
    "preference",
  )
  assert record.ranking == (2, 0, 1)
  assert record.pairs == ((2, 0), (2, 1), (0, 1))
  assert record.scores == (1.0, 0.0, 3.0)
  both = [two, {"prompt": "p", "completion": "a", "label": True}]
  pair, single = read(tmp_path, both, "feedback")
  assert pair.pairs == ((0, 1),)
  assert single.labels == (1.0,)


def test_a_probability_is_a_soft_label_that_counts_both_ways_round(tmp_path):
  two = {"prompt": "p", "chosen": "a", "rejected": "b"}
  many = {"prompt": "p", "completions": ["a", "b", "c"]}
  rows = [
    *({**two, "probability": p} for p in (0.75, 1, 0, True)),
    two,
    {**many, "pairs": [[2, 0], [0, 1]], "probabilities": [0.5, 1]},
  ]
  path = tmp_path / "my.csv"
  path.write_text("prompt,chosen,rejected,probability\np,a,b,0.75\np,a,b,\n")
  known = read(tmp_path, rows, "preference")
  policy = sources.Policy("error")
  known += sources.load(str(path), "preference", policy)
  examples, changed = tokenize.encode(
    known, tokenize.load("bytes"), base.get_config().data, policy
  )
  sure, turned = ((0, 1, 1.0),), ((1, 0, 1.0),)
  soft = ((0, 1, 0.75), (1, 0, 0.25))
  assert [e.pairs for e in examples] == [
    *(soft, sure, turned, sure, sure),
    ((2, 0, 0.5), (0, 2, 0.5), (0, 1, 1.0)),
    *(soft, sure),
  ]
  named = "comparison with a soft label, the probability that it is right"
  assert changed[named] == 6
  # Of labels each completion is desirable by P.
  (one,) = worlds.arranged([examples[0]], "labels")
  assert one.pairs == ((0, 0.75), (1, 0.75), (1, 0.25), (0, 0.25))
  assert one.labels == (1.0, 0.0, 1.0, 0.0)
  assert worlds.arranged([examples[0]], "rankings")[0].pairs == soft
  for form in ("sft", "completions"):
    (record,) = read(tmp_path, rows[:1], form)
    assert record.probabilities is None
  with pytest.raises(ValueError, match="a soft label"):
    worlds.arranged([examples[0]._replace(scores=(2.0, 1.0))], "pairs", True)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"probability": 1.5}, "'probability' must be from 0 to 1, not 1.5"),
    ({"probability": float("nan")}, "must be finite"),
    ({"probability": "0.5"}, "must be a number"),
    ({"completions": 2, "probabilities": [0.5, 1]}, "2 numbers for 1 'pairs'"),
    ({"completions": 2, "probabilities": [-0.5]}, "must be from 0 to 1"),
  ],
)
def test_what_is_no_probability_is_refused(change, words):
  row = {"prompt": "p", "chosen": "a", "rejected": "b"}
  if "completions" in change:
    row, change = {"prompt": "p", "pairs": [[0, 1]]}, dict(change)
    change["completions"] = ["a", "b"]
  with pytest.raises(ValueError, match=words):
    records.make({**row, **change}, "preference", "my.jsonl:1")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"ranking": [0, 1]}, "must name each of the 3 completions once"),
    ({"ranking": [0, 0, 1]}, "must name each"),
    ({"ranking": ["0", 1, 2]}, "must name each"),
    ({"ranking": 3}, "must be list"),
    ({"pairs": [[0, 1]], "scores": [1]}, "has 1 numbers for 3 completions"),
    ({"pairs": [[0, 1]], "scores": [1, 2, "x"]}, "must be a number"),
    ({"pairs": [[0, 1]], "scores": [1, 2, float("inf")]}, "must be finite"),
  ],
)
def test_wrong_rankings_and_scores_are_refused(change, words):
  row = {"prompt": "p", "completions": ["a", "b", "c"], **change}
  with pytest.raises(ValueError, match=words):
    records.make(row, "preference", "my.jsonl:1")


def test_labels_are_not_for_a_loss_of_pairs():
  row = {"prompt": "p", "completion": "a", "label": True}
  with pytest.raises(ValueError, match="choose one of labels"):
    records.make(row, "preference", "my.jsonl:1")
  assert records.make(row, "feedback", "my.jsonl:1").labels == (1.0,)


def test_a_half_scored_pair_is_refused():
  row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1}
  with pytest.raises(ValueError, match="'score_rejected' is missing"):
    records.make(row, "preference", "my.jsonl:1")


def test_completions_that_were_cut_have_no_end():
  options = base.get_config().data
  options.max_completion_length = 4
  record = records.Record("p", ("ab", "abcdefg"), ((0, 1),), "a:1")
  examples, _ = tokenize.encode(
    [record], tokenize.load("bytes"), options, sources.Policy("error")
  )
  assert examples[0].ended == (True, False)
  ended = worlds.batch(examples)["ended"]
  np.testing.assert_array_equal(ended, [[[1.0, 0.0]]])
