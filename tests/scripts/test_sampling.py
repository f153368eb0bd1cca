"""The comparison with transformers' generate: arithmetic and command."""

import pytest

from dpo_jax.models import config as model_config
from scripts.bench import cases, sampling


def test_the_needed_work_counts_each_token_once_and_the_weights_by_token():
  options = sampling.parser().parse_args(["--model=micro", "--tokens=3"])
  c, vocab_size = model_config.PRESETS["micro"], cases.VOCABULARY["micro"]
  flops, read = sampling.work(options, [2, 4])
  layers = c.layers * (
    c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    + c.embed * c.mlp * (3 if c.gated else 2)
  )
  head = c.embed * vocab_size
  # Two prompts and two of the three tokens of each are read, three are drawn;
  # 1 … 4 and 1 … 6 keys are seen.
  attention = 4 * c.layers * c.heads * c.head_dim * (10 + 21)
  assert flops == 2 * ((6 + 4) * layers + 6 * head) + attention
  assert read == 4 * (layers + head) * 3


@pytest.mark.slow
@pytest.mark.optimised
def test_the_command_says_the_ratio_and_the_distance_to_the_bound(capsys):
  arguments = ["--model=micro", "--tokens=4", "--rounds=1", "--prompts=4"]
  sampling.main(arguments)
  printed = capsys.readouterr().out
  for said in ("4 prompts of", "generate", "bound:", "ours takes ×"):
    assert said in printed
