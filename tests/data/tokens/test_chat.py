"""Messages to text by chat templates, and what training scores of them."""

import itertools
import json
import types

import pytest

from dpo_jax.data.read import fields, records, sources
from dpo_jax.data.tokens import bpe, chat, tokenize
from tests import templates

HEAD = "{% for m in messages %}"
CHATML = (
  HEAD + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
  # The end of turn is a token of its own, then a newline.
  "chatml": CHATML,
  # It is the EOS, and the text begins with a BOS.
  "eos": "{{ bos_token }}" + CHATML.replace("<|im_end|>", "{{ eos_token }}"),
  # A reply ends in the white space of the next turn only.
  "open": HEAD + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}",
  # White space around the content is taken away.
  "trim": CHATML.replace("m.content", "m.content | trim"),
}
USER = {"role": "user", "content": "How is the plot?"}
WARM = {"role": "assistant", "content": "Warm and clever."}
DULL = {"role": "assistant", "content": "Dull."}
RECORD = records.Record((USER,), ((WARM,), (DULL,)), ((0, 1),), "my.jsonl:3")
OPTIONS = types.SimpleNamespace(
  max_prompt_length=200, max_completion_length=200, long_prompt="error"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """name of a template -> Tokenizer; None has no template."""
  out = {}
  for name, template in {None: None, **TEMPLATES}.items():
    folder = tmp_path_factory.mktemp("tokenizer")
    out[name] = tokenize.load(templates.write(folder, template))
  return out


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, loaded):
  return loaded[request.param]


def encode(record, tokenizer, on_bad="error"):
  policy = sources.Policy(on_bad)
  examples, changed = tokenize.encode([record], tokenizer, OPTIONS, policy)
  return examples[0], changed


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(
  tmp_path,
):
  bpe.train(["the plot is warm and clever."] * 3, 280, tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text())
  template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
  path.write_text(json.dumps({**config, "chat_template": template}))
  render = tokenize.load(str(tmp_path)).apply_template
  text = render([USER], add_generation_prompt=True)
  assert text == f"26 Jul 2024 {USER['content']}"


def test_prompt_and_completion_are_the_text_of_the_whole_conversation(
  tokenizer,
):
  template = tokenizer.apply_template
  prompt, (completion,), _ = chat.render([USER], [[WARM]], template)
  assert prompt == template([USER], add_generation_prompt=True)
  assert prompt + completion == template(
    [USER, WARM], add_generation_prompt=False
  )
  assert completion.startswith(WARM["content"])


def test_the_ids_are_those_of_the_whole_conversation(tokenizer):
  """But for the end: no white space, and at least an EOS."""
  example, _ = encode(RECORD, tokenizer)
  ends = (tokenizer.eos_id, *tokenizer.encode(["<|im_end|>"])[0])
  for ids, reply in zip(example.completions, (WARM, DULL), strict=True):
    text = tokenizer.apply_template([USER, reply], add_generation_prompt=False)
    want = tokenizer.encode([text.rstrip()])[0]
    if want[-1] not in ends:
      want.append(tokenizer.eos_id)
    assert example.prompt + ids == want


def test_a_bos_that_the_template_writes_is_there_once_and_no_other(loaded):
  for name, tokenizer in loaded.items():
    if name is not None:
      example, _ = encode(RECORD, tokenizer)
      assert (example.prompt[0] == tokenizer.bos_id) == (name == "eos")
      for ids in (example.prompt[1:], *example.completions):
        assert tokenizer.bos_id not in ids


def ends(loaded, name):
  """(Tokenizer, last id of each completion, what was counted)."""
  example, changed = encode(RECORD, loaded[name])
  return loaded[name], [ids[-1] for ids in example.completions], changed


def test_an_end_of_turn_that_is_the_eos_is_not_doubled(loaded):
  tokenizer, last, changed = ends(loaded, "eos")
  assert last == [tokenizer.eos_id] * 2
  example, _ = encode(RECORD, tokenizer)
  for ids in example.completions:
    assert ids.count(tokenizer.eos_id) == 1
  assert not changed


