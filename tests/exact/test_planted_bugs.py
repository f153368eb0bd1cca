"""Bugs that keep a loss falling, each found by a check (PAPER 4.4, no. 13).

The checks are those that hold of the code as it is: test_closed_form and
test_language.
"""

import types

import jax
import numpy as np
import pytest

from dpo_jax.algos import preference
from dpo_jax.data.batch import rows
from dpo_jax.data.tokens import tokenize
from dpo_jax.ops import losses
from dpo_jax.ops.losses import base
from tests.exact import checks, language


def swapped_pair(patch):
  """The margin of the rejected over the chosen."""
  patch.setattr(base, "margins", lambda scores: scores[..., 1] - scores[..., 0])


def no_reference(patch):
  patch.setattr(base, "log_ratios", lambda policy, ref: policy)


def beta_twice(patch):
  """σ(β · reward) of a reward that is β Δ already."""
  dpo = losses.LOSSES["dpo"]

  def wrong(policy, ref, *, beta, label_smoothing):
    return dpo.fn(policy, ref, beta=beta**2, label_smoothing=label_smoothing)

  patch.setitem(losses.LOSSES, "dpo", dpo._replace(function=wrong))


def no_stop_gradient(patch):
  """None in the losses, nor where the algorithm prepares the reference.

  Only these modules see it: functions of JAX itself keep what they traced.
  """
  lax = types.SimpleNamespace(**vars(jax.lax))
  lax.stop_gradient = lambda x: x
  seen = types.SimpleNamespace(**{**vars(jax), "lax": lax})
  patch.setattr(base, "jax", seen)
  patch.setattr(preference, "jax", seen)


def prompt_scored(patch):
  """All of the prompt but its first token counts as completion."""
  right = tokenize._example

  def wrong(*args):
    example = right(*args)
    first, *rest = example.prompt
    completions = tuple([*rest, *ids] for ids in example.completions)
    return example._replace(prompt=[first], completions=completions)

  patch.setattr(tokenize, "_example", wrong)


def no_eos(patch):
  """The EOS of a completion is not scored."""
  right = rows.build

  def wrong(examples, assigned, shape, *args):
    batch = right(examples, assigned, shape, *args)
    where = np.arange(len(assigned))[:, None], batch["target_index"]
    ends = batch["tokens"][where] == language.EOS
    batch["target_slot"][ends] = shape.per_row * shape.completions
    return batch

  patch.setattr(rows, "build", wrong)


BUGS = [
  (swapped_pair, checks.closed_form),
  (swapped_pair, checks.implicit_reward),
  (swapped_pair, checks.gradient_identity),
  (no_reference, checks.closed_form),
  (no_reference, checks.loss_floor),
  (no_reference, checks.gradient_identity),
  (beta_twice, checks.closed_form),
  (beta_twice, checks.implicit_reward),
  (beta_twice, checks.gradient_identity),
  (no_stop_gradient, checks.reference_shared),
  (no_stop_gradient, language.weights_shared),
  (prompt_scored, language.answers_sum_to_one),
  (no_eos, language.answers_sum_to_one),
]


@pytest.mark.parametrize(
  ("plant", "check"), BUGS, ids=lambda value: value.__name__
)
def test_is_found(plant, check, monkeypatch):
  plant(monkeypatch)
  with pytest.raises(AssertionError):
    check()
