"""Small models of published architectures: of torch, in files, and here.

torch is imported by the functions that need it only.
"""

import copy
import dataclasses
import functools
import json
import re
import sys

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from dpo_jax import compat, tree
from dpo_jax.algos import base
from dpo_jax.data.batch import rows
from dpo_jax.data.tokens import comparisons
from dpo_jax.models import axes, decoder, families, hf, keys
from dpo_jax.models import write as write_lib
from dpo_jax.ops import logprobs
from dpo_jax.parallel import mesh as mesh_lib
from tests import worlds
from tests.models import published

VOCAB = 101  # not a multiple of 128
WINDOW = 5  # shorter than the sequences

MIXTURES = ("mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B")
SUPPORTED = [name for name in published.PUBLISHED if name not in MIXTURES]

DTYPES = {
  "float32": np.float32,
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
}

_SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 48,
  "intermediate_size": 56,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 12,
  "sliding_window": WINDOW,
  "n_embd": 48,
  "n_head": 6,
  "n_layer": 3,
  "n_positions": 64,
  "n_ctx": 64,
  "rotary_dim": 4,
}


def small(name, **changes):
  """A published config.json with small sizes, every other field kept."""
  whole = published.PUBLISHED[name]
  raw = copy.deepcopy(whole)
  for field, size in _SIZES.items():
    if raw.get(field) is not None:
      raw[field] = size
  grouped = whole.get("num_key_value_heads")
  if grouped is not None and grouped == whole["num_attention_heads"]:
    raw["num_key_value_heads"] = raw["num_attention_heads"]
  kind = raw["model_type"]
  if kind == "gemma3_text":
    # Some of its sizes are the class's defaults: one period, and two more.
    raw |= {k: _SIZES[k] for k in ("vocab_size", "head_dim")}
    raw |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    raw |= {"num_hidden_layers": 8}
  if kind == "smollm3":
    raw["num_hidden_layers"] = 6
    for field in ("no_rope_layers", "layer_types"):
      raw[field] = raw[field][:6]
  scaling = raw.get("rope_scaling")
  if scaling and "short_factor" in scaling:
    dim = raw["hidden_size"] // raw["num_attention_heads"]
    rotated = int(dim * raw.get("partial_rotary_factor", 1.0)) // 2
    for field in ("short_factor", "long_factor"):
      scaling[field] = scaling[field][-rotated:]
  for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
    if raw.get(field) is not None:
      raw[field] = 1
  return raw | changes


def mesh(data=1, fsdp=1, tensor=1):
  """A mesh of the first devices; not all, as the product's own has."""
  shape = (data, fsdp, tensor, 1)
  devices = jax.devices()[: data * fsdp * tensor]
  return compat.make_mesh(devices, shape, mesh_lib.AXES)


def save(raw, folder, seed=0):
  """A random torch model of a config.json, saved as transformers would.

  Its config.json is then replaced by `raw`: the published fields.
  """
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.manual_seed(seed)
  given = copy.deepcopy({k: v for k, v in raw.items() if k != "model_type"})
  config = transformers.AutoConfig.for_model(raw["model_type"], **given)
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():  # biases, norms and heads matter too
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(folder)
  (folder / "config.json").write_text(json.dumps(raw))
  return model


def write(raw, folder, *, dtype="float32", files=1, rename=None, extra=None):
  """A random checkpoint of a config.json, written without torch.

  Args:
    raw: content of config.json.
    folder: exists.
    dtype: of the tensors, of DTYPES.
    files: more than one also get an index.
    rename: function of a tensor's name to that in the file; None leaves it out.
    extra: {name: array} of further tensors.
  Returns: nested dict of the parameters in the files, as numpy f32.
  """
  config, vocab_size = families.read(raw)
  flat = {
    path: x.astype(DTYPES[dtype])
    for path, x in random(config, vocab_size).items()
  }
  tensors = {
    name: x
    for name, x in tensors_of(raw, config, vocab_size, flat).items()
    if rename is None or rename(name) is not None
  }
  if rename is not None:
    tensors = {rename(name): x for name, x in tensors.items()}
  put(folder, raw, tensors | (extra or {}), files)
  return tree.nest({k: x.astype(np.float32) for k, x in flat.items()})


