"""Losses that couple the comparisons of a batch."""

import jax
import numpy as np
import pytest

from dpo_jax.ops import losses
from tests.ops import loss_cases


def test_the_state_of_bco_is_the_mean_over_steps():
  case = loss_cases.of("bco", beta=0.5)
  running, means = {"mean": np.float64(0), "count": np.float64(0)}, []
  for seed in range(3):
    values = {**loss_cases.values_of(case, seed), "running": running}
    rewards = 0.5 * (values["policy_logps"] - values["ref_logps"])
    means.append(np.average(np.mean(rewards, -1), weights=values["weights"]))
    for dialect in ("trl_1", "paper"):
      fields = {"dialect": dialect}
      with jax.enable_x64(True):
        out = loss_cases.out_of(
          case, loss_cases.cast(values, "float64"), fields
        )
      running = jax.tree.map(np.asarray, out["running"])
      assert running["count"] == seed + 1
      np.testing.assert_allclose(running["mean"], np.mean(means), rtol=1e-12)
      if dialect == "trl_1":
        running = values["running"]


COUPLED = pytest.mark.parametrize(
  "name", [name for name, loss in losses.LOSSES.items() if loss.batch_level]
)


def rearranged(values, change):
  """The comparisons of a batch, as one row, through `change`."""
  return {
    name: value
    if name == "running"
    else change(value.reshape(1, 6, *value.shape[2:]))
    for name, value in values.items()
  }


def of_real(case, values, scale):
  """Losses and gradients by the log-probs, in f32."""
  (loss, _), gradients = loss_cases.value_and_gradients(
    case, values, scale, "float32"
  )
  return np.asarray(loss), np.asarray(gradients["policy_logps"])


@COUPLED
@pytest.mark.parametrize("garbage", [1e4, -1e4, 0.0, np.inf, np.nan])
def test_padding_anywhere_changes_no_other_comparison(name, garbage):
  case, places = loss_cases.of(name), [1, 2, 3, 5, 6, 8]

  def padded(value, filling=garbage):
    out = np.full((1, 9, *value.shape[2:]), filling)
    out[:, places] = value
    return out

  values = rearranged(loss_cases.values_of(case, seed=0), np.asarray)
  scale = loss_cases.pull(case, values)
  more = rearranged(values, padded)
  more["weights"] = padded(values["weights"], 0.0)
  loss, gradient = of_real(case, values, scale)
  other, other_gradient = of_real(case, more, padded(scale, 0.0))
  real = scale[0] != 0
  # Sums of f32 in another order.
  np.testing.assert_allclose(
    other[:, places][:, real], loss[:, real], rtol=1e-6
  )
  np.testing.assert_allclose(
    other_gradient[:, places][:, real], gradient[:, real], rtol=1e-5, atol=1e-7
  )
  if np.isfinite(garbage):
    assert np.all(np.isfinite(other))
    np.testing.assert_array_equal(np.delete(other_gradient, places, 1), 0.0)


@COUPLED
def test_permuting_a_batch_permutes_its_losses(name):
  case, order = loss_cases.of(name), [4, 0, 5, 3, 1, 2]
  values = rearranged(loss_cases.values_of(case, seed=0), np.asarray)
  scale = loss_cases.pull(case, values)
  moved = rearranged(values, lambda value: value[:, order])
  real = scale[0] != 0
  for got, want in zip(
    of_real(case, moved, scale[:, order]),
    of_real(case, values, scale),
    strict=True,
  ):
    got, want = got[:, real[order]], want[:, order][:, real[order]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
