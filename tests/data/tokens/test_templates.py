"""The ids of messages beside those of transformers' own chat templates."""

import pytest
import transformers

from dpo_jax.data.read import pairs, records, sources
from dpo_jax.data.tokens import chat, tokenize
from tests import templates
from tests.data.tokens import test_chat

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|call_end|>"]
HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + HEAD
# Tools, calls of them and reasoning; what is called ends in another token.
AGENT = (
  "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n"
  "{% endfor %}<|im_end|>\n{% endif %}"
  "{% for m in messages %}<|im_start|>{{ m.role }}\n"
  "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n"
  "{% endif %}{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}"
  "{% for c in m.tool_calls %}{{ c.function.name }}"
  "({{ c.function.arguments if c.function.arguments is string else "
  "c.function.arguments | tojson }}){% endfor %}"
  "{% if m.tool_calls %}<|call_end|>{% else %}<|im_end|>{% endif %}"
  "{{ '\n' }}{% endfor %}" + HEAD
)
# It loops over the parts of a content, and puts a "+" between them.
PARTS = CHATML.replace(
  "{{ m.content }}",
  "{% if m.content is string %}{{ m.content }}{% else %}"
  "{% for p in m.content %}{{ p.text }}+{% endfor %}{% endif %}",
)
TEMPLATES = {
  "chatml": CHATML,
  "a BOS in the template": "{{ bos_token }}" + CHATML,
  "the EOS as the end": CHATML.replace("<|im_end|>", "{{ eos_token }}"),
  "agent": AGENT,
  "parts": PARTS,
  # It writes all arguments as JSON, those that are the text of it too.
  "quotes": AGENT.replace(
    "c.function.arguments if c.function.arguments is string else ", ""
  ),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """name of a template -> (Tokenizer, the same of transformers).

  All have a BOS, which most templates never write.
  """
  out = {}
  for name, template in TEMPLATES.items():
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "the weather in Oslo is cold, and asked."
    templates.write(folder, template, size=290, marks=SPECIALS, text=text)
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    out[name] = tokenize.load(str(folder)), hf
  return out


def user(content):
  return {"role": "user", "content": content}


def said(content, **more):
  return {"role": "assistant", "content": content, **more}


TOOLS = [{"type": "function", "function": {"name": "weather", "default": None}}]
CALL = {"id": "1", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
SPELT = {"id": "1", "function": {"name": "w", "arguments": '{"city":  null}'}}
RESULT = {
  **{"role": "tool", "name": "w", "tool_call_id": "1"},
  "content": '{"t": -3}',
}
ASKED, COLD, WARM = user("Oslo?"), said("It is cold."), said("Warm.")
ROWS = {
  "turns": {
    "prompt": [ASKED, COLD, user("And Rome?")],
    **{"chosen": [WARM], "rejected": [said("No.")]},
  },
  "a system turn": {
    "prompt": [{"role": "system", "content": "Be brief."}, ASKED],
    **{"chosen": [WARM], "rejected": [COLD]},
  },
  "reasoning": {
    "prompt": [ASKED],
    "chosen": [said("Cold.", reasoning_content="It is north.")],
    "rejected": [said("Cold.", reasoning_content="I guess.")],
  },
  "calls": {
    "prompt": [ASKED],
    "chosen": [said("", tool_calls=[CALL])],
    "rejected": [said("", tool_calls=[SPELT])],
  },
  "calls and their results, with tools": {
    "prompt": [ASKED, said("", tool_calls=[SPELT]), RESULT],
    **{"chosen": [COLD], "rejected": [WARM], "tools": TOOLS},
  },
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_ids_are_those_of_the_tokenizers_own_template(loaded, template, row):
  """Up to the end of the turn; no white space behind it is scored."""
  tokenizer, hf = loaded[template]
  record = records.make(row, "preference", "my.jsonl:3")
  rendered = [
    hf.apply_chat_template(
      [*row["prompt"], *row[side]],
      tools=row.get("tools"),
      tokenize=True,
      return_dict=False,
    )
    for side in ("chosen", "rejected")
  ]
  if rendered[0] == rendered[1] or (
    template not in ("agent", "quotes") and "" in contents(row)
  ):
    policy = sources.Policy("skip")  # nothing of the reply is in the text
    with pytest.raises(ValueError, match="no usable record"):
      tokenize.encode([record], tokenizer, test_chat.OPTIONS, policy)
    return
  example, _ = test_chat.encode(record, tokenizer)
  (newline,) = tokenizer.encode(["\n"])
  for ids, want in zip(example.completions, rendered, strict=True):
    assert [*example.prompt, *ids, *newline] == want
    assert ids[-1] in {
      *tokenizer.encode(["".join(SPECIALS)])[0],
      hf.eos_token_id,
    }


def contents(row):
  return [m["content"] for side in ("chosen", "rejected") for m in row[side]]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_sampled_prompt_has_the_ids_of_the_template(loaded, template, row):
  tokenizer, hf = loaded[template]
  record = records.make(row, "prompt", "my.jsonl:3")
  prompt = chat.prompt(record, tokenizer.apply_template)
  ((_, ids),) = tokenize.prompts(
    [prompt], tokenizer, test_chat.OPTIONS, sources.Policy("error")
  )
  assert ids == hf.apply_chat_template(
    row["prompt"],
    tools=row.get("tools"),
    add_generation_prompt=True,
    tokenize=True,
    return_dict=False,
  )


def test_comparisons_of_samples_have_the_prompt_that_was_sampled_from(loaded):
  tokenizer, _ = loaded["chatml"]
  record = records.make(ROWS["turns"], "preference", "my.jsonl:3")
  text, _ = chat.prompt(record, tokenizer.apply_template)
  draws = [
    {
      **{"id": 0, "prompt": text, "bos": False, "completion": word},
      **{"tokens": tokenizer.encode([word])[0], "reward": reward},
    }
    for reward, word in enumerate((" cold", " warm"))
  ]
  (row,), _ = pairs.records(draws, "deterministic", seed=0)
  drawn = records.make(row, "preference", "pairs.jsonl:1")
  assert not drawn.remarks
  example, _ = test_chat.encode(drawn, tokenizer)
  assert example.prompt == test_chat.encode(record, tokenizer)[0].prompt
  again = records.make({"prompt": text, "bos": False}, "prompt", "f:1")
  assert chat.prompt(again, None) == (text, True)
  with_bos, _ = test_chat.encode(drawn._replace(bos=True), tokenizer)
  assert with_bos.prompt == [tokenizer.bos_id, *example.prompt]


def counted(loaded, template, row):
  record = records.make(row, "preference", "my.jsonl:3")
  return test_chat.encode(record, loaded[template][0])[1]


def test_what_a_template_does_not_read_is_counted_once(loaded):
  row = {
    **ROWS["calls and their results, with tools"],
    "chosen": [{**COLD, "weight": 1, "reasoning_content": "hm"}],
    "source": "mine",
  }
  always = {
    "column 'source' is not read": 1,
    "message key 'weight' is not read by the chat template": 1,
    "message key 'tool_call_id' is not read by the chat template": 1,
  }
  assert counted(loaded, "agent", row).items() >= always.items()
  assert len(counted(loaded, "agent", row)) == len(always)
  empty = {**ROWS["turns"], "chosen": [{**WARM, "tool_calls": []}]}
  assert not counted(loaded, "chatml", empty)
  plain = counted(loaded, "chatml", row)
  for what in (
    *("column 'tools'", "message key 'tool_calls'", "message key 'name'"),
    "message key 'reasoning_content'",
  ):
    assert plain[f"{what} is not read by the chat template"] == 1


def test_arguments_of_a_call_that_a_template_quotes_are_counted(loaded):
  """As transformers does it, and as nobody means it: OpenAI has them so."""
  word = "arguments of a call are JSON in a text"

  def quoted(arguments, template):
    call = {"function": {"name": "weather", "arguments": arguments}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    seen = counted(loaded, template, {**ROWS["turns"], "chosen": [reply]})
    return sum(n for x, n in seen.items() if x.startswith(word))

  assert quoted('{"city": "Oslo"}', "quotes") == 1
  assert quoted({"city": "Oslo"}, "quotes") == 0
  assert quoted('{"city": "Oslo"}', "agent") == 0


def test_a_turn_that_a_template_leaves_out_is_counted(loaded):
  tokenizer = loaded["chatml"][0]
  write = tokenizer.apply_template

  def template(messages, add_generation_prompt):
    messages = [m for m in messages if m["role"] != "system"]
    return write(messages, add_generation_prompt=add_generation_prompt)

  record = records.make(ROWS["a system turn"], "preference", "my.jsonl:3")
  changed = test_chat.encode(
    record, tokenizer._replace(apply_template=template)
  )
  assert (
    changed[1][
      "turn of the system that the chat template does not write as it is"
    ]
    == 1
  )


def test_a_rare_role_is_written_by_the_template_or_refused(loaded):
  tokenizer, hf = loaded["chatml"]
  row = {**ROWS["turns"], "prompt": [{"role": "developer", "content": "Be."}]}
  row["prompt"] += ROWS["turns"]["prompt"]
  record = records.make(row, "preference", "my.jsonl:3")
  example, changed = test_chat.encode(record, tokenizer)
  assert not changed
  whole = hf.apply_chat_template(
    [*row["prompt"], *row["chosen"]], tokenize=True, return_dict=False
  )
  (newline,) = tokenizer.encode(["\n"])
  assert [*example.prompt, *example.completions[0], *newline] == whole
  write = tokenizer.apply_template

  def template(messages, add_generation_prompt):
    messages = [m for m in messages if m["role"] != "developer"]
    return write(messages, add_generation_prompt=add_generation_prompt)

  with pytest.raises(ValueError, match="leaves out turns of the 'developer'"):
    test_chat.encode(record, tokenizer._replace(apply_template=template))


def test_parts_of_text_are_joined_unless_the_template_knows_them(loaded):
  parts = [{"type": "text", "text": word} for word in ("Os", "lo?")]
  row = {"prompt": [user(parts)], "chosen": [COLD], "rejected": [WARM]}
  record = records.make(row, "preference", "my.jsonl:3")
  for template, words in (("chatml", "Oslo?"), ("parts", "Os+lo?+")):
    tokenizer, _ = loaded[template]
    made = chat.render_record(record, tokenizer).record
    assert made.prompt.startswith(f"<|im_start|>user\n{words}<|im_end|>")
    joined = any("parts of text joined" in what for what in made.remarks)
    assert joined == (template == "chatml")


def test_a_template_for_tools_of_its_own_is_the_one_that_is_used(loaded):
  _, hf = loaded["chatml"]
  hf.chat_template = {"default": CHATML, "tool_use": AGENT}
  write = chat.template(hf)
  for tools, template in ((None, CHATML), (TOOLS, AGENT)):
    assert write([ASKED], add_generation_prompt=True, tools=tools) == (
      hf.apply_chat_template(
        [ASKED],
        tools=tools,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
      )
    )
