"""What is read of a config before anything else is loaded."""

import subprocess
import sys

import pytest

from dpo_jax.config import load
from dpo_jax.train import optimizers
from tests import conftest

CONFIGS = "from configs import dpo, judge, quickstart, sft, smollm2"


@pytest.mark.parametrize(
  "code",
  [
    CONFIGS,
    f"{CONFIGS}; dpo.get_config('loss=mpo,lora'); dpo.get_config("
    "'loss=ipo,divergence=alpha,ref=ema'); sft.get_config('smoke')",
    "from dpo_jax import cli; assert cli.main(['train', "
    "'--config=configs/dpo.py:loss=ipso']) == 2",
    "from dpo_jax import cli; assert cli.main(['help']) == 0",
    "from dpo_jax.ops.losses import LOSSES, Loss; LOSSES['mine'] = Loss(max);"
    "from configs import losses; assert losses.loss('mine').name == 'mine'",
  ],
)
def test_a_config_and_a_mistake_in_it_need_no_jax(code):
  check = "import sys; assert not {'jax', 'flax', 'optax'} & set(sys.modules)"
  subprocess.run(
    [sys.executable, "-c", f"{code}; {check}"], check=True, cwd=conftest.ROOT
  )


@pytest.mark.parametrize(
  ("config", "rate"),
  [
    ("dpo:optim=adamw", 3e-4),
    ("sft:optim=adamw", 1e-3),
    ("dpo:optim=sgd", 0.01),
  ],
)
def test_an_argument_selects_the_optimiser_with_its_own_fields(config, rate):
  """The rate is the config's, of all that divide a gradient by its size."""
  name = config.rpartition("=")[2]
  fields = load.load_config(config).optim.to_dict()
  own = optimizers.OPTIMIZERS[name].defaults
  assert fields.pop("name") == name
  assert fields.pop("learning_rate") == rate
  assert fields.pop("warmup") == 10
  rest = {**own, **optimizers.COMMON}
  assert fields == {
    k: rest[k] for k in rest.keys() - {"learning_rate", "warmup"}
  }


def test_a_wrong_optimiser_gets_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'adamw'"):
    load.load_config("dpo:optim=adam")
