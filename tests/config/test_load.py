"""What is read of a config before anything else is loaded."""

import subprocess
import sys

import pytest

from tests import conftest

CONFIGS = "from configs import dpo, quickstart, sft, smollm2"


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
