"""What is exported is read back bit for bit, and by transformers and PEFT."""

import copy
import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import tree
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder, families, hf, lora, peft
from dpo_jax.models import write as write_lib
from tests import worlds
from tests.models import parity

# One of each way that a checkpoint holds queries, keys and values.
ADAPTED = (
  "gpt2",
  "EleutherAI/pythia-70m",
  "EleutherAI/gpt-j-6b",
  "meta-llama/Llama-3.2-1B",
  "microsoft/Phi-3-mini-4k-instruct",
  "google/gemma-3-1b-pt",
)
ALL = (r"(attn|mlp)/\w+/kernel$",)
IDS = np.random.default_rng(0).integers(0, parity.VOCAB, 24).tolist()
# Logits of order 1 of a few f32 layers: 4e-6 is typical.
CLOSE = 2e-5


class World(NamedTuple):
  """A random checkpoint that tests share; nothing is written beside it."""

  folder: pathlib.Path
  checkpoint: hf.Checkpoint
  model: decoder.Model
  params: dict


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """f(name of a published architecture) -> World."""

  @functools.cache
  def of(name):
    folder = tmp_path_factory.mktemp("base")
    parity.write(parity.small(name), folder)
    return World(folder, *read(folder))

  return of


def read(folder):
  """(Checkpoint, Model, params) of a folder."""
  checkpoint = hf.open_folder(folder)
  model, params = parity.load(folder, parity.mesh())
  return checkpoint, model, params


def write(folder, checkpoint, params, dtype="float32"):
  folder.mkdir()
  c = checkpoint
  write_lib.write(folder, params, c.config, c.vocab_size, c.raw, dtype)


def bits(params):
  return {path: np.asarray(x) for path, x in tree.named(params)}


def logits(model, decode, params, ids=IDS):
  tokens = np.asarray([ids])
  positions = np.arange(len(ids))[None]
  out, _ = decode(params, tokens, positions, model.init_cache(1, len(ids)))
  return np.asarray(out)[0, :, : model.vocab_size]


@pytest.mark.parametrize("name", parity.SUPPORTED)
def test_import_export_import_changes_no_bit(name, world, tmp_path):
  first, checkpoint, _, params = world(name)
  second = tmp_path / "b"
  write(second, checkpoint, params)
  again, _, back = read(second)
  jax.tree.map(np.testing.assert_array_equal, bits(params), bits(back))
  assert again.config == checkpoint.config
  assert "auto_map" not in again.raw  # its code is not there
  files = [
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (first, second)
  ]
  assert files[0].keys() == files[1].keys()
  for key, x in files[0].items():
    np.testing.assert_array_equal(x, files[1][key], err_msg=key)


def test_a_checkpoint_in_bfloat16_survives_bit_for_bit_in_its_own_type(
  tmp_path,
):
  (tmp_path / "a").mkdir()
  parity.write(parity.small("gpt2"), tmp_path / "a", dtype="bfloat16")
  checkpoint, _, params = read(tmp_path / "a")
  write(tmp_path / "b", checkpoint, params, "bfloat16")
  old, new = (
    safetensors.numpy.load_file(tmp_path / f / "model.safetensors")
    for f in "ab"
  )
  for key, x in old.items():
    assert x.tobytes() == new[key].tobytes(), key
  assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == (
    "bfloat16"
  )


def test_a_large_checkpoint_is_several_files_and_an_index(
  world, tmp_path, monkeypatch
):
  _, checkpoint, _, params = world("gpt2")
  monkeypatch.setattr(write_lib, "FILE_BYTES", 40_000)
  write(tmp_path / "b", checkpoint, params)
  files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
  assert len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  jax.tree.map(
    np.testing.assert_array_equal, bits(params), bits(read(tmp_path / "b")[2])
  )


@pytest.mark.parametrize("preset", list(model_config.PRESETS))
def test_every_preset_is_a_published_architecture(preset):
  config = model_config.PRESETS[preset]
  raw = write_lib.describe(config, 300)
  assert families.read(raw) == (config, 300)