@pytest.mark.parametrize("name", ["chatml", "trim"])
def test_another_end_of_turn_is_scored_and_no_eos_follows(loaded, name):
  tokenizer, last, changed = ends(loaded, name)
  assert last == tokenizer.encode(["<|im_end|>"])[0] * 2
  assert tokenizer.eos_id not in last
  assert set(last) <= set(tokenizer.end_ids)  # a sample stops there too
  assert not changed


def test_a_template_that_writes_replies_in_other_words_tells_no_end(loaded):
  def template(messages, *, add_generation_prompt):
    return "".join(f"<|bos|>{m['content']}\n".upper() for m in messages)

  some = loaded["chatml"]
  assert chat.end_ids(template, some.encode, some.specials) == ()


@pytest.mark.parametrize(
  ("end", "want"),
  [
    ("", []),
    ("\n", []),
    ("<|im_end|>\n", ["<|im_end|>"]),
    ("<|im_end|>\n<|eos|>", ["<|im_end|>"]),  # as Phi-3's last turn
    ("[END]\n", []),  # several tokens, which any text may hold
    (".\n", []),  # and one that any text may hold
  ],
)
def test_the_end_of_a_turn_ends_a_text_if_it_is_a_token(end, want, loaded):
  def template(messages, *, add_generation_prompt):
    head = "assistant: " if add_generation_prompt else ""
    return "".join(f"{m['role']}: {m['content']}{end}" for m in messages) + head

  some = loaded["chatml"]
  ids = chat.end_ids(template, some.encode, some.specials)
  assert [some.specials[i] for i in ids] == want


def test_an_end_of_turn_that_is_the_eos_is_the_only_end(loaded):
  for name in (None, "eos", "open"):
    assert loaded[name].end_ids == (loaded[name].eos_id,)
  tokenizer = loaded["chatml"]
  eos, end = tokenizer.end_ids
  assert (eos, tokenizer.specials[end]) == (tokenizer.eos_id, "<|im_end|>")


@pytest.mark.parametrize("more", ["", "<|eos|>", "<|im_end|>"])
def test_text_that_a_template_wrote_keeps_its_end_and_gets_no_eos(loaded, more):
  tokenizer = loaded["chatml"]
  prompt = tokenizer.apply_template([USER], add_generation_prompt=True)
  texts = tuple(f"{x['content']}<|im_end|>{more}" for x in (WARM, DULL))
  text = records.Record(prompt, texts, ((0, 1),), "my.jsonl:3", bos=False)
  asked, changed = encode(text, tokenizer)
  want, _ = encode(RECORD, tokenizer)
  assert asked == want
  assert asked.ended == (True, True)
  assert not changed


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|eos|>"])
def test_nothing_stands_behind_the_end_of_a_reply(loaded, mark):
  """No sample reaches it, be the end the EOS or that of the template."""
  reply = {**WARM, "content": f"Warm.{mark} And more."}
  record = RECORD._replace(completions=((reply,), (DULL,)))
  with pytest.raises(ValueError, match="completion 0 contains the"):
    encode(record, loaded["chatml"])


def test_a_whole_text_may_hold_turns_that_end(loaded):
  tokenizer = loaded["chatml"]
  talk = [USER, DULL, USER, WARM]
  text = tokenizer.apply_template(talk, add_generation_prompt=False).rstrip()
  example, _ = encode(records.Record("", (text,), (), "f:1"), tokenizer)
  assert example.completions[0] == tokenizer.encode([text])[0]


def test_of_two_ends_the_first_ends_a_reply(loaded):
  """As in Phi-3's template: no sample gets to the EOS behind its "<|end|>"."""
  tokenizer = loaded["chatml"]
  write = tokenizer.apply_template

  def template(messages, add_generation_prompt):
    text = write(messages, add_generation_prompt=add_generation_prompt)
    return text if add_generation_prompt else f"{text}<|eos|>"

  example, changed = encode(RECORD, tokenizer._replace(apply_template=template))
  assert example == encode(RECORD, tokenizer)[0]
  assert not changed


