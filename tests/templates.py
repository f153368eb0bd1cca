"""Tokenizers with a chat template, trained on a sentence."""

import json

from dpo_jax.data.tokens import bpe

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")


def write(folder, template, *, size=280, marks=MARKS, text=None):
  """Writes a byte-level tokenizer with BOS and EOS; returns its folder.

  Args:
    folder: gets tokenizer.json and tokenizer_config.json.
    template: chat template, or None.
    size: of the vocabulary before the marks.
    marks: further special tokens.
    text: that its merges are of; None is a sentence about a plot.
  """
  bpe.train([text or "the plot is warm and clever."] * 3, size, folder)
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text())
  config["additional_special_tokens"] = list(marks)
  if template:
    config["chat_template"] = template
  path.write_text(json.dumps(config))
  return str(folder)
