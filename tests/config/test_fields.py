"""The table of what each config field is."""

import dataclasses
import typing

from configs import base, common, frontier_exact, judge
from dpo_jax.config import fields, saved
from dpo_jax.data.audit import counts
from dpo_jax.models import config as model_config
from dpo_jax.train import optimizers

DECIDES = (
  *(fields.POLICY, fields.LENGTH, fields.MEASURE),
  *(fields.HOW, fields.KEEP),
)
# Sections of what is selected: their fields share a row.
SELECTED = ("loss.", "model.", "optim.")


def paths():
  """The fields of configs/base.py, with an adapter, of every optimiser.

  And of all rollouts, of a study and of a judge.
  """
  study = frontier_exact.get_config().to_dict()
  out = {"lora", "rollout", *saved.flatten(study)}
  for section in (common.rollout(), common.rollout_of_comparisons()):
    out |= {f"rollout.{name}" for name in section}
  out |= {f"judge.{name}" for name in judge.get_config().judge}
  for name in optimizers.OPTIMIZERS:
    config = base.get_config()
    config.optim, config.lora = common.optim(name), common.lora()
    out |= saved.flatten(config.to_dict()).keys()
  return out


def test_every_field_has_one_row_and_every_row_is_a_field():
  rows = {path for path in fields.FIELDS if not path.endswith(".")}
  assert rows <= paths()
  assert fields.FIELDS.keys() - rows == set(SELECTED)
  bare = {path for path in paths() if path not in rows}
  assert all(path.startswith(SELECTED) for path in bare)
  assert {row.decides for row in fields.FIELDS.values()} == set(DECIDES)


def test_a_field_that_nothing_knows_counts_as_the_policy():
  for path in ("data_fingerprint", "reference.embed/tokens", "data.unread"):
    assert fields.of(path).decides == fields.POLICY


def test_of_a_model_the_runtime_fields_say_how_but_for_the_dtype():
  """Another dtype rounds otherwise: a policy that resumes must share it."""
  of_model = [p for p in paths() if p.startswith("model.")]
  how = {p[6:] for p in of_model if fields.of(p).decides == fields.HOW}
  assert how == set(model_config.RUNTIME) - {"dtype"}


def test_of_a_model_those_may_be_none_whose_type_says_so():
  optional = {
    field.name
    for field in dataclasses.fields(model_config.ModelConfig)
    if type(None) in typing.get_args(field.type)
  }
  of_model = [p for p in paths() if p.startswith("model.")]
  rows = {p[6:] for p in of_model if fields.of(p).optional}
  assert rows == optional - {"rope_scaling"}  # a checkpoint brings that


def test_every_limit_of_an_audit_is_a_share_that_may_be_none():
  shares = {p for p, row in fields.FIELDS.items() if row == fields.SHARE}
  assert shares == {f"audit.{name}" for name in counts.CHECKS}