def test_a_reply_of_which_the_template_writes_only_its_head_is_refused(loaded):
  """It writes the head of a thought in front of every reply, and no calls."""

  def template(messages, add_generation_prompt):
    text = loaded["chatml"].apply_template(
      messages, add_generation_prompt=add_generation_prompt
    )
    head, reply, rest = text.rpartition("assistant\n")
    return text if add_generation_prompt else f"{head}{reply}<think>{rest}"

  call = {"role": "assistant", "content": "", "tool_calls": [{"name": "w"}]}
  record = RECORD._replace(completions=((call,), (DULL,)))
  with pytest.raises(ValueError, match=r"nothing of the reply.*'tool_calls'"):
    encode(record, loaded["chatml"]._replace(apply_template=template))


def test_without_an_end_of_turn_one_eos_is_added(loaded):
  tokenizer, last, changed = ends(loaded, "open")
  assert last == [tokenizer.eos_id] * 2
  assert not changed


def test_a_reply_that_the_template_leaves_open_ends_in_one_eos(loaded):
  """The template closes turns as a rule, but not this one."""

  def template(messages, add_generation_prompt):
    text = loaded["chatml"].apply_template(
      messages, add_generation_prompt=add_generation_prompt
    )
    return text.replace("Warm and clever.<|im_end|>\n", "Warm and clever.")

  tokenizer = loaded["chatml"]._replace(apply_template=template)
  example, _ = encode(RECORD._replace(pairs=()), tokenizer)
  (end,) = tokenizer.encode(["<|im_end|>"])[0]
  assert example.completions[0][-1] == tokenizer.eos_id
  assert end not in example.completions[0]


def test_a_template_may_trim_the_content(loaded):
  spaced = {**WARM, "content": " Warm and clever. \n"}
  tokenizer = loaded["trim"]
  got, _ = encode(RECORD._replace(completions=((spaced,), (DULL,))), tokenizer)
  assert got == encode(RECORD, tokenizer)[0]


def test_replies_that_a_template_makes_equal_are_refused_or_skipped(loaded):
  spaced = {**WARM, "content": WARM["content"] + " "}
  record = RECORD._replace(completions=((WARM,), (spaced,)))
  with pytest.raises(ValueError, match=r"my\.jsonl:3: completions 0 and 1"):
    encode(record, loaded["trim"])


def test_messages_without_a_template_are_an_error_even_when_skipping(loaded):
  for tokenizer in (loaded[None], tokenize.load("bytes")):
    assert tokenizer.apply_template is None
    with pytest.raises(ValueError, match="a chat template") as caught:
      encode(RECORD, tokenizer, "skip")
    assert "my.jsonl:3" in str(caught.value)


def test_text_needs_no_template_and_gets_none(loaded):
  text = records.Record("p", ("a", "b"), ((0, 1),), "my.jsonl:3")
  plain, _ = encode(text, loaded[None])
  for name in TEMPLATES:
    assert encode(text, loaded[name])[0] == plain


def test_a_completion_that_is_cut_has_no_end_of_turn(loaded):
  tokenizer = loaded["chatml"]
  example, _ = encode(RECORD, tokenizer)
  size = len(example.completions[0]) - 1
  options = types.SimpleNamespace(
    **{**vars(OPTIONS), "max_completion_length": size}
  )
  policy = sources.Policy("error")
  (cut,), changed = tokenize.encode([RECORD], tokenizer, options, policy)
  assert cut.completions[0] == example.completions[0][:-1]
  assert changed["completion cut"] == 1


def strict(messages, add_generation_prompt):
  """A template that wants turns to alternate."""
  roles = [m["role"] for m in messages]
  if any(a == b for a, b in itertools.pairwise(roles)):
    raise TypeError("roles must alternate")
  text = "".join(f"[{m['role']}] {m['content']} [end]" for m in messages)
  return text + "[assistant] " * add_generation_prompt


def rewriting(messages, add_generation_prompt):
  """A template that writes how many messages there are."""
  del add_generation_prompt
  return f"{len(messages)} messages: " + " ".join(
    m["content"] for m in messages
  )


