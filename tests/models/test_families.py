"""Published architectures compute what transformers computes, in numbers.

Small random models with every published field but the sizes, in f32. Each test
prints a line of the largest absolute differences:

    logits      of sequences longer than the window
    packed      log-probs in nats of single tokens, of rows that share prompts,
                against one sequence prompt + completion at a time
    completion  sums of these over a completion
    decode      logits of a prefill and single steps with the cache
    fault       logits with a fault planted in the config: what a tolerance
                has to catch
"""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from dpo_jax.algos import base
from dpo_jax.data import rows
from dpo_jax.models import families, transformer
from dpo_jax.ops import logprobs
from tests import worlds
from tests.models import parity, published

pytestmark = pytest.mark.slow

# f32 rounding after some layers of logits of order 1: 4e-6 is typical. A sum of
# up to 8 log-probs may err eight times as much as one.
TOLERANCE = {
  "logits": 2e-5,
  "packed": 2e-5,
  "completion": 2e-4,
  "decode": 2e-5,
}
LENGTH = 24  # of the plain sequences
ITEMS = worlds.examples(7, seed=3, completions=4)
LAYOUT = rows.Layout(True, True, 2, None)

LLAMA = "meta-llama/Llama-2-7b-hf"
LLAMA3 = "meta-llama/Llama-3.2-1B"
QWEN2 = "Qwen/Qwen2-7B"
QWEN3 = "Qwen/Qwen3-0.6B"
PYTHIA = "EleutherAI/pythia-70m"
GPTJ = "EleutherAI/gpt-j-6b"
MISTRAL = "mistralai/Mistral-7B-v0.1"
GEMMA2 = "google/gemma-2-2b"
GEMMA3 = "google/gemma-3-1b-pt"
SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
PHI3_LONG = "microsoft/Phi-3-mini-128k-instruct"
PHI4 = "microsoft/Phi-4-mini-instruct"
OLMO2 = "allenai/OLMo-2-1124-7B"

# What of a ModelConfig tells the architecture from its nearest relative.
FAULTS = {
  "gpt2": {"activation": "gelu"},
  PYTHIA: {"rotary_dim": 4},
  GPTJ: {"rotary_dim": 2},
  LLAMA: {"norm_eps": 1e-6},
  MISTRAL: {"window": parity.WINDOW + 1},
  QWEN3: {"rope_theta": 1e4},
  GEMMA2: {"attention_softcap": None},
  GEMMA3: {"window_theta": None},
  "google/gemma-3-4b-pt": {"attention_scale": None},
  SMOLLM3: {"layer_pattern": ("full",)},
  PHI3: {"window": parity.WINDOW - 1},
  PHI3_LONG: {"rope_scaling": None},
  PHI4: {"rotary_dim": 4},
  OLMO2: {"norm_eps": 1e-5},
}


def scaled(kind, **fields):
  """Changes that scale the rotation of a Llama."""
  return {"rope_scaling": {"rope_type": kind, **fields}}


UNSCALED = {"rope_scaling": None}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
# Rotations over 256 positions: 41, 8.8 (kept), 1.9 (between), 0.4 … (divided).
THREE_REGIMES = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 256,
}
LONG = {
  "short_factor": [1.5, 2.5, 4.0, 1.0],
  "long_factor": [9.0, 9.0, 9.0, 9.0],
}

