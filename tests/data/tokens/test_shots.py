"""Prompts in a template and behind examples: what stands where, and which."""

import re

import pytest

from dpo_jax.data.read import records
from dpo_jax.data.tokens import shots

FIELD = "sample.template"


def example(prompt, completion, **more):
  return records.Record(prompt, (completion,), (), f"here:{prompt}", **more)


PAIRS = [example(f"Q{n}?", f" A{n}.") for n in range(6)]


@pytest.mark.parametrize(
  ("template", "count", "want"),
  [
    ("{prompt}", 0, "Why?"),
    ("{prompt}", 2, "Q0? A0.Q1? A1.Why?"),
    ("{prompt}\nTL;DR:", 0, "Why?\nTL;DR:"),
    ("{prompt}\nTL;DR:", 1, "Q0?\nTL;DR: A0.Why?\nTL;DR:"),
    ("Be kind.{shots}\n{prompt}", 0, "Be kind.\nWhy?"),
    ("Be kind.{shots}\n{prompt}", 1, "Be kind.\nQ0? A0.\nWhy?"),
    # The model writes the space of its answer, and what ends an example.
    ("{prompt} ={completion}\n", 1, "Q0? = A0.\nWhy? ="),
    ("{prompt}: {completion}\n\n", 0, "Why?:"),
    ("H:{shots}[{prompt}:  {completion}]", 1, "H:[Q0?:   A0.][Why?:"),
  ],
)
def test_examples_and_prompt_have_one_form(template, count, want):
  form = shots.template(template, FIELD)
  assert shots.text(form, "Why?", PAIRS[:count]) == want


def test_marks_in_a_prompt_are_text():
  form = shots.template("{shots}<{prompt}>", FIELD)
  asked = shots.text(form, "{shots} {prompt} {completion} {0}", PAIRS[:1])
  assert asked == "<Q0?> A0.<{shots} {prompt} {completion} {0}>"


@pytest.mark.parametrize(
  "template",
  [
    "no mark",
    "{prompt}{prompt}",
    "{completion}{prompt}",
    "{prompt}{shots}",
    "{prompt}{completion}{completion}",
    "{shots}{shots}{prompt}",
  ],
)
def test_marks_out_of_place_are_refused(template):
  with pytest.raises(ValueError, match=re.escape(f"{FIELD} = {template!r}")):
    shots.template(template, FIELD)


def test_examples_are_distinct_and_drawn_by_the_seed():
  twice = [*PAIRS, *PAIRS, example("Q3? ", " Other.")]
  drawn = {seed: shots.pool(twice, seed) for seed in range(8)}
  for pool in drawn.values():
    assert sorted(pool) == sorted(PAIRS)  # the first of each prompt
  assert shots.pool(twice, 3) == drawn[3]
  assert len({tuple(r.prompt for r in pool) for pool in drawn.values()}) > 4


@pytest.mark.parametrize("own", ["Q1?", " Q1?\n", "Q1? A1.", "Q1", "Q1? A"])
def test_no_example_gives_the_answer_away(own):
  """One of the same prompt, or whose text the prompt is the beginning of."""
  assert shots.chosen(PAIRS, own, 2) == [PAIRS[0], PAIRS[2]]
  assert shots.chosen(PAIRS, "Q9?", 2) == PAIRS[:2]


def test_too_few_examples_are_refused():
  assert len(shots.chosen(PAIRS, "Q1?", 5)) == 5
  message = r"sample\.shots = 6: sample\.shots_from has 5 examples .*'Q1\?'"
  with pytest.raises(ValueError, match=message):
    shots.chosen(PAIRS, "Q1?", 6)


def test_a_text_without_a_prompt_is_no_example():
  with pytest.raises(ValueError, match="needs a prompt beside its completion"):
    shots.pool([*PAIRS, example("", "All of it.")], 0)


def said(role, content):
  return {"role": role, "content": content}


ASKED = (said("user", "Why?"),)
TALK = example(
  (said("user", "Hi"), said("assistant", "Yes?"), said("user", "How?")),
  (said("assistant", "So."),),
)


def test_examples_of_messages_are_earlier_turns_behind_the_system_turn():
  system = said("system", "Be kind.")
  record = records.Record((system, *ASKED), (), (), "here")
  whole = shots.conversation(record, [TALK])
  turns = (*TALK.prompt, *TALK.completions[0])
  assert whole.prompt == (system, *turns, *ASKED)
  bare = record._replace(prompt=ASKED)
  assert shots.conversation(bare, [TALK, TALK]).prompt == 2 * turns + ASKED
  assert shots.conversation(bare, []) == bare


def test_no_example_of_messages_gives_the_answer_away():
  other = example(ASKED, (said("assistant", "Because."),))
  pool = shots.pool([TALK, other], 0)
  for number in (1, 3):
    assert shots.chosen(pool, TALK.prompt[:number], 1) == [other]
  assert shots.chosen(pool, ASKED, 1) == [TALK]
  assert shots.chosen(pool, (said("user", "What?"),), 2) == pool


@pytest.mark.parametrize(
  ("role", "tools"), [("system", None), ("user", ({"name": "f"},))]
)
def test_a_conversation_of_its_own_terms_is_no_example(role, tools):
  talk = TALK._replace(prompt=(said(role, "x"), *TALK.prompt), tools=tools)
  with pytest.raises(ValueError, match="system turn or tools of its own"):
    shots.pool([talk], 0)


@pytest.mark.parametrize(("pool", "prompt"), [(PAIRS, ASKED), ([TALK], "Why?")])
def test_text_and_messages_do_not_mix(pool, prompt):
  with pytest.raises(
    ValueError, match=r"give sample\.shots_from and .*prompts"
  ):
    shots.chosen(pool, prompt, 1)
