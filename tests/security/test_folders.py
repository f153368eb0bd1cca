"""The folders that a sweep.json names are inside of its own."""

import json
import re

import pytest

from dpo_jax import store
from dpo_jax.eval.scorers import runs
from dpo_jax.report import folder

ELSEWHERE = ["../b", "/b", "//b", "a/../../b", "..", ".", "", 3, None, ["b"]]
WHERE = {"points": "a point", "reference": "the reference"}


def sweep_of(path, name, of):
  """A folder with a sweep beside another folder that holds an evaluation."""
  here = path / "sweep"
  for place in (here / "a", path / "b"):
    place.mkdir(parents=True)
    text = json.dumps({"comparisons": {"rewards/accuracies": 0.5}})
    (place / "evaluation.json").write_text(text)
  points = [{"name": "a", "overrides": {"loss.beta": 0.1}, "folder": "a"}]
  about = {"title": "dpo", "points": points, "reference": None}
  if of == "points":
    points[0]["folder"] = name
  else:
    about["reference"] = name
  (here / "sweep.json").write_text(json.dumps(about))
  return here


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("read", [folder.read, runs.best_point])
def test_a_sweep_that_names_a_folder_elsewhere_is_refused(name, read, tmp_path):
  path = sweep_of(tmp_path, name, "points")
  said = re.escape(f"{path / 'sweep.json'} names the folder {name!r}")
  with pytest.raises(ValueError, match=said):
    read(path)


@pytest.mark.parametrize("name", [x for x in ELSEWHERE if x])
def test_so_is_one_whose_reference_is_elsewhere(name, tmp_path):
  path = sweep_of(tmp_path, name, "reference")
  with pytest.raises(ValueError, match=r"which is none inside .*sweep;"):
    folder.read(path)


def test_names_that_points_have_are_inside(tmp_path):
  path = sweep_of(tmp_path, "a", "points")
  assert runs.best_point(path) == str(path / "a")
  assert folder.read(path).groups[0].runs[0].evaluation
  for name in ("init_from=hf:me_model,beta=0.1", r"freeze=attn_\w+", "..a"):
    assert store.inside(path, name, path) == path / name
