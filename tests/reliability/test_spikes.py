"""R12: a gradient far above those before it is refused, if the config asks.

In runs a spike is injected by a β that is far above its own.
"""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loop
from dpo_jax.config import saved
from dpo_jax.run import build
from dpo_jax.train import guard
from dpo_jax.train import state as state_lib
from tests.reliability import test_non_finite as non_finite
from tests.train import test_step

LIMIT = 3.0


def counted(norms, limit=LIMIT, finite=True):
  """(accepted of each, counts at last) of updates with these norms."""
  judge = jax.jit(guard.judge, static_argnums=3)
  state, accepted = guard.create(limit), []
  for norm in norms:
    accept, state = judge(state, jnp.asarray(finite), jnp.float32(norm), limit)
    accepted.append(bool(accept))
  return accepted, {k: float(x) for k, x in state.items()}


def test_a_norm_far_above_the_mean_of_those_before_is_refused():
  steady = [1.0, 2.0] * 20
  accepted, counts = counted([*steady, 4.6, 4.4])
  assert accepted == [True] * 40 + [False, True]
  assert (counts["spikes"], counts["row"], counts["total"]) == (1, 0, 0)
  # It counts for as much as would have been let through.
  assert (
    counted([*steady, 4.6])[1]["norm"] == counted([*steady, 1e30])[1]["norm"]
  )


def test_no_spike_is_told_from_few_updates():
  accepted, counts = counted([1e-3, *[1.0] * 19])
  assert all(accepted)
  np.testing.assert_allclose(counts["norm"], 0.95005, rtol=1e-5)  # plain mean


@pytest.mark.parametrize("rise", [4.0, 100.0])
def test_norms_that_stay_large_are_taken_in_the_end(rise):
  accepted, _ = counted([1.0] * 50 + [rise] * 250)
  refused = accepted.count(False)
  assert 0 < refused <= 50 * math.log(rise / LIMIT) / (LIMIT - 1) * 1.1 + 1
  assert all(accepted[50 + refused :])


def test_a_gradient_of_zero_for_a_while_is_no_measure():
  accepted, _ = counted([0.0] * 30 + [1.0] * 5)
  assert all(accepted)


def test_what_is_not_finite_is_no_spike_and_does_not_touch_the_mean():
  _, before = counted([1.0] * 30)
  judge, state = guard.judge, guard.create(LIMIT)
  state = {k: state[k].dtype.type(x) for k, x in before.items()}
  accept, after = judge(state, jnp.asarray(False), jnp.float32("nan"), LIMIT)
  assert not accept
  assert {k: float(x) for k, x in after.items()} == {
    **before,
    **dict.fromkeys(("row", "longest", "total"), 1.0),
  }


def test_a_spike_changes_nothing_but_its_count():
  step, state, hparams = test_step.shared("rmsprop", max_spike=LIMIT)
  first, _ = step(state, hparams)
  calm = {
    **first.skipped,
    "seen": jnp.int32(30),
    "norm": first.skipped["norm"] / 10,
  }
  spiked, metrics = step(first.replace(skipped=calm), hparams)
  jax.tree.map(np.testing.assert_array_equal, spiked.params, first.params)
  jax.tree.map(np.testing.assert_array_equal, spiked.opt_state, first.opt_state)
  assert (metrics["skipped/spikes"], metrics["skipped/total"]) == (1, 0)
  assert int(spiked.step) == 2


def spiking(run, at, total):
  """The run up to step `total`, the gradient of step `at` far too large."""

  def step(state, batch, hparams):
    if int(state.step) + 1 == at:
      hparams = {**hparams, "beta": np.float32(50 * hparams["beta"])}
    return run.step(state, batch, hparams)

  return run._replace(step=step, total=total)


@pytest.mark.slow
def test_a_spike_in_a_run_is_refused_told_and_found_again_by_a_resumed_run(
  tmp_path, capsys
):
  """The running mean is in the checkpoint."""
  # At so small a rate all gradients stay those of the first step.
  config = non_finite.load(
    *("optim.max_spike=4", "train.steps=26", "optim.learning_rate=1e-7"),
  )
  run = build.prepare(config)
  whole = loop.fit(config, tmp_path / "whole", spiking(run, 24, 26)).state
  out = capsys.readouterr().out
  assert "done: 26 steps in" in out
  assert out.endswith("; updates refused as spikes: 1\n")
  assert non_finite.rows_of(tmp_path / "whole")[-1]["skipped/spikes"] == 1
  loop.fit(config, tmp_path / "run", spiking(run, 24, 23))
  state = loop.fit(config, tmp_path / "run", spiking(run, 24, 26)).state
  assert state_lib.fingerprint(state_lib.saved(state)) == (
    state_lib.fingerprint(state_lib.saved(whole))
  )


def test_without_the_guard_nothing_of_it_is_in_the_state_or_the_program():
  counts = guard.create(None)
  assert counts.keys() == {"row", "longest", "total"}
  assert "skipped/spikes" not in guard.metrics(counts)
  # A norm that is none would be an error, if it was read.
  accept, after = guard.judge(counts, jnp.asarray(True), None, None)
  assert accept
  assert after.keys() == counts.keys()


def test_runs_of_before_resume_without_the_guard_and_no_run_with_another():
  now = non_finite.load().to_dict()
  before = copy.deepcopy(now)
  del before["optim"]["max_spike"]
  saved.check_config(before, now, "there")
  guarded = non_finite.load("optim.max_spike=4").to_dict()
  with pytest.raises(ValueError, match=r"optim.max_spike \(saved None, now 4"):
    saved.check_config(before, guarded, "there")
