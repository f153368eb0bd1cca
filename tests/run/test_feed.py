"""What a run says of its data."""

from dpo_jax import progress
from dpo_jax.config import load
from dpo_jax.run import build
from tests import conftest


def about(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  return build.prepare(load.load_config(config, overrides)).about[1]


def test_the_shapes_are_told_in_words_and_ours_where_they_are_asked_for(
  monkeypatch,
):
  said = about()
  assert said.startswith("toy: 960 examples, 960 comparisons; batches of 8")
  assert "% of the computed positions hold tokens" in said
  assert "; shapes R" not in said
  monkeypatch.setattr(progress, "detailed", True)
  assert "; shapes R8 T" in about()


def test_a_batch_larger_than_the_data_is_said():
  assert "batch" not in about("data.train=toy:8").replace("batches of 8", "")
  said = about("data.train=toy:6")
  assert "data.batch_size = 8 is more than the 6 examples of an epoch" in said
