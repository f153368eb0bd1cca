"""Checkpoints from files: every form they come in, and every refusal."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax import tree
from dpo_jax.models import axes, decoder, families, hf, keys, lora, tables
from dpo_jax.parallel import mesh as mesh_lib
from tests.models import parity, published

LLAMA = "meta-llama/Llama-3.2-1B"
NEOX = "EleutherAI/pythia-70m"
GPTJ = "EleutherAI/gpt-j-6b"
SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"
GEMMA3 = "google/gemma-3-1b-pt"
QWEN2 = "Qwen/Qwen2-7B"
OLMO2 = "allenai/OLMo-2-1124-7B"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"


def small(name=LLAMA, **changes):
  """Two layers are enough to see a stack; even heads, to split them."""
  old = "n_layer" in published.PUBLISHED[name]
  changes = {"n_layer" if old else "num_hidden_layers": 2, **changes}
  if name == LLAMA:
    changes = {"num_key_value_heads": 2, **changes}
  return parity.small(name, **changes)


def assert_same(got, want):
  got, want = dict(tree.named(got)), dict(tree.named(want))
  assert got.keys() == want.keys()
  for path, x in want.items():
    np.testing.assert_array_equal(got[path], x, err_msg=path)


def load(folder, **kwargs):
  return parity.load(folder, parity.mesh(), **kwargs)[1]


FORMS = ({}, {"files": 3}, {"dtype": "bfloat16"}, {"dtype": "float16"})


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_checkpoint_is_read_as_it_was_written(form, tmp_path):
  """Exactly: all is rearrangement, and f32 holds what f16 and bf16 do."""
  want = parity.write(small(), tmp_path, **form)
  got = load(tmp_path)
  assert_same(got, want)
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float32")}


def buffers(pattern, *names):
  """Masks and frequencies that older checkpoints keep in each layer."""
  layers = [pattern.format(i) for i in range(2)]
  ones = np.ones((1, 1, 4, 4), np.float32)
  return {f"{layer}.{name}": ones for layer in layers for name in names}


def test_gpt2_is_read_as_published_without_prefix_and_with_buffers(tmp_path):
  extra = buffers("h.{}.attn", "bias", "masked_bias")

  def bare(name):
    return name.removeprefix("transformer.")

  want = parity.write(small("gpt2"), tmp_path, rename=bare, extra=extra)
  assert_same(load(tmp_path), want)


def test_buffers_of_older_checkpoints_are_left_out(tmp_path):
  names = ("bias", "masked_bias", "rotary_emb.inv_freq")
  extra = buffers("gpt_neox.layers.{}.attention", *names)
  want = parity.write(small(NEOX), tmp_path, extra=extra)
  assert_same(load(tmp_path), want)


def test_a_head_saved_beside_a_tied_embedding_must_be_that(tmp_path):
  want = parity.write(small(), tmp_path)
  table = want["embed"]["tokens"][: parity.VOCAB]
  parity.write(small(), tmp_path, extra={"lm_head.weight": table})
  assert "head" not in want
  assert_same(load(tmp_path), want)
  other = {"lm_head.weight": np.ones((parity.VOCAB, 48), np.float32)}
  (tmp_path / "model.safetensors").unlink()
  parity.write(small(), tmp_path, extra=other, files=3)
  with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix"):
    load(tmp_path)


def test_an_untied_head_is_read_and_its_padding_is_zero(tmp_path):
  want = parity.write(small(tie_word_embeddings=False), tmp_path)
  got = load(tmp_path)
  assert_same(got, want)
  assert got["head"]["kernel"].shape == (48, 128)
  assert not np.any(got["head"]["kernel"][:, parity.VOCAB :])
  assert not np.any(got["embed"]["tokens"][parity.VOCAB :])


def test_tensors_that_do_not_fit_are_listed_by_name(tmp_path):
  lost = "model.layers.1.mlp.up_proj.weight"
  extra = {
    "model.layers.0.self_attn.q_proj.bias": np.zeros(72, np.float32),
    "model.layers.2.mlp.up_proj.weight": np.zeros((56, 48), np.float32),
    "model.norm.weight": np.zeros(47, np.float32),
  }

  def rename(name):
    return None if name == lost else name

  parity.write(small(), tmp_path, rename=rename, extra=extra)
  with pytest.raises(ValueError, match="do not fit") as error:
    load(tmp_path)
  message = str(error.value)
  assert f"1 missing: {lost};" in message
  assert (
    "2 not of this architecture: model.layers.0.self_attn.q_proj.bias, "
    "model.layers.2.mlp.up_proj.weight;"
  ) in message
  assert "1 of another shape: model.norm.weight is [47], not [48]" in message
  assert str(tmp_path) in message


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
  parity.write(small(), tmp_path, files=3)
  name = "model-00002-of-00003.safetensors"
  (tmp_path / name).unlink()
  with pytest.raises(ValueError, match=rf"are missing: \['{name}'\]"):
    hf.open_folder(tmp_path)


@pytest.mark.slow
def test_one_file_goes_before_an_index_that_lies_beside_it(tmp_path):
  """As transformers has it; a line says so."""
  import torch
  import transformers

  parity.write(small(), tmp_path, files=3)
  old = load(tmp_path)
  fresh = tmp_path / "fresh"
  fresh.mkdir()
  want = parity.write(small(), fresh, dtype="bfloat16")
  (fresh / "model.safetensors").rename(tmp_path / "model.safetensors")
  with pytest.warns(UserWarning, match="model.safetensors is read") as told:
    got = load(tmp_path)
  assert len({str(w.message) for w in told}) == 1
  assert_same(got, want)
  assert np.any(got["embed"]["tokens"] != old["embed"]["tokens"])
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32
  )
  table = theirs.get_input_embeddings().weight.detach().numpy()
  np.testing.assert_array_equal(table, got["embed"]["tokens"][: parity.VOCAB])


@pytest.mark.parametrize(
  "name", ["../model.safetensors", "/etc/model", "a/b", "..", "C:\\a", 3, None]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(name, tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  parity.write(small(), folder, files=3)
  # What it names would be read, were it looked for.
  parity.write(small(), tmp_path)
  index = folder / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  content["weight_map"]["model.norm.weight"] = name
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="no file of this folder") as caught:
    hf.open_folder(folder)
  assert f"weight_map names {name!r}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_named(text, tmp_path):
  parity.write(small(), tmp_path, files=3)
  (tmp_path / "model.safetensors.index.json").write_text(text)
  with pytest.raises(ValueError, match=r"index\.json is damaged"):
    hf.open_folder(tmp_path)


PROVENANCE = {
  "unsloth_fixed": True,
  "unsloth_version": "2025.3.19",
  "_attn_implementation_autoset": True,
  "mergekit_version": "0.1",
  "_name_or_path": "/home/me/base",
  "dataset_path": "mine",
  "_commit_hash": "00ff",
  "training_loss": 0.3,
  "residual_dropout": 0.1,
  "vision_token_id": 5,
  "use_flash_attention_2": True,
  "training_args": {"lr": 1e-5},
  "keys_to_ignore_at_inference": ["past_key_values"],
  "use_sliding_window": False,
  "use_mrope": False,
  "base_model": "mine/base",
  "datasets": ["a", "b"],
  "llamafactory": "0.9",
  "created_at": "2025-01-01",
  "quantization_config": None,
  "_load_in_4bit": False,
  "quantization": False,
  "something_newer": None,
  "something_else": {},
}
CHANGES = {
  "attention_scaling": 2.0,
  "final_logit_softcapping": 30.0,
  "query_pre_attn_scalar": 4,
  "residual_multiplier": 0.5,
  "_remove_final_layer_norm": True,
  "no_bias": False,
  "num_experts_per_token": 2,
  "quantization": "int8",
  "something_newer": 0,
  "norm_type": "layernorm",
  "hidden_activation": "relu",
  "use_rope": False,
  "use_something": True,
  "sizes": ["a", 2],
}


def test_code_that_a_checkpoint_brings_is_not_run_and_it_is_said(tmp_path):
  parity.write(small(), tmp_path)
  path = tmp_path / "config.json"
  raw = json.loads(path.read_text())
  path.write_text(
    json.dumps({**raw, "auto_map": {"AutoModelForCausalLM": "mine.Model"}})
  )
  with pytest.warns(UserWarning, match="not run, the weights are read as"):
    hf.open_folder(tmp_path)


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
def test_weights_of_a_quantised_type_are_refused_by_name(kind, tmp_path):
  """Cast as they are they would be other weights: their scales are lost."""
  parity.write(small(), tmp_path)
  name = "model.layers.0.mlp.up_proj.weight"
  about = {"dtype": kind, "shape": [56, 48], "data_offsets": [0, 56 * 48]}
  head = json.dumps({name: about}).encode()
  content = len(head).to_bytes(8, "little") + head + bytes(56 * 48)
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(ValueError, match=rf"{name} is of the type {kind}"):
    hf.open_folder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  parity.write(small(), tmp_path, files=2)
  first, second = sorted(tmp_path.glob("model-*.safetensors"))
  second.write_bytes(first.read_bytes())
  with pytest.raises(ValueError, match=rf"in two files, {second.name}"):
    hf.open_folder(tmp_path)


@pytest.mark.parametrize("name", PROVENANCE)
def test_a_field_that_only_tells_of_a_models_past_is_let_through(name):
  raw = small()
  want = families.read(raw)
  assert name not in raw or name == "_name_or_path"
  assert families.read({**raw, name: PROVENANCE[name]}) == want


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_may_change_what_a_model_computes_is_refused(name):
  with pytest.raises(ValueError, match=name):
    families.read({**small(), name: CHANGES[name]})


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_file_that_was_cut_short_is_named(size, tmp_path):
  parity.write(small(), tmp_path, files=2)
  file = tmp_path / "model-00002-of-00002.safetensors"
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut short"):
    hf.open_folder(tmp_path)


@pytest.mark.parametrize(
  ("generation", "want"),
  [
    (None, (1,)),  # of config.json, as transformers does
    ({"eos_token_id": [1, 4]}, (1, 4)),
    ({"eos_token_id": 7, "do_sample": True}, (7,)),
    ({"do_sample": True}, ()),
  ],
)
def test_the_ends_of_a_checkpoint_are_those_it_generates_up_to(
  generation, want, tmp_path
):
  parity.write(small(), tmp_path)
  if generation is not None:
    text = json.dumps(generation)
    (tmp_path / "generation_config.json").write_text(text)
  assert hf.open_folder(tmp_path).ends == want


@pytest.mark.parametrize("ends", ["</s>", [1, None], True])
def test_an_end_that_is_no_id_is_refused(ends, tmp_path):
  parity.write(small(), tmp_path)
  text = json.dumps({"eos_token_id": ends})
  (tmp_path / "generation_config.json").write_text(text)
  with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id"):
    hf.open_folder(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(small()))
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"from_pretrained\('.*'\)\.save_pre"):
    hf.open_folder(tmp_path)


def test_a_folder_without_weights_or_config_says_which(tmp_path):
  with pytest.raises(ValueError, match=r"holds no config\.json"):
    hf.open_folder(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(small()))
  with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
    hf.open_folder(tmp_path)


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "lla')
  with pytest.raises(ValueError, match=r"config\.json"):
    hf.open_folder(tmp_path)


@pytest.mark.parametrize(
  ("raw", "message"),
  [
    (published.PUBLISHED["mistralai/Mixtral-8x7B-v0.1"], "mixture of experts"),
    (published.PUBLISHED["Qwen/Qwen3-30B-A3B"], "mixture of experts"),
    ({"model_type": "gemma3", "text_config": {}}, "'gemma3' sees images"),
    ({"model_type": "mamba", "hidden_size": 8}, "'mamba'"),
    ({"model_type": "llama4"}, r"'llama4'.*did you mean.*'llama'"),
    ({"hidden_size": 8}, "names no model_type"),
  ],
)
def test_another_architecture_is_refused_by_name(raw, message, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=message) as error:
    hf.open_folder(tmp_path)
  assert str(tmp_path) in str(error.value)


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32}
REFUSED = [
  (LLAMA, {"alibi": True}, r"\['alibi'\] of a llama are not known"),
  (LLAMA, {"hidden_act": "relu"}, "hidden_act = 'relu'"),
  (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True"),
  (LLAMA, {"quantization_config": {"bits": 4}}, r"quantization_.*lora\.base"),
  (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
  (LLAMA, {"rope_scaling": {**YARN, "factor": 2.0, "mscale": 1.0}}, "mscale"),
  ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
  ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
  ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
  (GPTJ, {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
  (SMOLLM3, {"use_sliding_window": True}, "use_sliding_window = True"),
  (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_a"),
  (QWEN2, {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
  (OLMO2, {"clip_qkv": 8.0}, r"\['clip_qkv'\]"),
  (PHI3, {"lm_head_bias": True}, "lm_head_bias = True"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_the_decoder_has_not_is_refused_by_name(name, changes, message):
  families.read(parity.small(name))
  with pytest.raises(ValueError, match=message):
    families.read(parity.small(name, **changes))


@pytest.mark.parametrize("base", lora.BASES)
def test_parameters_are_born_sharded_as_the_base_holds_them(base, tmp_path):
  want = parity.write(small(), tmp_path, files=2)
  mesh = parity.mesh(data=2, fsdp=2, tensor=2)
  _, got = parity.load(tmp_path, mesh, base)
  alone = load(tmp_path, base=base)
  held = tree.map_named(lambda path, x: lora.store(path, x, base), want)
  shardings = mesh_lib.shardings(mesh, held, axes.spec)
  places = dict(tree.named(shardings))
  one, stored = dict(tree.named(alone)), dict(tree.named(held))
  split = 0
  for path, x in tree.named(got):
    assert x.sharding.is_equivalent_to(places[path], x.ndim), path
    assert x.dtype == stored[path].dtype, path
    np.testing.assert_array_equal(x, one[path], err_msg=path)
    split += not x.is_fully_replicated
    if path.endswith("kernel/scale"):
      # Another order of the same maximum and division.
      np.testing.assert_allclose(x, stored[path], rtol=1e-6, err_msg=path)
    else:
      np.testing.assert_array_equal(x, stored[path], err_msg=path)
  assert split >= 8  # embedding and seven kernels
  quantised = [p for p, _ in tree.named(got) if p.endswith("/qvalue")]
  assert len(quantised) == (7 if base in ("int8", "nf4") else 0)


def shapes_of(raw):
  """{path: shape} of the parameters."""
  return parity.shapes_of(decoder.build(*families.read(raw)))


def wanted(raw, table=None):
  """{name: keys.Tensor} of a checkpoint."""
  config, vocab_size = families.read(raw)
  table = table or families.find(raw).table
  return keys.tensors(table, config, shapes_of(raw), vocab_size)


@pytest.mark.parametrize("name", [*parity.SUPPORTED, "GGUF"])
def test_key_tables_are_exact_in_both_directions(name):
  raw = parity.small(LLAMA if name == "GGUF" else name)
  table = tables.GGUF_LLAMA if name == "GGUF" else None
  config, shapes = families.read(raw)[0], shapes_of(raw)
  rng = np.random.default_rng(0)
  seen = dict.fromkeys(shapes, 0)
  for tensor in wanted(raw, table).values():
    x = rng.normal(size=tensor.shape)
    leaves = keys.to_leaves(x, tensor, config.rotary_dim)
    for place, leaf in zip(tensor.places, leaves, strict=True):
      assert leaf.shape == place.shape, place.path
      seen[place.path] += leaf.size
    back = keys.from_leaves(leaves, tensor, config.rotary_dim)
    np.testing.assert_array_equal(back, x)
  for path, shape in shapes.items():
    padded = keys.vocabulary_axis(path) is not None
    rows = parity.VOCAB / 128 if padded else 1
    assert seen[path] == np.prod(shape) * rows, path


def leaves_of(name, tensor_name, x):
  """The leaves in one tensor [outputs, inputs] of a small model."""
  raw = small(name)
  tensor, config = wanted(raw)[tensor_name], families.read(raw)[0]
  return keys.to_leaves(x.reshape(tensor.shape), tensor, config.rotary_dim)


def test_neox_stores_q_k_and_v_of_one_head_after_another():
  x = np.arange(3 * 48 * 48).reshape(6, 3, 8, 48)  # heads, q k v, H, D
  name = "gpt_neox.layers.1.attention.query_key_value.weight"
  for i, got in enumerate(leaves_of(NEOX, name, x)):  # D, heads, H
    np.testing.assert_array_equal(got, np.moveaxis(x[:, i], -1, 0))


def test_gptj_rotates_neighbours_which_here_are_the_halves():
  x = np.arange(48 * 48).reshape(6, 8, 48)  # heads, H, D; 4 of H rotate
  (got,) = leaves_of(GPTJ, "transformer.h.0.attn.q_proj.weight", x)
  order = [0, 2, 1, 3, 4, 5, 6, 7]
  np.testing.assert_array_equal(got, np.moveaxis(x[:, order], -1, 0))


def test_gpt2_stores_kernels_with_their_inputs_first():
  x = np.arange(48 * 3 * 48).reshape(48, 3, 6, 8)  # D, q k v, heads, H
  name = "transformer.h.0.attn.c_attn.weight"
  for i, got in enumerate(leaves_of("gpt2", name, x)):
    np.testing.assert_array_equal(got, x[:, i])


# Of a fresh process: what it holds beyond the parameters while it loads.
_MEMORY = """
import re, sys, pathlib, jax
from dpo_jax import tree
from tests.models import parity