# Beyond what is published: (published, changes, planted fault).
VARIANTS = {
  "gpt2, untied, exact gelu": (
    "gpt2",
    {"tie_word_embeddings": False, "activation_function": "gelu"},
    {"activation": "gelu_tanh"},
  ),
  "gpt2, its own mlp width": ("gpt2", {"n_inner": 40}, None),
  "neox, one residual after the other": (
    PYTHIA,
    {"use_parallel_residual": False},
    {"residual": "parallel"},
  ),
  "neox, all dimensions rotate": (PYTHIA, {"rotary_pct": 1.0}, None),
  "neox, tied, without biases of attention": (
    PYTHIA,
    {"tie_word_embeddings": True, "attention_bias": False},
    None,
  ),
  "gptj, half of a head rotates, 3 heads": (
    GPTJ,
    {"rotary_dim": 8, "n_head": 3},
    {"rotary_dim": 4},
  ),
  "llama, tied": (LLAMA, {"tie_word_embeddings": True}, None),
  "llama 3, untied": (LLAMA3, {"tie_word_embeddings": False}, None),
  "llama 3, 5 heads read 1": (
    LLAMA3,
    {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1},
    None,
  ),
  "llama, 7 heads": (
    LLAMA,
    {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7},
    None,
  ),
  "llama, all biases": (
    LLAMA,
    {"attention_bias": True, "mlp_bias": True},
    None,
  ),
  "llama, linear": (LLAMA, scaled("linear", factor=4.0), UNSCALED),
  "llama, all three regimes": (
    LLAMA,
    {"head_dim": 12, **scaled("llama3", **THREE_REGIMES)},
    UNSCALED,
  ),
  "llama, yarn": (LLAMA, scaled("yarn", **YARN), UNSCALED),
  "llama, yarn, its own magnitude": (
    LLAMA,
    scaled("yarn", **YARN, attention_factor=0.8),
    UNSCALED,
  ),
  "llama, yarn, fractions of dimensions": (
    LLAMA,
    scaled("yarn", **YARN, truncate=False, beta_fast=2.0, beta_slow=0.3),
    UNSCALED,
  ),
  "llama, longrope": (
    LLAMA,
    {
      "max_position_embeddings": 96,
      **scaled("longrope", original_max_position_embeddings=32, **LONG),
    },
    UNSCALED,
  ),
  "llama, longrope, its own magnitude": (
    LLAMA,
    scaled(
      "longrope",
      factor=4.0,
      original_max_position_embeddings=32,
      attention_factor=1.25,
      **LONG,
    ),
    UNSCALED,
  ),
  "mistral, heads of 20": (MISTRAL, {"head_dim": 20}, None),
  "qwen2, windows from layer 1 on": (
    QWEN2,
    {"use_sliding_window": True, "max_window_layers": 1},
    {"layer_pattern": ("window",)},
  ),
  "qwen3, 5 heads read 1, biases": (
    QWEN3,
    {
      "num_attention_heads": 5,
      "num_key_value_heads": 1,
      "attention_bias": True,
    },
    None,
  ),
  "qwen3, windows from layer 2 on, untied": (
    QWEN3,
    {
      "use_sliding_window": True,
      "max_window_layers": 2,
      "sliding_window": parity.WINDOW,
      "tie_word_embeddings": False,
    },
    {"layer_pattern": ("full",), "window": None},
  ),
  "smollm3, every second layer rotates": (
    SMOLLM3,
    {"no_rope_layers": [1, 0] * 3},
    {"layer_pattern": ("full",)},
  ),
  "phi3, 6 heads read 2": (PHI3, {"num_key_value_heads": 2}, None),
  "phi3, three quarters of a longrope head rotate": (
    PHI4,
    {
      "hidden_size": 64,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.5, 2.5, 4.0, 1.0, 2.0, 3.0],
        "long_factor": [9.0] * 6,
      },
    },
    UNSCALED,
  ),
  "olmo2, 6 heads read 2, biases": (
    OLMO2,
    {"num_key_value_heads": 2, "attention_bias": True},
    None,
  ),
  "gemma2, 5 layers, without softcaps, untied": (
    GEMMA2,
    {
      "num_hidden_layers": 5,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "query_pre_attn_scalar": 24,
      "tie_word_embeddings": False,
    },
    {"attention_scale": None},
  ),
  "gemma2, tight softcaps": (
    GEMMA2,
    {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0},
    {"attention_softcap": None},
  ),
  "gemma3, windows only": (
    GEMMA3,
    {"layer_types": ["sliding_attention"] * 8},
    {"window": parity.WINDOW + 1},
  ),
}


def _families():
  """The first published configuration of each family."""
  out = {}
  for name in parity.SUPPORTED:
    out.setdefault(published.PUBLISHED[name]["model_type"], name)
  return out


@pytest.fixture
def show(capsys):
  """Prints a line of numbers; to stderr, which xdist's workers keep."""

  def show(name, numbers):
    line = "  ".join(f"{key} {value:.1e}" for key, value in numbers.items())
    with capsys.disabled():
      print(f"\n{name:46s} {line}", end="", file=sys.stderr, flush=True)

  return show


def forward(model):
  """(params, batch) -> logits of every position, log-probs of the scored."""

  @jax.jit
  def forward(params, batch):
    hidden, head = model.apply(params, batch)
    logps = base.token_logps(lambda *_: (hidden, head), params, batch, 7)
    return logprobs.logits(hidden, head), logps

  return forward


