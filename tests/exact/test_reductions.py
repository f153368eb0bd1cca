"""Which losses reduce to which (PAPER 4.4, nos. 7 and 11)."""

import jax
import numpy as np
import pytest

from dpo_jax.ops import losses
from dpo_jax.ops.losses import divergences
from tests.exact import algebra, checks
from tests.exact import world as world_lib


def test_unlikelihood_pulls_as_dpo_does_without_its_weight():
  """−(∇ log π_w − α ∇ log π_l), Σ over the comparisons."""
  world, alpha = checks.WORLD, 0.3
  f, data = world_lib.objective("unlikelihood", world, alpha=alpha)
  z = world.ref + np.random.default_rng(1).normal(size=world.ref.shape)
  found = world_lib.compute(jax.vmap(jax.grad(f)), z, *data)
  won, lost = world.wins.sum(2), world.wins.sum(1)
  policy = np.exp(world_lib.normalised(z))
  # ∇ log π(y) = e_y − π, and both sums are 1.
  want = -(won - policy - alpha * (lost - policy))
  assert np.abs(found - want).max() < 1e-6


POLICY, REF = algebra.random_logps(50, 2)
LENGTHS = np.random.default_rng(4).integers(1, 9, (50, 2)).astype(float)
KL = np.random.default_rng(5).random((50, 2))
SCORES = np.array([3.0, 1.0]) + 0 * POLICY


# name, its arguments, those of DPO.
REDUCTIONS = {
  "robust/ε=0": ("robust", {"label_smoothing": 0.0}),
  "r_dpo/α=0": ("r_dpo", {"alpha": 0.0, "lengths": LENGTHS}),
  "odpo/α=0": ("odpo", {"alpha": 0.0, "scores": SCORES}),
  "dpop/λ=0": ("dpop", {"penalty": 0.0}),
  "tdpo2/α=0": ("tdpo2", {"alpha": 0.0, "sequence_kl": KL}),
  "tdpo1/no KL": ("tdpo1", {"sequence_kl": 0 * KL}),
  "ld_dpo/α=1": (
    "ld_dpo",
    {"alpha": 1.0, "prefix_logps": POLICY / 2, "ref_prefix_logps": REF / 2},
  ),
  "ln_dpo/n=1": ("ln_dpo", {"lengths": 1 + 0 * LENGTHS}),
  "sampo/all": ("sampo", {"common_logps": POLICY, "ref_common_logps": REF}),
  "wpo/w=1": (
    "wpo",
    {
      "lengths": LENGTHS,
      "sum_sq_probs": POLICY,
      "dialect": "paper",
    },
  ),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_is_dpo(case):
  name, kwargs = REDUCTIONS[case]
  found = algebra.loss_of(name, POLICY, REF, beta=0.4, **kwargs)
  want = algebra.loss_of("dpo", POLICY, REF, beta=0.4, label_smoothing=0.0)
  np.testing.assert_allclose(found, want, rtol=1e-12)


def test_the_alpha_divergence_at_one_is_the_reverse_kl():
  fn = divergences.under("alpha", losses.LOSSES["dpo"].fn)
  fields = {"beta": 0.4, "label_smoothing": 0.1}

  def loss(policy, ref):
    return fn(policy, ref, divergence_alpha=1.0, **fields)["loss"]

  found = world_lib.compute(loss, POLICY, REF)
  want = algebra.loss_of("dpo", POLICY, REF, **fields)
  np.testing.assert_allclose(found, want, rtol=1e-12)


def test_robust_dpo_averaged_over_flips_is_dpo_on_the_clean_label():
  fields = {"beta": 0.4, "label_smoothing": 0.2}
  kept = algebra.loss_of("robust", POLICY, REF, **fields)
  turned = algebra.loss_of("robust", POLICY[:, ::-1], REF[:, ::-1], **fields)
  clean = algebra.loss_of("dpo", POLICY, REF, beta=0.4, label_smoothing=0.0)
  np.testing.assert_allclose(0.8 * kept + 0.2 * turned, clean, rtol=1e-12)


def test_dpo_averaged_over_flips_is_dpo_with_label_smoothing():
  kept = algebra.loss_of("dpo", POLICY, REF, beta=0.4, label_smoothing=0.0)
  turned = algebra.loss_of(
    "dpo", POLICY[:, ::-1], REF[:, ::-1], beta=0.4, label_smoothing=0.0
  )
  smoothed = algebra.loss_of("dpo", POLICY, REF, beta=0.4, label_smoothing=0.2)
  np.testing.assert_allclose(0.8 * kept + 0.2 * turned, smoothed, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1e-5])
def test_alphapo_tends_to_simpo(alpha):
  fields = {"beta": 2.0, "gamma": 0.5, "lengths": LENGTHS}
  found = algebra.loss_of("alphapo", POLICY, REF, alpha=alpha, **fields)
  want = algebra.loss_of("simpo", POLICY, REF, **fields)
  # (1 − e^(−α l)) / α = l − α l² / 2 …, with |l| up to 10 and β = 2.
  np.testing.assert_allclose(found, want, rtol=1e-12, atol=200 * alpha)