def test_a_model_of_no_published_architecture_says_what_differs():
  odd = dataclasses.replace(
    model_config.PRESETS["micro"], window=5, layer_pattern=("window",)
  )
  with pytest.raises(ValueError, match=r"model\.layer_pattern, model\.window"):
    write_lib.describe(odd, 300)


def adapter_of(params, rank=3):
  """A random adapter, as numpy f32: nothing is compiled."""
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: (0.05 * rng.standard_normal(x.shape)).astype(np.float32),
    jax.eval_shape(lambda: lora.init(jax.random.key(1), params, rank, ALL)),
  )


def options(**changes):
  about = {"rank": 3, "alpha": 6.0, "rank_stabilised": False, "base": "x"}
  about |= changes
  names = ("rank", "alpha", "rank_stabilised")
  return {**about, "scale": lora.scale_of(*(about[n] for n in names))}


def shapes_of(params):
  return {path: x.shape for path, x in tree.named(params)}


def about_of(checkpoint, params):
  table = families.find(checkpoint.raw).table
  return table, checkpoint.config, shapes_of(params), checkpoint.vocab_size


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_written_for_peft_reads_back_as_the_same_product(
  name, stabilised, world, tmp_path
):
  """The same leaves, but where three share a matrix there: then A·B."""
  _, checkpoint, _, params = world(name)
  adapter, about = adapter_of(params), options(rank_stabilised=stabilised)
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter, *where, about)
  back, rank, scale = peft.read(tmp_path, *where)
  assert (rank, scale) == (3, about["scale"])
  merge = jax.jit(lora.merge)
  want, got = merge(params, adapter, scale), merge(params, back, scale)
  for (path, a), (_, b) in zip(tree.named(got), tree.named(want), strict=True):
    # Sums of three products of order 0.1, in another order.
    np.testing.assert_allclose(a, b, atol=1e-6, err_msg=path)
  if checkpoint.raw["model_type"] in ("llama", "gptj", "gemma3_text"):
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
  ],
)
def test_what_an_adapter_cannot_be_is_named(changes, message, world, tmp_path):
  _, checkpoint, _, params = world("gpt2")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=message):
    peft.read(tmp_path, *where)


def test_tensors_of_an_adapter_that_fit_nowhere_are_named(world, tmp_path):
  _, checkpoint, _, params = world("meta-llama/Llama-3.2-1B")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  file = tmp_path / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
  stray = tensors | {"base_model.model.lm_head.lora_A.weight": tensors[name]}
  safetensors.numpy.save_file(stray, file)
  with pytest.raises(ValueError, match="lm_head"):
    peft.read(tmp_path, *where)
  without = {
    k: v for k, v in tensors.items() if "layers.0.self_attn.q_proj" not in k
  }
  safetensors.numpy.save_file(without, file)
  some = r"layers\.0\.self_attn\.q_proj\.lora_A\.weight is missing"
  with pytest.raises(ValueError, match=some):
    peft.read(tmp_path, *where)
  path = tmp_path / "adapter_config.json"
  about = json.loads(path.read_text()) | {"layers_to_transform": [1]}
  path.write_text(json.dumps(about))
  with pytest.raises(ValueError, match=r"layers \[0\] of .*attn/q"):
    peft.read(tmp_path, *where)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
  ("tensors", "about", "message"),
  [
    ("all", {}, r"holds no tensor"),
    ([f"{Q}B.weight"], {}, r"lora_B\.weight is missing"),
    ([f"{Q}A.weight"], {}, r"q_proj\.lora_A\.weight is missing"),
    ([f"{Q}A.weight", f"{Q}B.weight"], {}, "is missing, though .*q_proj"),
    # As people's own configs name them: endings, and patterns.
    ([f"{Q}A.weight", f"{Q}B.weight"], ["q_proj"], "is missing, .* 'q_proj'"),
    ([f"{Q}A.weight", f"{Q}B.weight"], r".*\.q_proj", "is missing, though"),
    ([f"{Q}A.weight", f"{Q}B.weight"], "all-linear", "is missing, though"),
    ([], ["c_attn", "w_pack"], "no tensor is of 'w_pack'"),
    ([], ["q_proj", "lm_head"], "no tensor is of 'lm_head'"),
    ([], {"r": 5}, r"lora_A\.weight is \[3, 48\], it must be \[5, 48\]"),
    ([], {"r": None}, "r = None must be a whole number"),
    ([], {"r": 3.0}, r"r = 3\.0 must be a whole number"),
    ([], {"lora_alpha": "6"}, "lora_alpha = '6' must be a number above 0"),
    ([], {"target_modules": "("}, r"target_modules = '\(' must be a list"),
    ([], {"exclude_modules": [3]}, r"exclude_modules = \[3\] must be a list"),
    ([], {"rank_pattern": {"(": 2}}, "rank_pattern = .* must be an object"),
    ([], {"alpha_pattern": {"q": "x"}}, "alpha_pattern = .* must be an object"),
    ([], {"arrow_config": {"top_k": 3}}, "arrow_config = .* not supported"),
    ([], {"use_newer_lora": True}, "use_newer_lora = True is not supported"),
  ],
)
def test_an_adapter_that_lacks_something_never_merges_as_nothing(
  tensors, about, message, world, tmp_path
):
  """The file and what it lacks are named."""
  _, checkpoint, _, params = world("meta-llama/Llama-3.2-1B")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  path, file = (
    tmp_path / f"adapter_{name}"
    for name in ("config.json", "model.safetensors")
  )
  about = about if isinstance(about, dict) else {"target_modules": about}
  path.write_text(json.dumps(json.loads(path.read_text()) | about))
  there = safetensors.numpy.load_file(file)
  gone = there if tensors == "all" else tensors
  assert set(gone) <= there.keys()
  kept = {name: x for name, x in there.items() if name not in gone}
  safetensors.numpy.save_file(kept, file)
  with pytest.raises(ValueError, match=message) as caught:
    peft.read(tmp_path, *where)
  assert str(tmp_path) in str(caught.value)