def memory(field):
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(field + r":\\s+(\\d+)", status)[1])

mesh = parity.mesh()
parity.load(pathlib.Path(sys.argv[2]), mesh)  # compiles, imports
before = memory("VmRSS")
_, params = parity.load(pathlib.Path(sys.argv[1]), mesh)
jax.block_until_ready(params)
print(memory("VmHWM") - before - tree.nbytes(params), tree.nbytes(params))
"""


@pytest.mark.slow
def test_loading_holds_little_beside_the_parameters(tmp_path, capsys):
  """Three copies of the largest tensor and some for compiling: no file.

  Tensors of 42 MB, as real ones are: what is below 32 MiB glibc keeps.
  """
  raw = small(
    vocab_size=10240,
    hidden_size=1024,
    intermediate_size=10240,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=64,
  )
  big, warm = tmp_path / "big", tmp_path / "warm"
  big.mkdir()
  warm.mkdir()
  tensors = {
    name: np.full(tensor.shape, 0.5, np.float32)
    for name, tensor in wanted(raw).items()
  }
  parity.put(big, raw, tensors, files=2)
  parity.write(small(), warm)
  file = max(f.stat().st_size for f in big.glob("*.safetensors"))
  tensor = 4 * 10240 * 1024
  command = [sys.executable, "-c", _MEMORY, str(big), str(warm)]
  out = subprocess.run(command, check=True, capture_output=True, text=True)
  beside, held = map(int, out.stdout.split()[-2:])
  numbers = {"beside": beside, "held": held, "file": file, "tensor": tensor}
  parity.show(capsys, "bytes while loading", numbers)
  assert held > 4e8
  assert beside <= 5 * tensor < file, numbers