def random(config, vocab_size):
  """{path: random parameters as numpy f32}, of numbers that a model could have.

  Compiles nothing. What pads the vocabulary is 0.
  """
  model = decoder.build(config, vocab_size)
  rng, out = np.random.default_rng(0), {}
  for path, x in shapes_of(model).items():
    one = 1 - config.norm_offset if re.search(r"norm\w*/scale$", path) else 0
    out[path] = (one + 0.1 * rng.standard_normal(x)).astype(np.float32)
    axis = keys.vocabulary_axis(path)
    if axis is not None:
      np.moveaxis(out[path], axis, 0)[vocab_size:] = 0
  return out


def shapes_of(model):
  """{path: shape} of the parameters."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return {path: x.shape for path, x in tree.named(shapes)}


def tensors_of(raw, config, vocab_size, flat):
  """{name: array} of a checkpoint with the parameters {path: array}."""
  wanted = keys.tensors(
    families.find(raw).table,
    config,
    {path: x.shape for path, x in flat.items()},
    vocab_size,
  )
  out = {}
  for name, tensor in wanted.items():
    leaves = []
    for place in tensor.places:
      x = flat[place.path]
      x = x if place.layer is None else x[place.layer]
      axis = keys.vocabulary_axis(place.path)
      leaves.append(x if axis is None else x.take(range(vocab_size), axis))
    out[name] = keys.from_leaves(leaves, tensor, config.rotary_dim)
  return out


def put(folder, raw, tensors, files=1):
  """Writes config.json, and the tensors into one file or several."""
  (folder / "config.json").write_text(json.dumps(raw))
  if files == 1:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return
  weight_map = {}
  for i in range(files):
    file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
    part = {name: tensors[name] for name in list(tensors)[i::files]}
    safetensors.numpy.save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def abstract(model, mesh):
  """The model's parameters as ShapeDtypeStructs with their shardings."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = mesh_lib.shardings(mesh, shapes, axes.spec)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def load(folder, mesh, base="float32"):
  """(decoder.Model, params) of a folder."""
  checkpoint = hf.open_folder(folder)
  model = decoder.build(checkpoint.config, checkpoint.vocab_size)
  return model, hf.load(checkpoint, abstract(model, mesh), base)


# f32 rounding after some layers of logits of order 1: 4e-6 is typical. A sum of
# up to 8 log-probs may err eight times as much as one.
TOLERANCE = {
  "logits": 2e-5,
  "packed": 2e-5,
  "completion": 2e-4,
  "decode": 2e-5,
  "exported": 2e-5,
}
ITEMS = worlds.examples(7, seed=3, completions=4)
_LAYOUT = rows.Layout(True, True, 2, None)
_LENGTH = 24  # of the plain sequences
# Compiling dominates.
FAST = {"xla_backend_optimization_level": 0}


def measure(raw, folder, *, decode=False, export=False, fault=None):
  """The largest absolute differences of a random model from transformers.

  Args:
    raw: content of config.json.
    folder: for the checkpoint.
    decode: with the cache too.
    export: what is written of it, as transformers loads it, too.
    fault: fields of ModelConfig to get wrong, or None.
  Returns: {what: difference}; see test_families.
  """
  torch_model = save(raw, folder)
  model, params = load(folder, mesh())
  packed = worlds.batch(ITEMS, row_multiple=_LAYOUT.row_multiple)
  assert packed["example_id"].shape[1] > 2  # several examples in a row
  rng = np.random.default_rng(0)
  ids = rng.integers(0, VOCAB, (2, _LENGTH)).tolist()
  want = np.stack([theirs(torch_model, row) for row in ids])
  plain = _plain(ids)
  run, out = _forward(model.config, model.vocab_size), {}

  def logits(run):
    return run(params, plain)[0][:, :_LENGTH, :VOCAB]

  ours = logits(run)
  out["logits"] = _difference(ours, want)
  got = by_completion(run(params, packed)[1], packed)
  single = _completion_logps(torch_model)
  assert got.keys() == single.keys()
  out["packed"] = max(_difference(got[k], single[k]) for k in got)
  out["completion"] = max(
    _difference(got[k].sum(), single[k].sum()) for k in got
  )
  if decode:
    out["decode"] = _difference(_decoded(model, params, np.asarray(ids)), want)
  if export:
    exported = _exported(folder, params)
    again = np.stack([theirs(exported, row) for row in ids])
    out["exported"] = _difference(ours, again)
  if fault is not None:
    faulty = dataclasses.replace(model.config, **fault)
    assert faulty != model.config
    run = _forward(faulty, model.vocab_size)
    out["fault"] = _difference(logits(run), want)
  return out


