"""Configs as they are saved: read back, compared, brought up to date."""

import json

import pytest

from configs import common
from dpo_jax.config import saved as saved_lib
from tests.parallel import test_topology as topology


def saved_before(lora=False):
  """A config as it was saved before references had fields of their own."""
  config = topology.config_of()
  config.lora = common.lora() if lora else None
  saved = config.to_dict()
  del saved["ref_mix"], saved["ref_every"], saved["train"]["max_noise"]
  saved.pop("sweep", None)
  return json.loads(json.dumps(saved))


def test_folders_of_before_are_read_with_the_fields_that_came_later(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(saved_before()))
  config = saved_lib.saved_config(tmp_path)
  assert config.ref_mix is config.ref_every is None
  assert config.train.max_noise == 0.1
  assert config.ref == "frozen"
  assert config.sweep.together == 1
  saved_lib.check_config(saved_before(), config.to_dict(), "here")


def test_the_reference_of_an_adapter_has_its_new_name(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(saved_before(lora=True)))
  assert saved_lib.saved_config(tmp_path).ref == "base"


def test_another_reference_is_refused_where_it_was_saved():
  config = topology.config_of().to_dict()
  now = {**config, "reference": {"embed/tokens": 2}}
  saved_lib.check_config(config, now, "here")  # saved without
  before = {**config, "reference": {"embed/tokens": 1}}
  with pytest.raises(ValueError, match=r"embed/tokens \(saved 1, now 2"):
    saved_lib.check_config(before, now, "here")
