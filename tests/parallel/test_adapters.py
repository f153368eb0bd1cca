"""An adapter trains to the same values whatever the devices and the base."""

import functools
import itertools

import jax
import numpy as np
import pytest

from dpo_jax import tree
from dpo_jax.config import load
from dpo_jax.run import build, trained
from tests import conftest

DEVICES = {
  "2x2x2": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
  "pmap": ["mesh.mode=pmap"],
  "2x2x2, two microbatches": [
    *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulation=2")
  ],
}


def adapter_after_two_steps(overrides):
  """The adapter, and the sharding of the base's first query kernel."""
  config = load.load_config(
    "configs/dpo.py:lora,smoke",
    ["train.steps=2", "data.batch_size=16", *overrides],
  )
  run = build.prepare(config)
  state = build.initial_state(run, trained.initial(run.setup))
  step = run.step
  for number in range(2):
    batch, _ = run.feed.batch(number, None)
    state, _ = step(state, batch, run.hparams)
  kernel = jax.tree.leaves(state.frozen["base"]["layers"]["attn"]["q"])[0]
  return jax.device_get(state.params), kernel.sharding.spec


@functools.cache
def on_one_device(base):
  """The adapter of the first of the eight devices alone."""
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: one)
    return adapter_after_two_steps([f"lora.base={base}"])[0]


FAST = [("2x2x2, two microbatches", "nf4")]


@pytest.mark.parametrize(
  ("devices", "base"),
  [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(DEVICES, ("float32", "nf4"))
  ],
)
def test_devices_change_nothing_of_a_trained_adapter(
  devices, base, monkeypatch
):
  monkeypatch.chdir(conftest.ROOT)
  overrides = [f"lora.base={base}", *DEVICES[devices]]
  got, spec = adapter_after_two_steps(overrides)
  if devices != "pmap":
    assert spec[1:3] == ("fsdp", "tensor")
  want = on_one_device(base)
  for (path, a), (_, b) in zip(tree.named(got), tree.named(want), strict=True):
    # After RMSprop, which turns the sign of a gradient near 0 into a step of
    # full size: of the leaf's norm, not of each element.
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < 1e-3, (path, error)
