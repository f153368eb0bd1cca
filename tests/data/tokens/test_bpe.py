"""A trained tokenizer: every text comes back, words stay apart, same twice."""

import json
import re

import numpy as np
import pytest
import tokenizers

from dpo_jax.data.tokens import bpe, tokenize

CORPUS = [
  "the plot is warm and clever, and the plot is long.",
  "the cast isn't dull; the cast was warm.\n\nThe end.",
  "  the pace   seems slow in 1999 and in 2001.",
] * 5
SIZE = 310  # 52 merges, of the 58 that there are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("bpe") / "new" / "folder"
  bpe.train(CORPUS, SIZE, path)
  return path


@pytest.fixture(scope="module")
def tokenizer(folder):
  return tokenize.load(str(folder))


@pytest.fixture(scope="module")
def backend(folder):
  """The saved file, read by the library itself."""
  return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
  "text",
  [
    *CORPUS[:3],
    "",
    " ",
    "\n\n\t  \r\n x",
    "a . b , c n't do not ' s ?",  # what some decoders put together
    "naïve café 日本 😀\u200d🚀 \x00\x7f\ufeff",
    "e\u0301 Å ﬁ",  # what a normaliser would change
    "<s> </s> <|endoftext|> [UNK]",
  ],
)
def test_every_text_comes_back(tokenizer, text):
  (ids,) = tokenizer.encode([text])
  assert tokenizer.decode(ids) == text


def test_random_characters_come_back(tokenizer):
  rng = np.random.default_rng(0)
  code = rng.integers(0, 0x110000 - 0x800, (200, 20))
  code[:100] %= 0x500  # half of them near the alphabets
  code[code >= 0xD800] += 0x800  # no surrogates
  texts = ["".join(map(chr, row)) for row in code.tolist()]
  assert list(map(tokenizer.decode, tokenizer.encode(texts))) == texts


def test_no_token_spans_two_words(backend):
  tokens = [backend.decode([i]) for i in range(2, backend.get_vocab_size())]
  assert {" the", " plot", " cast"} <= set(tokens)  # words were merged
  for token in tokens:
    assert re.fullmatch(r" ?\S+|\s+", token), token


def test_bos_and_eos_are_set_and_dropped_by_decode(tokenizer, backend):
  assert tokenizer.bos_id == backend.token_to_id(bpe.BOS)
  assert tokenizer.eos_id == backend.token_to_id(bpe.EOS)
  assert tokenizer.bos_id != tokenizer.eos_id
  (ids,) = tokenizer.encode(["the plot"])
  assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
  framed = [tokenizer.bos_id, *ids, tokenizer.eos_id]
  assert tokenizer.decode(framed) == "the plot"


def test_what_is_loaded_is_what_was_trained(tokenizer, backend):
  assert tokenizer.vocab_size == SIZE
  for text, ids in zip(CORPUS, tokenizer.encode(CORPUS), strict=True):
    assert ids == backend.encode(text).ids
    assert 0 <= min(ids) <= max(ids) < SIZE


def test_frequent_words_are_one_token(tokenizer):
  ids = tokenizer.encode([" the", " plot", " warm", " zqxj"])
  assert [len(i) for i in ids] == [1, 1, 1, 5]


@pytest.mark.parametrize("size", [-1, 0, 258])
def test_a_vocabulary_without_room_for_merges_is_an_error(tmp_path, size):
  with pytest.raises(
    ValueError, match=f"vocab_size = {size} must be above 258"
  ):
    bpe.train(CORPUS, size, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_the_smallest_vocabulary_has_one_merge(tmp_path):
  assert bpe.train(CORPUS, 259, tmp_path) == 259
  saved = json.loads((tmp_path / "tokenizer.json").read_text())
  assert len(saved["model"]["merges"]) == 1


def test_texts_without_more_merges_give_fewer_tokens(tmp_path):
  # 256 bytes, BOS, EOS, "ab" and " ab".
  assert bpe.train(["ab ab ab"], 1000, tmp_path) == 260
  assert tokenize.load(str(tmp_path)).vocab_size == 260


def test_training_twice_gives_the_same_files(tmp_path):
  # Many merges are equally frequent; which comes first must not be chance.
  texts = ["abcd efgh ijkl mnop qrst uvwx", "dcba hgfe lkji ponm tsrq xwvu"]
  found = []
  for name in "abc":
    bpe.train(texts, 280, tmp_path / name)
    found.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
  assert found[0].keys() == {"tokenizer.json", "tokenizer_config.json"}
  assert found[0] == found[1] == found[2]
