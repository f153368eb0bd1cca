"""No dead knobs: every config field has an effect, or is refused.

For every field of every config of knobs/bases.py another value is set, of
knobs/values.py, and what the two configs decide is compared: what is compiled,
the batches, the files (knobs/plan.py, knobs/dry.py). A field that changes none
of it must be refused by a message that names it, or stand in WAITS with the
condition.
"""

import copy
import functools
import re
from unittest import mock

import pytest

from dpo_jax.config import fields as field_table
from dpo_jax.config import load, saved
from dpo_jax.models import decoder
from dpo_jax.run import build, checks
from tests import conftest
from tests.knobs import bases, dry, values
from tests.knobs import plan as plan_lib

# Parts of a plan, from the first that a field may change.
PARTS = {
  "layout": plan_lib.layout,
  "model": plan_lib.model,
  "data": plan_lib.data,
  "loss values": plan_lib.loss_values,
  "rate": plan_lib.rate,
  "features": plan_lib.features,
  "gradient": plan_lib.gradient,
  "optimizer": plan_lib.optimizer,
  "step": plan_lib.step,
  "initial": plan_lib.initial,
  "train": dry.training,
  "workdir": dry.command,
  "sample": dry.sampling,
  "measure": dry.measuring,
  "sweep": dry.sweeping,
  "audit": dry.auditing,
  "export": dry.exporting,
  "judge": dry.judging,
}
# Where to look first, by the beginning of a field's name.
FIRST = {
  # And what advantages are made with.
  "loss.": ("loss values", "gradient", "data"),
  "optim.learning_rate": ("rate",),
  "optim.": ("optimizer",),
  "model.": ("model",),
  "lora": ("initial", "features"),
  "data.token_cache": ("train",),  # in a folder of its own
  "data.": ("data",),
  "sample.checkpoints": ("measure",),
  "sample.": ("sample", "sweep"),
  "sweep.": ("sweep",),
  "reward.": ("train",),
  "rollout.": ("data", "features", "initial", "step"),
  "rollout": ("train",),
  "audit.": ("audit",),
  "export.": ("export",),
  "checkpoint.": ("train",),
  "eval.": ("train",),
  "log.": ("train",),
  "judge.": ("judge",),
  "train.max": ("train",),
  "train.epochs": ("data",),
  "ref_store": ("train",),
  "ref": ("features", "step"),
  "model.head_chunk": ("features",),
  "precision": ("model",),
  "init_": ("initial",),
  "workdir": ("workdir",),
}

# Fields of which FIRST must show the effect: it is not enough that a metric
# reads them.
STRICT = ("loss.", "judge.")
ABBREVIATIONS = ("features", "gradient", "optimizer")  # of "step"

# Fields that have no effect under a condition, and are not refused there since
# their defaults would be too.
WAITS = {
  "sample.prompts": lambda c: False,
  # Of the other verbs of a run, and stages of an experiment share them.
  "sample.": lambda c: c.sample.prompts is None,
  "train.epochs": lambda c: c.train.steps is not None,
  "eval.every": lambda c: c.data.eval is None,
  # It is how far policy and reference differ at step 0.
  "train.max_noise": lambda c: c.ref == "none",
}
# Fields whose other values are refused wherever they have an effect.
REFUSALS = {
  "mesh.context": "sequences are not split over devices yet",
  "mesh.data": "it says how many devices there must be",
  "data.bad_records": "to refuse the data is its effect",
  "rollout": "whether there is one is the algorithm's",
}
# Verbs that are not for every base: without prompts, of no published model.
MAY_REFUSE = ("sample", "export", "workdir", "judge")
# How messages name a field, where not by its path.
NAMES = {"model.layer_pattern": "'nope' layers"}


class Refused(str):
  """The message with which a verb refuses a config."""


@functools.cache
def fields():
  """{field: names of the bases that have it}."""
  world, found = bases.named("nowhere"), {}
  for name, base in bases.BASES.items():
    for field in saved.flatten(base.make(world).to_dict()):
      if field.startswith(base.only) and not field.startswith(base.leave):
        found.setdefault(field, []).append(name)
  return found


