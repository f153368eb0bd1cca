"""Points of a sweep, of a file or of the command line."""

import pytest

from dpo_jax.config import load
from dpo_jax.config import points as points_lib
from tests import conftest

SPEC = f"{conftest.ROOT}/configs/dpo.py:smoke"


@pytest.fixture(scope="module")
def source():
  return load.load(SPEC, ["data.batch_size=4"])


def test_axes_make_their_product(source):
  axes = ["loss.beta=0.05,1", "init_seed=0,1"]
  assert points_lib.product(source, axes) == [
    {"loss.beta": 0.05, "init_seed": 0},
    {"loss.beta": 0.05, "init_seed": 1},
    {"loss.beta": 1.0, "init_seed": 0},
    {"loss.beta": 1.0, "init_seed": 1},
  ]


def test_values_are_read_as_overrides_are(source):
  axes = ["optim.clip_norm=None,1", "data.packed=true,false"]
  points = points_lib.product(source, axes)
  assert [p["optim.clip_norm"] for p in points] == [None, None, 1.0, 1.0]
  assert [p["data.packed"] for p in points[:2]] == [True, False]
  axes = ["optim.freeze=('embed','final_norm'),()"]
  found = [p["optim.freeze"] for p in points_lib.product(source, axes)]
  assert found == [("embed", "final_norm"), ()]


def test_an_argument_of_the_config_is_an_axis_with_fields_of_its_own(source):
  axes = [":loss=simpo,slic", "loss.beta=1,2"]
  with pytest.raises(ValueError, match=r"beta is not a field of .*loss=slic"):
    points_lib.product(source, axes)
  points = points_lib.product(source, [":loss=simpo,dpo", "loss.beta=1,2"])
  assert points[0] == {"arg": "loss=simpo", "loss.beta": 1.0}
  assert points[3] == {"arg": "loss=dpo", "loss.beta": 2.0}
  made = [source.at(point) for point in points]
  assert [c.loss.name for c in made] == ["simpo", "simpo", "dpo", "dpo"]
  assert [c.loss.beta for c in made] == [1.0, 2.0, 1.0, 2.0]
  assert made[0].loss.gamma == 1.0


def test_a_point_keeps_what_the_command_says(source):
  config = source.at({"arg": "loss=ipo"})
  assert config.data.batch_size == 4
  assert config.model.layers == source.config.model.layers  # of :smoke
  assert config.is_locked


def test_two_arguments_go_into_one(source):
  points = points_lib.product(source, [":loss=dpo,ipo", ":lora=true"])
  assert [p["arg"] for p in points] == [
    "loss=dpo,lora=true",
    "loss=ipo,lora=true",
  ]
  assert source.at(points[1]).lora.rank == 16


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (["loss.betta=1"], "--sweep loss.betta is not a field.*'loss.beta'"),
    (["loss=dpo,ipo"], "--sweep loss is not a field.*--sweep :loss=dpo"),
    (["loss.beta=1,big"], "--sweep loss.beta=big must be of type float"),
    (["loss.beta=1,"], "--sweep loss.beta=1,: a value is empty"),
    (["loss.beta"], "--sweep loss.beta: it needs values"),
    (["loss.beta=1", "loss.beta=2"], "--sweep loss.beta is given twice"),
    ([":los=dpo"], "did you mean 'loss'?"),
    ([":loss=ipso"], "did you mean 'ipo'?"),
  ],
)
def test_a_wrong_axis_gets_a_line_that_says_what_to_do(source, axes, message):
  with pytest.raises(ValueError, match=message):
    points_lib.product(source, axes)


def test_the_config_of_a_run_takes_no_argument(tmp_path, source):
  (tmp_path / "config.json").write_text(source.config.to_json())
  saved = load.load(str(tmp_path / "config.json"), [])
  with pytest.raises(ValueError, match="takes no argument"):
    saved.at({"arg": "loss=ipo"})
  assert saved.at({"loss.beta": 3.0}).loss.beta == 3.0
  with pytest.raises(ValueError, match=r"loss=ipo, .*of a file"):
    load.at(source.config, {"arg": "loss=ipo"})


def test_the_name_of_a_point_is_the_name_of_a_folder():
  point = {"arg": "model=hf:a/b", "data.train": "/x/y.jsonl", "loss.beta": 1.0}
  assert load.point_name(point) == "model=hf:a_b,train=_x_y.jsonl,beta=1.0"
