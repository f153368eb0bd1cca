"""What must hold of the DPO loss in the exact world, as functions that raise.

Ordinary tests call them on the code as it is, and expect silence; the tests of
planted bugs call them on broken code, and expect an AssertionError.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from dpo_jax.ops import losses
from tests.exact import world as world_lib

WORLD = world_lib.make()


def learned(world=WORLD, betas=world_lib.BETAS):
  """(World by β and prompt, β, learned log π, loss) of DPO."""
  tiled, beta = world_lib.tile(world, betas)
  policy, loss = world_lib.learn("dpo", tiled, beta=beta, label_smoothing=0.0)
  return tiled, beta, policy, loss


def closed_form():
  """DPO's minimiser is π_ref e^(r/β) / Z."""
  world, beta, policy, _ = learned()
  want = world_lib.optimum(world, beta[:, None])
  # Newton's method in f64 ends at rounding: 4e-14 seen.
  assert np.abs(policy - want).max() < 1e-10
  assert world_lib.total_variation(policy, want).max() < 1e-5
  assert world_lib.kl(policy, want).max() < 1e-8


def implicit_reward():
  """r* − β Δ is the same for all answers of a prompt, and it is β log Z."""
  world, beta, policy, _ = learned()
  left = world.reward - beta[:, None] * (policy - world.ref)
  spread = left - left.mean(-1, keepdims=True)
  assert np.abs(spread).max() < 1e-4
  constant = beta * world_lib.log_partition(world, beta[:, None])
  assert np.abs(left.mean(-1) - constant).max() < 1e-4


def loss_floor():
  """The least loss is the entropy of the labels; π_ref's is log 2."""
  world, beta, _, loss = learned()
  p = world_lib.beats(world.reward)
  entropy = -np.sum(world.wins * np.log(p), axis=(1, 2))
  assert np.abs(loss - entropy).max() < 1e-8
  at_ref, data = world_lib.objective(
    "dpo", world, beta=beta, label_smoothing=0.0
  )
  start = world_lib.compute(jax.vmap(at_ref), world.ref, *data)
  assert np.abs(start - np.log(2)).max() < 1e-12


def gradient_identity():
  """Autodiff, −β Σ wins σ(−βh) (∇ log π_w − ∇ log π_l), differences."""
  world, beta = world_lib.tile(WORLD, world_lib.BETAS)
  fields = {"beta": beta, "label_smoothing": 0.0}
  f, data = world_lib.objective("dpo", world, **fields)
  z = world.ref + np.random.default_rng(1).normal(size=world.ref.shape)
  found = world_lib.compute(jax.vmap(jax.grad(f)), z, *data)

  ratios = world_lib.normalised(z) - world.ref
  h = ratios[:, :, None] - ratios[:, None, :]
  weight = world.wins * scipy.special.expit(-beta[:, None, None] * h)
  # ∇ log π_w − ∇ log π_l of logits: the normaliser cancels.
  want = -beta[:, None] * (weight.sum(2) - weight.sum(1))
  assert np.abs(found - want).max() < 1e-6

  step = 1e-5
  moves = step * np.eye(z.shape[-1])

  def differences(z, *data):
    up = jax.vmap(lambda move: f(z + move, *data))(moves)
    down = jax.vmap(lambda move: f(z - move, *data))(moves)
    return (up - down) / (2 * step)

  numeric = world_lib.compute(jax.vmap(differences), z, *data)
  assert np.abs(found - numeric).max() < 1e-6


def reference_shared():
  """A reference of the policy's own parameters is a constant all the same."""
  beta = 0.5
  dpo = losses.LOSSES["dpo"].fn

  def loss(z, ref):
    logps = (world_lib.sides(jax.nn.log_softmax(x)) for x in (z, ref))
    out = dpo(*logps, beta=beta, label_smoothing=0.0)["loss"]
    return jnp.sum(WORLD.wins[0] * out)

  found = world_lib.compute(jax.grad(lambda z: loss(z, z)), WORLD.ref[0])
  # At policy = reference each comparison pulls with β/2.
  won, lost = WORLD.wins[0].sum(1), WORLD.wins[0].sum(0)
  assert np.abs(found + beta / 2 * (won - lost)).max() < 1e-12