@pytest.fixture(scope="module")
def before(tmp_path_factory):
  """(function: name of a base -> its Plan, the World)."""
  world = bases.build(tmp_path_factory.mktemp("world"))

  @functools.cache
  def before(name):
    config = bases.BASES[name].make(world).lock()
    return plan_lib.Plan(config, {})

  # One model for all equal ones, so that it is traced once.
  build = functools.cache(decoder.build)
  with mock.patch.object(decoder, "build", build):
    yield before, world


def part(plan, name):
  """A part of a plan, or Refused."""
  try:
    return plan.once(name, PARTS[name])
  except ValueError as error:
    # A folder that was made for this is another the next time.
    return Refused(re.sub(r"/tmp/\w+", "FOLDER", str(error)))


def waits(field, config):
  """Whether WAITS says that a field has no effect in a config."""
  start = next((start for start in WAITS if field.startswith(start)), None)
  return start is not None and WAITS[start](config)


def compare(before, after, field, whole):
  """How two plans differ.

  Only FIRST is looked at for a field that is strict, or that waits: that would
  show an effect, if there was one.

  Args:
    before, after: Plans of which `field` differs.
    whole: whether what is compiled is compared as the whole step.
  Returns: ("live", part that shows it), ("refused", message) or ("dead", "").
  """
  first = [names for start, names in FIRST.items() if field.startswith(start)]
  strict = field.startswith(STRICT) or waits(field, before.config)
  rest = () if strict else PARTS
  for name in dict.fromkeys([*sum(first, ()), *rest]):
    if whole and name in ABBREVIATIONS:
      continue
    old, new = part(before, name), part(after, name)
    if isinstance(new, Refused):
      if isinstance(old, Refused):
        continue  # the verb is not for this config
      return "refused", new
    if old != new:
      return "live", name
  return "dead", ""


def verdict(before, world, name, field):
  """`compare` for the first other value of a field that has an effect."""
  best = "dead", ""
  plan = before(name)
  for config in values.others(plan.config, field, world):
    after = plan_lib.Plan(config, {}, plan)
    found = compare(plan, after, field, bases.BASES[name].whole)
    if found[0] == "live":
      return found
    best = max(best, found)  # "refused" comes after "dead"
  return best


def problems(field, found, config_of):
  """Lines on what is wrong with {base: verdict} of a field."""
  dead = {n for n, (kind, _) in found.items() if kind == "dead"}
  lives = {n for n, (kind, _) in found.items() if kind == "live"}
  waiting = {n for n in found if waits(field, config_of(n))}
  if dead - waiting:
    yield (
      f"{field} has no effect in the bases {sorted(dead - waiting)}: refuse it "
      "there (dpo_jax/run/checks.py), or say in WAITS what it waits for"
    )
  if lives & waiting:
    yield f"{field} has an effect in {sorted(lives & waiting)}, against WAITS"
  if not lives and field not in REFUSALS:
    yield f"{field} has no effect in any base: add one to knobs/bases.py"
  if lives and field in REFUSALS:
    yield f"{field} has an effect in {sorted(lives)}, against REFUSALS"
  for name, (kind, why) in found.items():
    if kind == "refused" and NAMES.get(field, field) not in why:
      yield f"{field} in {name!r} is refused, not by its name: {why}"


@pytest.mark.parametrize("field", fields())
def test_every_field_has_an_effect_or_is_refused(field, before):
  before, world = before
  try:
    found = {n: verdict(before, world, n, field) for n in fields()[field]}
  except LookupError:
    pytest.fail(
      f"{field}: add another value of it to VALUES of knobs/values.py"
    )
  wrong = list(problems(field, found, lambda name: before(name).config))
  assert not wrong, "\n".join(wrong)


def _accepted(config):
  try:
    build.check(config)
  except ValueError:
    return False
  return True


