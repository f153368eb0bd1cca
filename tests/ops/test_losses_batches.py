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
  """The comparisons of a batch, in rows of three, through `change`."""

  def moved(value):
    value = change(value.reshape(6, *value.shape[2:]))
    return value.reshape(-1, 3, *value.shape[1:])

  return {k: v if k == "running" else moved(v) for k, v in values.items()}


def of_real(case, values, scale):
  """Losses and gradients by the log-probs, in f32, of one row."""
  (loss, _), gradients = loss_cases.value_and_gradients(
    case, values, scale, "float32"
  )
  slopes = gradients["policy_logps"]
  return loss.reshape(-1), slopes.reshape(-1, slopes.shape[-1])


@COUPLED
@pytest.mark.parametrize("garbage", [1e4, -1e4, 0.0, np.inf, np.nan])
def test_padding_anywhere_changes_no_other_comparison(name, garbage):
  case, places = loss_cases.of(name), [1, 2, 3, 5, 6, 8]

  def padded(value, filling=garbage):
    out = np.full((9, *value.shape[1:]), filling)
    out[places] = value
    return out

  values = loss_cases.values_of(case, seed=0)
  scale = loss_cases.pull(case, values)
  more = rearranged(values, padded)
  none = {"weights": values["weights"], "scale": scale}
  none = rearranged(none, lambda value: padded(value, 0.0))
  more["weights"] = none["weights"]
  loss, gradient = of_real(case, values, scale)
  other, other_gradient = of_real(case, more, none["scale"])
  real = scale.reshape(6) != 0
  # Sums of f32 in another order.
  np.testing.assert_allclose(other[places][real], loss[real], rtol=1e-6)
  np.testing.assert_allclose(
    other_gradient[places][real], gradient[real], rtol=1e-5, atol=1e-7
  )
  if np.isfinite(garbage):
    assert np.all(np.isfinite(other))
    np.testing.assert_array_equal(np.delete(other_gradient, places, 0), 0.0)


@COUPLED
def test_permuting_a_batch_permutes_its_losses(name):
  case, order = loss_cases.of(name), [4, 0, 5, 3, 1, 2]
  values = loss_cases.values_of(case, seed=0)
  scale = loss_cases.pull(case, values)
  moved = rearranged({**values, "scale": scale}, lambda value: value[order])
  moved_scale = moved.pop("scale")
  real = (scale.reshape(6) != 0)[order]
  for got, want in zip(
    of_real(case, moved, moved_scale),
    of_real(case, values, scale),
    strict=True,
  ):
    np.testing.assert_allclose(
      got[real], want[order][real], rtol=1e-5, atol=1e-7
    )
