"""Scorers that transformers and torch compute: classifiers, reward models."""

import collections
import math

import numpy as np
from scipy import special

from dpo_jax.data.tokens import chat, vocabulary
from dpo_jax.eval.scorers import texts as texts_lib


def classifier(name):
  """The log-odds of the last label of a Hugging Face classifier."""
  return _hugging_face(name, _log_odds)


def probability(name):
  """p(last label) of a Hugging Face classifier, in [0, 1]."""
  return _hugging_face(name, lambda logits: special.expit(_log_odds(logits)))


def model(name):
  """The output of a Hugging Face reward model with one label."""
  return _hugging_face(name, _only_logit)


def _hugging_face(name, logits_to_score):
  """A sequence classifier of the hub, or of a local folder.

  Texts of the same length make a batch, so nothing is padded: what a text gets
  does not depend on others, nor on whether the model knows a token to pad with.
  """
  try:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=False
    )
    # In f32: what bf16 rounds depends on how many texts are scored at once.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
      name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    ).eval()
  except Exception as error:  # the hub, a damaged file, no torch: anything
    raise ValueError(
      f"scorer {name}: cannot be loaded ({vocabulary.why(error)}). It needs "
      "torch, and the hub's name of a sequence classifier or its local folder, "
      "with safetensors and without code of its own"
    ) from error
  limit = _longest(tokenizer, model)
  # Without a padding token causal models refuse more texts than one.
  pad = model.config.get_text_config().pad_token_id
  size = 1 if pad is None else 32

  def score(prompts, completions):
    texts = texts_lib.joined(prompts, completions)
    encoded = [_encoded(tokenizer, text) for text in texts]
    lengths = collections.defaultdict(list)
    for i, inputs in enumerate(encoded):
      lengths[len(inputs["input_ids"])].append(i)
    _refuse_long(name, {n: len(same) for n, same in lengths.items()}, limit)
    out = np.zeros(len(texts))
    for same in lengths.values():
      for start in range(0, len(same), size):
        rows = same[start : start + size]
        inputs = {
          key: torch.tensor([encoded[i][key] for i in rows])
          for key in encoded[rows[0]]
        }
        with torch.no_grad():
          logits = model(**inputs).logits.double().numpy()
        out[rows] = logits_to_score(logits)
    return out

  def check(prompts):
    encoded = (_encoded(tokenizer, text)["input_ids"] for text in prompts)
    _refuse_long(name, collections.Counter(map(len, encoded)), limit)

  score.check = check
  score.template = tokenizer.chat_template and chat.template(tokenizer)
  try:  # what cannot score is found before anything is drawn
    score(["Is", "Is it", "Is it"], [" so?", " so?", " so."])
  except Exception as error:  # of a model's own code: anything
    raise ValueError(f"scorer {name}: cannot score ({error})") from error
  return score


def _encoded(tokenizer, text):
  """{name: list} of the inputs of a text, with one BOS at most.

  A chat template writes one, and many tokenizers another in front. An empty
  text is a BOS or EOS, as an empty prompt is in training.
  """
  inputs = tokenizer(text, truncation=False, padding=False, verbose=False)
  ids, bos = inputs["input_ids"], tokenizer.bos_token_id
  if not ids:
    first = tokenizer.eos_token_id if bos is None else bos
    lone = {"input_ids": first or 0, "attention_mask": 1, "token_type_ids": 0}
    return {key: [lone[key]] for key in inputs}
  twice = bos is not None and ids[:2] == [bos, bos]
  return {key: values[twice:] for key, values in inputs.items()}


def _refuse_long(name, counts, limit):
  """Raises ValueError for texts beyond a limit, of {length: how many}."""
  long = sum(count for length, count in counts.items() if length > limit)
  if long:
    raise ValueError(
      f"scorer {name}: {long} texts are longer than its model can read: "
      f"{limit} tokens of prompt and completion, the longest has "
      f"{max(counts)}; lower sample.max_new_tokens or data.max_prompt_length, "
      "or take another scorer"
    )


def _longest(tokenizer, model):
  """Tokens of the longest text that a model can read; inf if nothing says."""
  config = model.config.get_text_config()
  told = getattr(config, "max_position_embeddings", None)
  limits = [tokenizer.model_max_length, told]
  for name, module in model.named_modules():
    if name.endswith("position_embeddings") and hasattr(module, "padding_idx"):
      # RoBERTa counts its positions from behind that of padding.
      unused = -1 if module.padding_idx is None else module.padding_idx
      limits.append(module.num_embeddings - unused - 1)
  return min((n for n in limits if n is not None and n > 0), default=math.inf)


def _log_odds(logits):
  """log p(last label) − log(1 − p)."""
  if logits.shape[1] < 2:
    raise ValueError("a classifier has two labels or more; use model:NAME")
  return logits[:, -1] - np.logaddexp.reduce(logits[:, :-1], axis=1)


def _only_logit(logits):
  if logits.shape[1] != 1:
    raise ValueError("a reward model has one label; use classifier:NAME")
  return logits[:, 0]
