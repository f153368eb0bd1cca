"""The win rate at equal length: what is left when length buys nothing.

Judges prefer longer texts, and policies learn to write them. A logistic model
of the verdicts tells the two apart:

    P(ours wins) = σ(θ + γ d),    d = tanh((ℓ_ours − ℓ_theirs) / s)

with ℓ in characters and s the standard deviation of the differences. The rate
at equal length is the model's at d = 0:

    σ(θ)

θ and γ minimise the cross-entropy of the verdicts (a tie counts one half) plus
γ²/200, a normal prior of deviation 10: it keeps γ finite where length alone
tells all verdicts, and moves nothing else.

Source: Dubois et al. 2024, arXiv:2404.04475 section 3, without its term for the
difficulty of a prompt, which needs the verdicts of many models.
"""

import numpy as np

_PRIOR = 0.01  # 1 / 10²
_STEPS = 60  # from 0, of at most 1 each
_FLAT = 1e-12  # keeps a step finite where all rates are 0 or 1


def differences(ours, theirs):
  """d f[n] of texts, see above; zeros where the differences are all alike.

  Args: lists of n texts.
  """
  gaps = np.array(
    [len(a) - len(b) for a, b in zip(ours, theirs, strict=True)], np.float64
  )
  spread = gaps.std()
  return np.tanh(gaps / spread) if spread > 0 else np.zeros_like(gaps)


def at_equal_length(verdicts, d, axis=-1):
  """σ(θ), by Newton's method; see the module docstring.

  Args:
    verdicts: f[..., n] in [0, 1].
    d: f[..., n], of `differences`.
    axis: of n; the last one.
  Returns: f[...], in [0, 1].
  """
  assert axis in (-1, np.ndim(verdicts) - 1), axis
  theta = np.zeros(np.shape(verdicts)[:-1])
  gamma = np.zeros_like(theta)
  for _ in range(_STEPS):
    rates = _sigmoid(theta[..., None] + gamma[..., None] * d)
    error, spread = rates - verdicts, rates * (1 - rates)
    g_theta = error.sum(-1)
    g_gamma = (error * d).sum(-1) + _PRIOR * gamma
    a, b = spread.sum(-1) + _FLAT, (spread * d).sum(-1)
    c = (spread * d * d).sum(-1) + _PRIOR
    det = a * c - b * b
    steps = (c * g_theta - b * g_gamma) / det, (a * g_gamma - b * g_theta) / det
    theta = theta - np.clip(steps[0], -1, 1)
    gamma = gamma - np.clip(steps[1], -1, 1)
    if max(np.max(np.abs(step)) for step in steps) < 1e-10:
      break
  return _sigmoid(theta)


def _sigmoid(x):
  return 0.5 * (1 + np.tanh(x / 2))  # without overflow
