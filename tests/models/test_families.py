"""Published architectures compute what transformers computes, in numbers.

Small random models with every published field but the sizes, in f32. Each test
prints a line of the largest absolute differences:

    logits      of sequences longer than the window
    packed      log-probs in nats of single tokens, of rows that share prompts,
                against one sequence prompt + completion at a time
    completion  sums of these over a completion
    decode      logits of a prefill and single steps with the cache
    exported    logits of what was written, loaded by transformers
    fault       logits with a fault planted in the config: what the tolerance
                has to catch
    gradient    of the DPO loss, relative; of the worst leaf
"""

import jax
import numpy as np
import pytest

from configs import base as base_config
from dpo_jax import tree
from dpo_jax.algos import preference
from dpo_jax.models import config as model_config
from dpo_jax.models import families, keys
from dpo_jax.ops import reduce
from tests import worlds
from tests.models import parity, published

pytestmark = pytest.mark.slow

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
PHI4 = "microsoft/Phi-4-mini-instruct"
OLMO2 = "allenai/OLMo-2-1124-7B"

# Grouped heads; learned positions and a tied head; windows, norms on both
# sides, and layers beyond whole periods.
GRADIENTS = (LLAMA3, "gpt2", PYTHIA, GEMMA3)
BETA = 0.1