def theirs(torch_model, ids):
  """Logits [T, V] of one sequence."""
  import torch

  with torch.no_grad():
    return torch_model(torch.tensor([ids])).logits[0].numpy()


def log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(logits))


def difference(got, want):
  return float(np.max(np.abs(np.asarray(got) - np.asarray(want))))


def measure(raw, folder, *, decode, fault):
  """{what: largest absolute difference} from transformers."""
  torch_model = parity.save(raw, folder)
  model, params = parity.load(folder, parity.mesh())
  packed = worlds.batch(ITEMS, row_multiple=LAYOUT.row_multiple)
  assert packed["example_id"].shape[1] > 2  # several examples in a row
  rng = np.random.default_rng(0)
  plain_ids = rng.integers(0, parity.VOCAB, (2, LENGTH)).tolist()
  want = np.stack([theirs(torch_model, ids) for ids in plain_ids])
  plain = _plain(plain_ids)
  run, numbers = forward(model), {}

  def logits(run):
    return run(params, plain)[0][:, :LENGTH, : parity.VOCAB]

  numbers["logits"] = difference(logits(run), want)
  got = parity.by_completion(run(params, packed)[1], packed)
  single = _completion_logps(torch_model)
  assert got.keys() == single.keys()
  numbers["packed"] = max(difference(got[k], single[k]) for k in got)
  numbers["completion"] = max(
    difference(got[k].sum(), single[k].sum()) for k in got
  )
  if decode:
    got = _decoded(model, params, np.asarray(plain_ids))
    numbers["decode"] = difference(got, want)
  if fault is not None:
    config = dataclasses.replace(model.config, **fault)
    assert config != model.config
    faulty = transformer.build(config, model.vocab_size)
    numbers["fault"] = difference(logits(forward(faulty)), want)
  return numbers


def _plain(ids):
  """A batch of whole sequences, one a row, in the shape of ITEMS' batch."""
  examples = [
    worlds.tokenize.Example(i, 0, row[:1], (row[1:],), ())
    for i, row in enumerate(ids)
  ]
  need = rows.needs(ITEMS, LAYOUT)
  shape = rows.needed_shape(need, rows.assign(need.length, LAYOUT))
  return rows.build([[example] for example in examples], shape, LAYOUT)


def _completion_logps(torch_model):
  """{(example, completion): log-probs}, each sequence alone."""
  out = {}
  for example in ITEMS:
    for c, completion in enumerate(example.completions):
      logps = log_softmax(theirs(torch_model, example.prompt + completion))
      at = len(example.prompt) - 1 + np.arange(len(completion))
      out[example.example_id, c] = logps[at, completion]
  return out


def _decoded(model, params, ids):
  """Logits of a prefill longer than the window, then of one step a token."""
  decode, cache = jax.jit(model.decode), model.init_cache(2, LENGTH + 3)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
  out, start = [], 0
  for end in range(parity.WINDOW + 2, LENGTH + 1):
    here = slice(start, end)
    logits, cache = decode(params, ids[:, here], positions[:, here], cache)
    out.append(logits)
    start = end
  return np.concatenate(out, axis=1)[..., : parity.VOCAB]


def assert_equal_up_to_rounding(numbers):
  for what, tolerance in TOLERANCE.items():
    assert numbers.get(what, 0.0) <= tolerance, (what, numbers)
  # A fault is no rounding: ten times the tolerance.
  assert numbers.get("fault", 1.0) >= 10 * TOLERANCE["logits"], numbers


@pytest.mark.parametrize("name", parity.SUPPORTED)
def test_a_published_architecture_computes_what_transformers_does(
  name, tmp_path, show
):
  decode = name in _families().values()
  numbers = measure(
    parity.small(name), tmp_path, decode=decode, fault=FAULTS.get(name)
  )
  show(name, numbers)
  assert_equal_up_to_rounding(numbers)


def test_every_family_has_a_published_configuration():
  assert _families().keys() == families.FAMILIES.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_an_architecture_computes_what_transformers_does(
  name, tmp_path, show
):
  published_name, changes, fault = VARIANTS[name]
  raw = parity.small(published_name, **changes)
  numbers = measure(raw, tmp_path, decode=False, fault=fault)
  show(name, numbers)
  assert_equal_up_to_rounding(numbers)
