"""Tokenizers as Hugging Face objects: of the hub, of a folder, of a GGUF file.

What training needs of them is in tokenize.py; here they are found or made, and
written for those who load an exported model.
"""

import hashlib
import importlib
import json
import os

from etils import epath

from dpo_jax import lookup, store
from dpo_jax.config import origin


def load(name):
  """The transformers tokenizer of `config.tokenizer`.

  Args:
    name: "bytes", a hub name or local folder (with "hf:" or without), or
      "gguf:FILE".
  Raises: ValueError saying what was tried.
  """
  if name == "bytes":
    return _bytes()
  kind, name = origin.parse(name)
  if kind == "gguf":
    return _gguf(name)
  # Without torch it warns that models are not available; none is wanted.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  try:
    # Code that a folder brings is never run, nor asked about on stdin.
    return transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=False
    )
  except Exception as error:  # a damaged file raises anything
    where = "folder" if epath.Path(name).exists() else "hub name"
    raise ValueError(
      f"tokenizer = {name!r} cannot be loaded as a {where}: {why(error)}. Use "
      "'bytes', a Hugging Face name, 'gguf:FILE', or a folder with "
      "tokenizer.json and tokenizer_config.json, without code of its own"
    ) from error


def why(error):
  """An error of transformers as one line, without advice that is none here."""
  if "trust_remote_code" in str(error):  # which cannot be set
    return "it brings code of its own, which is never run"
  return " ".join(str(error).split()).rstrip(".")


def identity(hf):
  """What a transformers tokenizer encodes by, as a hash; None if not known.

  Of the fast ones all is known: their backend writes itself down.
  """
  import tokenizers
  import transformers

  backend = getattr(hf, "backend_tokenizer", None)
  if backend is None:
    return None
  parts = [
    *(type(hf).__name__, tokenizers.__version__, transformers.__version__),
    *(hf.bos_token, hf.eos_token, hf.chat_template),
    getattr(hf, "split_special_tokens", None),
    backend.to_str(),
  ]
  text = json.dumps(parts, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write(hf, folder):
  """Writes a transformers tokenizer, without the files that it came from."""
  hf.save_pretrained(folder)
  path = epath.Path(folder) / "tokenizer_config.json"
  about = store.read_json(path)
  named = [k for k in about if k.endswith(("_path", "_file", "_dir"))]
  about = {k: v for k, v in about.items() if k not in named}
  text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
  store.write(path, text.encode())


def _bytes():
  """The tokenizer whose ids are bytes, and 256 the end."""
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers

  # Byte-level tokenizers write each byte as a printable character.
  # By its name: once transformers has loaded some of its models, a function of
  # the same name stands in the place of the module.
  slow = importlib.import_module("transformers.convert_slow_tokenizer")
  written = slow.bytes_to_unicode()
  vocab = {written[byte]: byte for byte in range(256)}
  model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  model.decoder = decoders.ByteLevel()
  model.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    eos_token="<eos>",
    split_special_tokens=True,  # "<eos>" in a text is five bytes
  )


# How text is cut before the merges, by `tokenizer.ggml.pre`.
def _smollm():
  from tokenizers import pre_tokenizers

  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )


_PRE = {"smollm": _smollm}
# Types of tokens that no merge makes: what only code writes ("<|im_end|>"), and
# what a text may hold too.
_SPECIAL, _USER_DEFINED = 3, 4


def _gguf(name):
  import tokenizers
  import transformers
  from tokenizers import decoders, models

  path = origin.gguf_file(name, "tokenizer")
  fields = origin.gguf_reader(path).fields

  def value(key, default=None):
    key = f"tokenizer.{key}"
    return fields[key].contents() if key in fields else default

  if value("ggml.model") != "gpt2":
    raise ValueError(
      f"{path}: the tokenizer model {value('ggml.model')!r} is not supported "
      "(only byte-level BPE, 'gpt2'); set tokenizer to the model's hub name"
    )
  pre = lookup.lookup(_PRE, value("ggml.pre"), f"{path}: tokenizer.ggml.pre")
  tokens = value("ggml.tokens")
  model = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in value("ggml.merges")],
    )
  )
  model.pre_tokenizer = pre()
  model.decoder = decoders.ByteLevel()
  for wanted, add in (
    (_SPECIAL, model.add_special_tokens),
    (_USER_DEFINED, model.add_tokens),
  ):
    add(
      [
        tokenizers.AddedToken(token, normalized=False)
        for token, kind in zip(tokens, value("ggml.token_type"), strict=True)
        if kind == wanted
      ]
    )
  named = {
    role: tokens[value(f"ggml.{key}_token_id")]
    for role, key in (
      ("bos_token", "bos"),
      ("eos_token", "eos"),
      ("pad_token", "padding"),
      ("unk_token", "unknown"),
    )
    if value(f"ggml.{key}_token_id") is not None
  }
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    add_bos_token=bool(value("ggml.add_bos_token", False)),
    chat_template=value("chat_template"),
    **named,
  )
