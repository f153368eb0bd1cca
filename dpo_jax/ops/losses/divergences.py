"""f-divergences other than the reverse KL, for every loss of h (f-DPO)."""

import functools

import jax

from dpo_jax import lookup
from dpo_jax.ops import losses
from dpo_jax.ops.losses import base, free

# Each is s(Δ) = f'(e^Δ) − f'(1): only differences count, and policy = reference
# scores 0. Beyond e^30 the exponentials go on as their tangents.


def forward_kl(ratios):
  """1 − e^(−Δ)."""
  return -(base.smooth_exp(-ratios, 30.0) - 1)


def jensen_shannon(ratios):
  """log σ(Δ) + log 2."""
  return base.log_sigmoid(ratios) - base.log_sigmoid(0.0)


def alpha_divergence(ratios, *, alpha):
  """(e^((α − 1) Δ) − 1) / (α − 1); Δ where α = 1."""
  return free.bent(ratios, alpha - 1)


def under(name, fn):
  """The loss `fn` of h with another f-divergence for the reverse KL.

      Δ -> s(Δ) = f'(π / π_ref)

  Beyond e^30 its exponentials go on as their tangents, which keep a slope.
  TRL from 0.29 on has the same s. Up to 0.28 it wrote (1 − u^(−α)) / α for the
  α-divergence, which is this one with α = 1 − α_old.

  Args:
    name: of DIVERGENCES.
    fn: a loss with `Loss.of_h`.
  Returns: the loss; of "alpha" it takes `divergence_alpha` too.
  Optimum: s(log π / π_ref) = r/β + c, with c(x) so that π sums to 1, for
    losses whose optimum is DPO's.
  Source: arXiv:2309.16240.
  """
  link = lookup.lookup(losses.DIVERGENCES, name, "loss.divergence").fn

  @functools.wraps(fn)
  def loss(policy_logps, ref_logps, *, divergence_alpha=None, **kwargs):
    options = {} if divergence_alpha is None else {"alpha": divergence_alpha}
    scores = link(base.log_ratios(policy_logps, ref_logps), **options)
    out = fn(scores, 0.0 * scores, **kwargs)
    for side, name in enumerate(("logps/chosen", "logps/rejected")):
      out[name] = jax.lax.stop_gradient(policy_logps[..., side])
    return out

  return loss