def silent(messages, add_generation_prompt):
  """A template that leaves replies out."""
  del add_generation_prompt
  return "".join(m["content"] for m in messages if m["role"] == "user")


@pytest.mark.parametrize(
  ("template", "words"),
  [
    (strict, "refuses the messages: roles must alternate"),
    (rewriting, "writes the prompt in another way"),
    (silent, "writes nothing for the reply"),
  ],
)
def test_what_a_template_cannot_render_is_a_bad_record(loaded, template, words):
  tokenizer = loaded["chatml"]._replace(apply_template=template)
  with pytest.raises(fields.BadRecord, match=words) as caught:
    chat.render_record(RECORD._replace(prompt=(USER, USER)), tokenizer)
  assert caught.value.reason == "template"


def test_a_record_that_the_template_refuses_can_be_skipped(loaded):
  tokenizer = loaded["chatml"]._replace(apply_template=strict)
  bad = RECORD._replace(prompt=(USER, USER), origin="my.jsonl:4")
  policy = sources.Policy("skip")
  items = [RECORD, bad, RECORD]
  examples, _ = tokenize.encode(items, tokenizer, OPTIONS, policy)
  assert [e.example_id for e in examples] == [0, 2]
  assert policy.skipped == {"template": 1}
  with pytest.raises(ValueError, match=r"my\.jsonl:4: the chat template"):
    tokenize.encode(items, tokenizer, OPTIONS, sources.Policy("error"))


def without_jinja2(messages, add_generation_prompt):
  del messages, add_generation_prompt
  raise ImportError("apply_chat_template requires jinja2")


def test_without_jinja2_the_error_says_how_to_install_it(loaded):
  tokenizer = loaded["chatml"]._replace(apply_template=without_jinja2)
  with pytest.raises(ValueError, match="pip install jinja2"):
    encode(RECORD, tokenizer, "skip")


def test_a_head_that_only_sampled_replies_get_is_left_out(loaded):
  tokenizer = thinking(loaded, "<think>\n")
  example, changed = encode(RECORD, tokenizer)
  plain, _ = encode(RECORD, loaded["chatml"])
  assert example == plain
  (remark,) = (what for what in changed if "trained without" in what)
  assert "'<think>\\n'" in remark
  text, _ = chat.prompt(RECORD, tokenizer.apply_template)
  assert text.endswith("<|im_start|>assistant\n<think>\n")


def thinking(loaded, head):
  """A Tokenizer whose template begins sampled replies with something else."""
  write = loaded["chatml"].apply_template

  def template(messages, add_generation_prompt):
    text = write(messages, add_generation_prompt=add_generation_prompt)
    return text + head * add_generation_prompt

  return loaded["chatml"]._replace(apply_template=template)


def test_a_pair_of_which_one_reply_begins_so_has_one_prompt(loaded):
  thought = {**WARM, "content": "<think>\nHm.</think>Warm."}
  record = RECORD._replace(completions=((thought,), (DULL,)))
  tokenizer = thinking(loaded, "<think>\n")
  example, _ = encode(record, tokenizer)
  assert example == encode(record, loaded["chatml"])[0]
  alone = record._replace(completions=((thought,),), pairs=())
  example, changed = encode(alone, tokenizer)
  assert tokenizer.decode(example.prompt).endswith("<think>\n")
  assert not any("trained without" in what for what in changed)


def test_what_prompt_and_reply_share_ends_where_a_token_does(loaded):
  """The replies begin like "<|im_start|>think", but with another token."""
  tokenizer = thinking(loaded, "<|im_start|>think")
  other = {**WARM, "content": "<|im_end|> is an end."}
  record = RECORD._replace(completions=((other,), (DULL,)))
  rendered = chat.render_record(record, tokenizer).record
  assert rendered.prompt.endswith("<|im_start|>assistant\n")


