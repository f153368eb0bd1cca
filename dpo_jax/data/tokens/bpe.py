"""A byte-level BPE tokenizer, trained on a source and saved as a folder."""

import json

from etils import epath

from dpo_jax import store

BOS, EOS = "<|bos|>", "<|eos|>"


def train(texts, vocab_size, folder):
  """Trains a tokenizer that `data.tokenize.load(folder)` reads.

  Byte-level, so that every text has ids; no token spans two words, and a word
  begins with its space, as in GPT-2.

  Args:
    texts: list of str.
    vocab_size: tokens, of which 256 are bytes and two are BOS and EOS.
    folder: gets tokenizer.json and tokenizer_config.json.
  Returns: the number of tokens, fewer than `vocab_size` if the texts have no
    more pairs to merge.
  Raises: ValueError if vocab_size leaves no room for merges.
  """
  if vocab_size < 259:
    raise ValueError(
      f"vocab_size = {vocab_size} must be above 258: 256 bytes, BOS and EOS"
    )
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[BOS, EOS],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  store.write(folder / "tokenizer.json", tokenizer.to_str().encode())
  kind = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
  }
  store.write(folder / "tokenizer_config.json", json.dumps(kind).encode())
  return tokenizer.get_vocab_size()
