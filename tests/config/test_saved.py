"""Configs as they are saved: read back, compared, brought up to date."""

import json

import pytest

from configs import base, common
from dpo_jax.config import load as load_lib
from dpo_jax.config import saved as saved_lib
from dpo_jax.train import optim
from tests import conftest
from tests.parallel import test_topology as topology

SMOKE = f"{conftest.ROOT}/configs/dpo.py:smoke"


def saved_before(lora=False):
  """A config as it was saved before references had fields of their own."""
  config = topology.config_of()
  config.lora = common.lora() if lora else None
  saved = config.to_dict()
  if lora:
    del saved["lora"]["zero"]
  del saved["ref_mix"], saved["ref_every"], saved["train"]["max_noise"]
  saved.pop("sweep", None)
  del saved["export"]["public"]
  for name in saved_lib.LATER:
    del saved["sample"][name]
  return json.loads(json.dumps(saved))


def test_folders_of_before_are_read_with_the_fields_that_came_later(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(saved_before()))
  config = saved_lib.saved_config(tmp_path)
  assert config.ref_mix is config.ref_every is None
  assert config.train.max_noise == 0.1
  assert config.ref == "frozen"
  assert config.sweep.together == 1
  assert config.export.public is False
  assert config.sample.shots == 0
  assert config.sample.best_of == config.sample.stop == ()
  saved_lib.check_config(saved_before(), config.to_dict(), "here")


def test_later_fields_of_samples_are_as_where_nobody_asks():
  section = base.get_config().sample
  assert {name: section[name] for name in saved_lib.LATER} == saved_lib.LATER


def test_the_reference_of_an_adapter_has_its_new_name(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(saved_before(lora=True)))
  config = saved_lib.saved_config(tmp_path)
  assert config.ref == "base"
  assert config.lora.zero == "b"


def test_another_reference_is_refused_where_it_was_saved():
  config = topology.config_of().to_dict()
  now = {**config, "reference": {"embed/tokens": 2}}
  saved_lib.check_config(config, now, "here")  # saved without
  before = {**config, "reference": {"embed/tokens": 1}}
  with pytest.raises(ValueError, match=r"embed/tokens \(saved 1, now 2"):
    saved_lib.check_config(before, now, "here")


def check(saved, *overrides):
  """`check_config` of a run's saved config, with overrides for now."""
  now = load_lib.load_config(SMOKE, overrides).to_dict()
  saved_lib.check_config(json.loads(json.dumps(saved)), now, "here")


def test_what_decides_the_policy_is_refused_and_nothing_else():
  saved = load_lib.load_config(SMOKE).to_dict()
  check(
    saved,
    *("mesh.fsdp=2", "model.attention=xla", "model.remat=full", "log.every=3"),
    *("sample.count=4", "data.eval=None", "train.max_noise=0.5"),
    *("train.steps=9", "export.form=adapter", "audit.cut=0.5"),
  )
  for field in ("attention_scale", "attention_softcap", "logit_softcap"):
    with pytest.raises(ValueError, match=rf"model.{field} \(saved None, now"):
      check(saved, f"model.{field}=0.5")


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_run_is_made_longer_only_where_its_updates_stay_the_same(name):
  overrides = (f"optim.schedule={name}", "train.steps=8")
  config = load_lib.load_config(SMOKE, overrides)
  factors = [float(optim.make(config.optim, n).factor(4)) for n in (8, 16)]
  check(config.to_dict(), *overrides)
  # With train.steps, the other way to say how long does not count.
  check(config.to_dict(), *overrides, "train.epochs=7.0")
  longer = (*overrides, "train.steps=16")
  if factors[0] == factors[1]:
    check(config.to_dict(), *longer)
    return
  with pytest.raises(ValueError, match=rf"schedule = '{name}'") as caught:
    check(config.to_dict(), *longer)
  for words in ("here", "train.steps = 8", "train.steps = 16", "--workdir"):
    assert words in str(caught.value)
  with pytest.raises(ValueError, match=r"train.steps = 8, now train.epochs"):
    check(config.to_dict(), *overrides, "train.steps=None")


def test_rollouts_from_before_there_was_a_centre_go_on_without_one():
  spec = SMOKE.replace("dpo.py", "ppo.py")
  config = load_lib.load_config(spec).to_dict()
  saved = json.loads(json.dumps(config))
  del saved["rollout"]["centre"]
  saved_lib.check_config(saved, config, "here")
  config["rollout"]["centre"] = "prompt"
  with pytest.raises(ValueError, match=r"centre \(saved 'none', now 'prompt'"):
    saved_lib.check_config(saved, config, "here")


@pytest.mark.parametrize("text", ["", '{"loss": {', "[]", "{}", "null"])
def test_a_damaged_config_of_a_run_is_named(text, tmp_path):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    saved_lib.saved_config(tmp_path)


def test_of_many_fields_that_differ_the_first_are_named_and_no_parameters():
  config = {f"field_{i:02}": 0 for i in range(12)} | {"reference": {"w": 1}}
  now = {key: 1 for key in config} | {"reference": {"w": 2}}
  with pytest.raises(ValueError) as caught:
    saved_lib.check_config(config, now, "here")
  assert "field_07 (saved 0, now 1); 4 more. Use" in str(caught.value)
  with pytest.raises(ValueError, match=r"config: reference\.w \(saved 1"):
    saved_lib.check_config(config, config | {"reference": {"w": 2}}, "here")