def test_a_head_in_front_of_the_last_message_is_refused_with_its_place(loaded):
  """A reply would be scored with part of what was asked."""
  write = loaded["chatml"].apply_template

  def template(messages, add_generation_prompt):
    text = write(messages, add_generation_prompt=add_generation_prompt)
    return text.replace("user", "asks") if add_generation_prompt else text

  tokenizer = loaded["chatml"]._replace(apply_template=template)
  with pytest.raises(ValueError, match=r"my\.jsonl:3: .*another way") as caught:
    encode(RECORD, tokenizer)
  assert "'asks" in str(caught.value)
  assert "give prompt and completions as text" in str(caught.value)


TURNS = [
  {"role": "system", "content": "You are a critic."},
  USER,
  {"role": "assistant", "content": "Slow, then moving."},
  {"role": "user", "content": "And the cast?"},
]
# name: (form, row) of a conversation with a system turn and several others.
FORMS = {
  "whole conversations": (
    "preference",
    {"chosen": [*TURNS, WARM], "rejected": [*TURNS, DULL]},
  ),
  "and a prompt as text": (
    "preference",
    {
      "prompt": "And the cast?",
      "chosen": [*TURNS, WARM],
      "rejected": [*TURNS, DULL],
    },
  ),
  "prompt": (
    "preference",
    {"prompt": TURNS, "chosen": [WARM], "rejected": [DULL]},
  ),
  "completions": (
    "preference",
    {"prompt": TURNS, "completions": [[WARM], [DULL]], "pairs": [[0, 1]]},
  ),
  "messages": ("sft", {"messages": [*TURNS, WARM]}),
  "completion": ("sft", {"prompt": TURNS, "completion": [WARM]}),
  "a whole completion": ("sft", {"completion": [*TURNS, WARM]}),
  "first of a pair": ("sft", {"chosen": [*TURNS, WARM], "rejected": TURNS}),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_but_the_last_turn_is_the_prompt_whatever_the_form(tokenizer, form):
  name, row = FORMS[form]
  record = records.make(row, name, "my.jsonl:3")
  assert record.prompt == tuple(TURNS)
  example, _ = encode(record, tokenizer)
  text = tokenizer.apply_template(TURNS, add_generation_prompt=True)
  assert example.prompt == tokenizer.encode([text])[0]
  for ids, reply in zip(example.completions, (WARM, DULL), strict=False):
    assert tokenizer.decode(ids).strip() == reply["content"]
  assert len(example.completions) == (1 if name == "sft" else 2)


def test_every_message_and_head_of_a_turn_is_in_the_prompt(loaded):
  record = records.make(FORMS["messages"][1], "sft", "my.jsonl:3")
  made = chat.render_record(record, loaded["chatml"])
  assert made.record.prompt == (
    "<|im_start|>system\nYou are a critic.<|im_end|>\n"
    "<|im_start|>user\nHow is the plot?<|im_end|>\n"
    "<|im_start|>assistant\nSlow, then moving.<|im_end|>\n"
    "<|im_start|>user\nAnd the cast?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert made.record.completions == ("Warm and clever.<|im_end|>",)


def test_the_prompt_of_a_preference_is_also_what_is_sampled_from(tokenizer):
  for name, row in FORMS.values():
    record = records.make(row, "prompt", "my.jsonl:3")
    assert record.prompt == tuple(TURNS), name
    prompt = chat.prompt(record, tokenizer.apply_template)
    text = tokenizer.apply_template(TURNS, add_generation_prompt=True)
    assert prompt == (text, True)
    pair = records.make(row, name, "my.jsonl:3")
    ((_, ids),) = tokenize.prompts(
      [prompt], tokenizer, OPTIONS, sources.Policy("error")
    )
    assert ids == encode(pair, tokenizer)[0].prompt


def test_conversations_that_part_before_the_last_turn_are_refused():
  other = [*TURNS[:2], {"role": "assistant", "content": "Fine."}, TURNS[3]]
  row = {"chosen": [*TURNS, WARM], "rejected": [*other, DULL]}
  with pytest.raises(fields.BadRecord) as caught:
    records.make(row, "preference", "my.jsonl:3")
  assert caught.value.reason == "different prompts"
