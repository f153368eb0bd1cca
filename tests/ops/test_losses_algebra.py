"""What the losses have in common: limits, symmetries, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import losses as losses_config
from dpo_jax.ops import losses
from tests.ops import loss_cases, oracles

BETA = 0.3
LOGPS = ("policy_logps", "prefix_logps", "common_logps")


def case_of(name, divergence="reverse_kl", **fields):
  """A case with its paper's fields, but for those named."""
  return loss_cases.Case(
    name, {**losses_config.LOSSES[name], **fields}, divergence
  )


def result(case, values):
  """The loss, and its gradient by all log-probs together, in float64."""
  with jax.enable_x64(True):
    ones = np.ones(values["policy_logps"].shape[:-1])
    (loss, _), gradients = loss_cases.value_and_gradients(
      case, values, ones, "float64"
    )
    return loss, sum(gradients[name] for name in LOGPS if name in gradients)


def assert_same(case, other, changes=lambda values: {}, scale=1.0, rtol=1e-12):
  """Equal losses and gradients; f64, some roundings apart.

  Args:
    changes: values -> those to replace, for both.
  """
  for seed in range(2):
    both = []
    for one in (case, other):
      values = loss_cases.values_of(one, seed)
      values = {**values, **changes(values)}
      both.append(result(one, {k: values[k] for k in loss_cases.arguments(one)}))
    for got, want in zip(*both, strict=True):
      np.testing.assert_allclose(got, scale * want, rtol=rtol, atol=1e-14)


def ones(name):
  return lambda values: {name: np.ones((2, 3, 2))}


def one_token(values):
  del values
  return {"lengths": np.ones((2, 3, 2))}


def no_reference(values):
  return {"ref_logps": np.zeros_like(values["policy_logps"])}


def alone(values):
  """Only one real comparison: nothing to sort."""
  return {"weights": np.eye(2, 3)[:1].repeat(2, 0) * [[1], [0]]}


DPO = case_of("dpo", beta=BETA)
WHOLE = {
  "common_logps": "policy_logps",
  "ref_common_logps": "ref_logps",
  "prefix_logps": "policy_logps",
  "ref_prefix_logps": "ref_logps",
}


def whole(values):
  """Parts of a completion that are all of it."""
  return {part: values[of] for part, of in WHOLE.items() if part in values}


@pytest.mark.parametrize(
  ("name", "fields", "changes"),
  [
    ("robust", {"label_smoothing": 0.0}, None),
    ("ld_dpo", {"alpha": 1.0}, None),
    ("tdpo2", {"alpha": 0.0}, None),
    ("r_dpo", {"alpha": 0.0}, None),
    ("odpo", {"alpha": 0.0}, None),
    ("dpop", {"penalty": 0.0}, None),
    ("ln_dpo", {}, one_token),
    ("tdpo1", {}, ones("sequence_kl")),
    ("tdpo2", {}, ones("sequence_kl")),
    ("sampo", {}, whole),
    ("wpo", {}, lambda values: {"sum_sq_probs": values["policy_logps"]}),
    ("cpo", {"alpha": 0.0}, no_reference),
    ("simpo", {"gamma": 0.0}, lambda v: {**one_token(v), **no_reference(v)}),
  ],
)
def test_without_its_own_term_a_loss_is_dpo(name, fields, changes):
  if changes is None:
    changes = dict
    changes = lambda values: {}  # noqa: E731
  assert_same(case_of(name, beta=BETA, **fields), DPO, changes)