def test_an_adapter_that_changes_nothing_or_is_not_finite_is_told(
  world, tmp_path
):
  _, checkpoint, _, params = world("meta-llama/Llama-3.2-1B")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  file = tmp_path / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  new = {n: x * ("lora_A" in n) for n, x in tensors.items()}
  safetensors.numpy.save_file(new, file)
  with pytest.warns(UserWarning, match="the adapter changes nothing"):
    peft.read(tmp_path, *where)
  name = f"{Q}A.weight"
  bad = {**tensors, name: np.full_like(tensors[name], np.inf)}
  safetensors.numpy.save_file(bad, file)
  with pytest.raises(ValueError, match=rf"{name} holds numbers that are not"):
    peft.read(tmp_path, *where)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_whole_adapter_is_read_whatever_way_its_targets_are_named(
  targets, world, tmp_path
):
  _, checkpoint, _, params = world("meta-llama/Llama-3.2-1B")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  want, _, _ = peft.read(tmp_path, *where)
  path = tmp_path / "adapter_config.json"
  about = json.loads(path.read_text()) | {"target_modules": targets}
  path.write_text(json.dumps({**about, "newer_field": None}))
  jax.tree.map(
    np.testing.assert_array_equal, peft.read(tmp_path, *where)[0], want
  )


def test_a_target_that_the_model_does_not_have_is_named_and_passed_over(
  world, tmp_path
):
  """As in PEFT: a list often serves many architectures."""
  _, checkpoint, _, params = world("meta-llama/Llama-3.2-1B")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  want, _, _ = peft.read(tmp_path, *where)
  path = tmp_path / "adapter_config.json"
  about = json.loads(path.read_text())
  targets = [*about["target_modules"], "query_key_value"]
  path.write_text(json.dumps({**about, "target_modules": targets}))
  with pytest.warns(UserWarning, match=r"\['query_key_value'\]"):
    got, _, _ = peft.read(tmp_path, *where)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  "name", ["adapter_config.json", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("size", [0, 9, 150])
def test_an_adapter_that_was_cut_short_is_named(name, size, world, tmp_path):
  _, checkpoint, _, params = world("meta-llama/Llama-3.2-1B")
  where = about_of(checkpoint, params)
  peft.write(tmp_path, adapter_of(params), *where, options())
  path = tmp_path / name
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match=f"{name} is damaged"):
    peft.read(tmp_path, *where)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_a_model_born_here_is_loaded_by_transformers(name, tmp_path):
  import torch
  import transformers

  config = dataclasses.replace(worlds.MODELS[name], head_bias=False)
  model = decoder.build(config, worlds.VOCAB)
  params = tree.nest(parity.random(config, worlds.VOCAB))
  raw = write_lib.describe(config, worlds.VOCAB)
  write_lib.write(tmp_path, params, config, worlds.VOCAB, raw, "float32")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype=torch.float32
  ).eval()
  ids = [i % worlds.VOCAB for i in IDS]
  decode = jax.jit(model.decode, compiler_options=parity.FAST)
  got = logits(model, decode, params, ids)
  want = parity.theirs(theirs, ids)
  np.testing.assert_allclose(got, want, atol=CLOSE)