@pytest.mark.parametrize("name", ["lora", "quickstart"])
def test_what_is_measured_or_kept_changes_nothing_that_is_trained(
  name, before, tmp_path, monkeypatch
):
  """As the table of fields says: all of them are set to another at once."""
  before, world = before
  monkeypatch.chdir(tmp_path)  # relative paths of a config end up there
  plan, changed = before(name), []
  config = plan.config
  for field, bases_of in fields().items():
    decides = field_table.of(field).decides
    if decides not in (field_table.MEASURE, field_table.KEEP):
      continue
    others = values.others(config, field, world) if name in bases_of else ()
    other = next(filter(_accepted, others), None)
    # Entropy is read of the features too, and of no gradient.
    if other is not None and field != "log.tokens":
      config, changed = other, [*changed, field]
  assert len(changed) >= 30
  after = plan_lib.Plan(config, {}, plan)
  for what in ("features", "gradient", "optimizer", "initial"):
    assert part(after, what) == part(plan, what), what
  assert part(after, "data")[:2] == part(plan, "data")[:2]


def test_a_field_that_nothing_reads_is_found(before):
  before, world = before
  config = copy.deepcopy(before("sft").config).unlock()
  config.data.unread = 3
  plan = plan_lib.Plan(config.lock(), {})
  assert not isinstance(part(plan, "step"), Refused)
  found = verdict(lambda _: plan, world, "sft", "data.unread")
  (first, second) = problems(
    "data.unread", {"sft": found}, lambda _: plan.config
  )
  assert first.startswith("data.unread has no effect in the bases ['sft']")
  assert second.startswith("data.unread has no effect in any base")
  config = copy.deepcopy(config).unlock()
  config.data.unknown = None
  plan = plan_lib.Plan(config.lock(), {})
  with pytest.raises(LookupError):
    verdict(lambda _: plan, world, "sft", "data.unknown")


@pytest.mark.parametrize(
  "name", [n for n, b in bases.BASES.items() if not b.only]
)
def test_a_plan_is_the_same_when_it_is_made_again(name, before):
  """Or every field would seem to have an effect."""
  plan = before[0](name)
  again = plan_lib.Plan(plan.config, {})
  for what in PARTS:
    made = part(plan, what)
    assert made == part(again, what), what
    assert what in MAY_REFUSE or not isinstance(made, Refused), made


@pytest.mark.parametrize("name", ["judge", "people"])
def test_a_judging_is_the_same_when_it_is_done_again(name, before):
  plan = before[0](name)
  assert part(plan, "judge") == part(plan_lib.Plan(plan.config, {}), "judge")


@pytest.mark.parametrize(
  ("spec", "overrides", "message"),
  [
    ("sft.py:smoke", "ref_mix=0.5", "ref_mix = 0.5 with ref = 'none'"),
    ("dpo.py:smoke", "init_from=runs/sft init_seed=1", "init_seed = 1 has no"),
    ("dpo.py:smoke", "export.form=adapter export.dtype=bfloat16",
     "export.dtype = 'bfloat16' has no effect"),
    ("dpo.py:smoke", "export.public=true", "export.public = True has no"),
    ("dpo.py:smoke", "sample.temperature=0 sample.top_p=0.9",
     "sample.top_p = 0.9 has no effect"),
    ("dpo.py:smoke", "sample.prompts=toy sample.labelled=a.csv",
     "sample.labelled = 'a.csv' has no effect"),
    ("dpo.py:smoke", "sample.scorers=vader sample.labelled=a.csv",
     "sample.labelled = 'a.csv' has no effect"),
    ("dpo.py:smoke", "sample.prompts=toy sample.scorers=vader "
     "sample.labelled=2*a.csv", "sample.labelled: weights have no effect"),
    ("dpo.py:model=gpt2", "model.rope_theta=500.0",
     "model.rope_theta = 500.0 has no effect"),
    ("dpo.py:smoke", "model.layer_pattern=nope model.rope_theta=500.0",
     "model.rope_theta = 500.0 has no effect"),
    ("dpo.py:smoke", "model.layer_pattern=window model.window=8 "
     "model.window_theta=9.0 model.rope_theta=500.0",
     "model.rope_theta = 500.0 has no effect"),
    ("dpo.py:model=gpt2", "model.norm_offset=1.0",
     "model.norm_offset = 1.0 has no effect"),
  ],
)  # fmt: skip
def test_a_value_without_effect_is_refused(spec, overrides, message):
  path = str(conftest.ROOT / "configs" / spec)
  config = load.load_config(path, overrides.split())
  with pytest.raises(ValueError, match=re.escape(message)):
    checks.values(config)