# What of a ModelConfig tells the architecture from its nearest relative.
FAULTS = {
  "gpt2": {"activation": "gelu"},
  PYTHIA: {"rotary_dim": 4},
  GPTJ: {"rotary_dim": 2},
  LLAMA: {"norm_eps": 1e-6},
  MISTRAL: {"window": parity.WINDOW + 1},
  QWEN3: {"rope_theta": 1e4},
  GEMMA2: {"attention_scale": None},
  GEMMA3: {"window_theta": None},
  "google/gemma-3-4b-pt": {"attention_scale": None},
  SMOLLM3: {"layer_pattern": ("full",) * 4},
  PHI3: {"window": parity.WINDOW - 1},
  "microsoft/Phi-3-mini-128k-instruct": {"rope_scaling": None},
  PHI4: {"rope_scaling": None},
  OLMO2: {"norm_eps": 1e-5},
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
    {"rope_scaling": None},
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


@pytest.mark.parametrize("name", parity.SUPPORTED)
def test_a_published_architecture_computes_what_transformers_does(
  name, tmp_path, capsys
):
  decode = name in _families().values()
  raw, fault = parity.small(name), FAULTS.get(name)
  numbers = parity.measure(
    raw, tmp_path, decode=decode, export=True, fault=fault
  )
  parity.show(capsys, name, numbers)
  parity.assert_equal_up_to_rounding(numbers)


def test_shapes_that_are_known_by_a_name_are_those_published_under_it():
  """In what costs memory or FLOPs; a preset may read less far."""
  seen = 0
  for name, (preset, vocab_size) in model_config.PUBLISHED.items():
    raw = published.PUBLISHED.get(name)
    raw = published.PUBLISHED["gpt2"] if name.endswith("/gpt2") else raw
    if raw is None:
      continue
    seen += 1
    want, size = families.read(raw)
    known = model_config.PRESETS[preset]
    assert size == vocab_size
    for field in ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp"):
      assert getattr(known, field) == getattr(want, field), (name, field)
    for field in ("position", "residual", "norm", "gated", "tied", "head_bias"):
      assert getattr(known, field) == getattr(want, field), (name, field)
  assert seen == 4


def test_every_family_has_a_published_configuration():
  assert _families().keys() == families.FAMILIES.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_an_architecture_computes_what_transformers_does(
  name, tmp_path, capsys
):
  published_name, changes, fault = VARIANTS[name]
  raw = parity.small(published_name, **changes)
  numbers = parity.measure(raw, tmp_path, fault=fault)
  parity.show(capsys, name, numbers)
  parity.assert_equal_up_to_rounding(numbers)


def _our_gradient(model, params, ref_logps):
  """(mean DPO loss over all pairs, its gradient), of packed rows."""
  batch = worlds.batch(parity.ITEMS, row_multiple=2)
  ref = np.zeros(batch["target_slot"].shape, np.float32)
  for (row, at), slot in np.ndenumerate(batch["target_slot"]):
    p, c = divmod(int(slot), batch["completion_weights"].shape[2])
    if p < batch["example_id"].shape[1]:
      # All of a completion's reference log-prob on each token, in parts.
      count = int((batch["target_slot"][row] == slot).sum())
      ref[row, at] = ref_logps[int(batch["example_id"][row, p]), c] / count
  batch["ref_token_logps"] = ref
  config = base_config.get_config()
  config.ref = "cached"
  algorithm = preference.make(config, model.apply)
  hparams = {"beta": BETA, "label_smoothing": 0.0}

  def loss(params):
    terms = algorithm.objective(params, {}, batch, hparams)
    return reduce.means(terms.losses)["dpo"]

  return jax.jit(jax.value_and_grad(loss), compiler_options=parity.FAST)(params)


def _torch_gradient(torch_model, ref_logps):
  """(loss, {name of a tensor: gradient}), each sequence alone."""
  import torch

  losses = []
  for example in parity.ITEMS:
    ratios = []
    for c, completion in enumerate(example.completions):
      ids = torch.tensor([example.prompt + completion])
      logps = torch_model(ids).logits[0].log_softmax(-1)
      first = len(example.prompt) - 1
      scored = logps[first:-1].gather(1, ids[0, first + 1 :, None]).sum()
      ratios.append(scored - ref_logps[example.example_id, c])
    losses += [
      -torch.nn.functional.logsigmoid(BETA * (ratios[w] - ratios[l]))
      for w, l, _ in example.pairs
    ]
  loss = torch.stack(losses).mean()
  loss.backward()
  named = torch_model.named_parameters()
  return loss.item(), {name: p.grad.numpy() for name, p in named}


def _in_our_layout(tensors, raw, config, like):
  """{path: array} of torch's tensors, in the shapes of `like`."""
  wanted = keys.tensors(
    families.find(raw).table,
    config,
    {path: x.shape for path, x in like.items()},
    parity.VOCAB,
  )
  out = {path: np.zeros(x.shape, np.float32) for path, x in like.items()}
  for name, tensor in wanted.items():
    # NeoX's head has another name in torch than in files.
    x = tensors.get(name, tensors.get("lm_head.weight"))
    leaves = keys.to_leaves(x, tensor, config.rotary_dim)
    for place, leaf in zip(tensor.places, leaves, strict=True):
      layer = slice(None) if place.layer is None else place.layer
      at = tuple(map(slice, leaf.shape))
      out[place.path][layer][at] = leaf  # what pads the vocabulary stays 0
  return out


@pytest.mark.parametrize("name", GRADIENTS)
def test_dpo_gradients_equal_those_of_torch(name, tmp_path, capsys):
  """To 1e-5 of each leaf's norm; rounding is at 1e-6."""
  raw = parity.small(name)
  if "pad_token_id" in raw:  # torch gives its embedding no gradient
    raw["pad_token_id"] = parity.VOCAB - 1
  torch_model = parity.save(raw, tmp_path)
  model, params = parity.load(tmp_path, parity.mesh())
  rng = np.random.default_rng(1)
  ref_logps = {
    (e.example_id, c): -5.0 * len(ids) + rng.normal()
    for e in parity.ITEMS
    for c, ids in enumerate(e.completions)
  }
  want_loss, tensors = _torch_gradient(torch_model, ref_logps)
  loss, gradient = _our_gradient(model, params, ref_logps)
  got = dict(tree.named(gradient))
  want = _in_our_layout(tensors, raw, model.config, got)
  whole = np.sqrt(sum(np.sum(x**2) for x in want.values()))
  errors = {}
  for path, x in want.items():
    size = np.linalg.norm(x)
    # A constant added to all keys of learned positions cancels in the softmax:
    # that bias has no gradient, and what is left is rounding.
    size = size if size > 1e-6 * whole else whole
    errors[path] = float(np.linalg.norm(np.asarray(got[path]) - x) / size)
  worst = max(errors, key=errors.get)
  parity.show(capsys, f"{name}, gradient", {f"of {worst}": errors[worst]})
  assert len(errors) > 8
  assert abs(float(loss) - want_loss) < 1e-5
  assert errors[worst] <= 1e-5, errors