@pytest.fixture(scope="module", params=ADAPTED)
def adapted(request, tmp_path_factory):
  """(name, torch model, Checkpoint, params, logits) that two tests share."""
  folder = tmp_path_factory.mktemp("torch")
  theirs = parity.save(parity.small(request.param), folder)
  checkpoint, model, params = read(folder)
  decode = jax.jit(model.decode, compiler_options=parity.FAST)
  ours = functools.partial(logits, model, decode)
  return request.param, theirs, checkpoint, params, ours


@pytest.mark.slow
def test_peft_loads_our_adapter_with_equal_logits(adapted, tmp_path, capsys):
  import peft as peft_library

  name, theirs, checkpoint, params, ours = adapted
  adapter, about = adapter_of(params, 4), options(rank=4)
  peft.write(tmp_path, adapter, *about_of(checkpoint, params), about)
  got = ours(lora.graft(params, adapter, about["scale"]))
  plain = parity.theirs(theirs, IDS)
  theirs = peft_library.PeftModel.from_pretrained(
    copy.deepcopy(theirs), tmp_path
  ).eval()
  want = parity.theirs(theirs, IDS)
  worst = float(np.max(np.abs(got - want)))
  parity.show(capsys, f"{name}, adapter", {"logits": worst})
  assert worst <= CLOSE
  assert np.max(np.abs(want - plain)) > 100 * CLOSE


@pytest.mark.parametrize(
  ("pattern", "want"),
  [
    *(("q_proj", 3), ("v_proj|q_proj", 3), ("layers.0.self_attn.q_proj", 3)),
    *(("^model.layers.0.self_attn.q_proj", 3), (r"layers\..*", 3)),
    # PEFT's patterns are of whole names, the alternatives too.
    *(
      ("_proj", 12),
      ("o_proj|_proj", 12),
      ("q_proj|v", 3),
      ("v|self_attn", 12),
    ),
  ],
)
def test_patterns_name_modules_as_they_do_in_peft(pattern, want):
  module = "model.layers.0.self_attn.q_proj"
  assert peft._pattern({pattern: 3}, module, 12) == want


@pytest.mark.slow
def test_an_adapter_made_by_peft_is_read_with_equal_logits(adapted, tmp_path):
  """With a rank and an alpha of its own for one module of every layer."""
  import peft as peft_library
  import torch

  name, theirs, checkpoint, params, ours = adapted
  one = "o_proj" if name.startswith(("meta", "micro", "google")) else None
  config = peft_library.LoraConfig(
    r=4,
    lora_alpha=12,
    target_modules="all-linear",
    rank_pattern={one: 2} if one else {},
    alpha_pattern={one: 3} if one else {},
    task_type="CAUSAL_LM",
  )
  theirs = peft_library.get_peft_model(copy.deepcopy(theirs), config).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for key, p in theirs.named_parameters():
      if "lora_" in key:
        p.copy_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(tmp_path / "adapter")
  back, rank, scale = peft.read(
    pathlib.Path(tmp_path / "adapter"), *about_of(checkpoint, params)
  )
  assert (rank, scale) == (4, 3.0)
  got = ours(lora.graft(params, back, scale))
  np.testing.assert_allclose(got, parity.theirs(theirs, IDS), atol=CLOSE)