def show(capsys, name, numbers):
  """Prints a line of numbers: to stderr, which workers of xdist keep too."""
  line = "  ".join(f"{key} {value:.1e}" for key, value in numbers.items())
  with capsys.disabled():
    print(f"\n{name:46s} {line} ", end="", file=sys.stderr, flush=True)


def assert_equal_up_to_rounding(numbers):
  """Of `measure`."""
  for what, tolerance in TOLERANCE.items():
    assert numbers.get(what, 0.0) <= tolerance, (what, numbers)
  # A fault is no rounding: ten times the tolerance.
  assert numbers.get("fault", 1.0) >= 10 * TOLERANCE["logits"], numbers


def theirs(torch_model, ids):
  """Logits [T, V] of one sequence."""
  import torch

  with torch.no_grad():
    return torch_model(torch.tensor([ids])).logits[0].numpy()


def by_completion(values, batch):
  """{(example, completion): its scored tokens' values} of [R, S]."""
  completions = batch["completion_weights"].shape[2]
  out = {}
  for row, ids in enumerate(batch["example_id"]):
    for slot in range(len(ids) * completions):
      p, c = divmod(slot, completions)
      if batch["completion_weights"][row, p, c]:
        mine = batch["target_slot"][row] == slot
        out[int(ids[p]), c] = np.asarray(values[row])[mine]
  return out


@functools.cache
def _forward(config, vocab_size):
  """(params, batch) -> logits of every position, log-probs of the scored."""
  model = decoder.build(config, vocab_size)

  def forward(params, batch):
    hidden, head = model.apply(params, batch)
    logps = base.token_logps(lambda *_: (hidden, head), params, batch)
    return logprobs.logits(hidden, head), logps

  return jax.jit(forward, compiler_options=FAST)


def _exported(folder, params):
  """The torch model of what is written of a checkpoint's parameters."""
  import torch
  import transformers

  c, out = hf.open_folder(folder), folder / "exported"
  out.mkdir()
  write_lib.write(out, params, c.config, c.vocab_size, c.raw, "float32")
  return transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, attn_implementation="eager"
  ).eval()


def _plain(ids):
  """A batch of whole sequences, one a row, in the shape of ITEMS' batch."""
  examples = [
    comparisons.Example(i, 0, row[:1], (row[1:],), ())
    for i, row in enumerate(ids)
  ]
  need = rows.needs(ITEMS, _LAYOUT)
  shape = rows.needed_shape(need, rows.assign(need.length, _LAYOUT))
  each = [[index] for index in range(len(examples))]
  return rows.build(examples, each, shape, _LAYOUT)


def _completion_logps(torch_model):
  """{(example, completion): log-probs}, each sequence alone."""
  out = {}
  for example in ITEMS:
    for c, completion in enumerate(example.completions):
      logits = theirs(torch_model, example.prompt + completion)
      logps = np.asarray(jax.nn.log_softmax(logits))
      at = len(example.prompt) - 1 + np.arange(len(completion))
      out[example.example_id, c] = logps[at, completion]
  return out


def _decoded(model, params, ids):
  """Logits of a prefill longer than the window, then of one step a token."""
  decode = jax.jit(model.decode, compiler_options=FAST)
  cache = model.init_cache(len(ids), _LENGTH + 3)
  positions = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), ids.shape)
  out, start = [], 0
  for end in range(WINDOW + 2, _LENGTH + 1):
    here = slice(start, end)
    logits, cache = decode(params, ids[:, here], positions[:, here], cache)
    out.append(logits)
    start = end
  return np.concatenate(out, axis=1)[..., :VOCAB]


def _difference(got, want):
  return float(np.max(np.abs(np.asarray(got) - np.asarray(want))))
