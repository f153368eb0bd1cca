"""Hugging Face data sets, of the schema of stanfordnlp/imdb, from folders."""

import datasets
import huggingface_hub.constants
import numpy as np
import pytest

from dpo_jax.data.read import sources

FEATURES = datasets.Features(
  {
    "text": datasets.Value("string"),
    "label": datasets.ClassLabel(names=["neg", "pos"]),
  }
)


def imdb(*labels, start=0):
  rows = [
    {"text": f"film {start + n}", "label": label}
    for n, label in enumerate(labels)
  ]
  return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def folder(tmp_path):
  """A DatasetDict of train, test and unsupervised, saved."""
  splits = datasets.DatasetDict(
    train=imdb(1, 0, 1), test=imdb(0, 1, start=3), unsupervised=imdb(-1, -1)
  )
  splits.save_to_disk(tmp_path / "imdb")
  return str(tmp_path / "imdb")


@pytest.fixture
def offline(monkeypatch):
  """No network, at once and not after its time-out."""
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def load(spec, form="label"):
  return sources.load(spec, form, sources.Policy("error"))


def error_of(spec, form="label"):
  with pytest.raises(ValueError) as caught:
    load(spec, form)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def labels_of(records):
  return [r.labels[0] for r in records]


def test_the_named_split_of_a_saved_data_set_is_read(folder):
  records = load(f"hf:{folder}:test")
  assert [r.completions for r in records] == [("film 3",), ("film 4",)]
  assert labels_of(records) == [0, 1]
  assert records[1].origin == f"hf:{folder}:test:1"


def test_the_split_is_train_unless_named(folder):
  assert labels_of(load(f"hf:{folder}")) == [1, 0, 1]


def test_texts_with_classes_serve_sft(folder):
  records = load(f"hf:{folder}", "sft")
  assert [r.completions for r in records] == [(f"film {n}",) for n in range(3)]
  assert {r.labels for r in records} == {None}


def test_a_class_of_minus_one_is_a_missing_label(folder):
  message = error_of(f"hf:{folder}:unsupervised")
  assert f"hf:{folder}:unsupervised:0: field 'label' is missing" in message
  assert len(load(f"hf:{folder}:unsupervised", "sft")) == 2


def test_dialogues_of_one_turn_are_a_source_of_their_own(tmp_path):
  once = "\n\nHuman: Oslo?\n\nAssistant:"
  twice = f"{once} Cold.\n\nHuman: Rome?\n\nAssistant:"
  rows = [
    {"chosen": f"{start} yes {n}.", "rejected": f"{start} no {n}."}
    for n, start in enumerate((twice, once, twice, once))
  ]
  datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
  got = load(f"one_turn:{tmp_path}:test", "preference")
  assert [r.prompt for r in got] == [once, once]
  assert [r.completions[0] for r in got] == [" yes 1.", " yes 3."]
  assert len(load(f"hf:{tmp_path}:test", "preference")) == 4


def test_what_is_here_is_known_without_the_network(folder, monkeypatch):
  def refused(*_):
    raise AssertionError("the hub was asked")

  monkeypatch.setattr(datasets, "load_dataset", refused)
  here = (f"hf:{folder}:test", f"one_turn:{folder}", "toy:8", folder)
  assert all(map(sources.is_here, here))
  far = ("hf:stanfordnlp/imdb:test", "one_turn:Anthropic/hh-rlhf", "no.jsonl")
  assert not any(map(sources.is_here, far))


def test_an_unknown_split_names_those_there(folder):
  message = error_of(f"hf:{folder}:tset")
  assert "did you mean 'test'" in message
  for word in ("the split of ", "train", "unsupervised"):
    assert word in message


def test_one_data_set_without_splits_is_read(tmp_path):
  imdb(1, 0).save_to_disk(tmp_path / "one")
  assert labels_of(load(f"hf:{tmp_path}/one")) == [1, 0]
  assert "leave ':test' out" in error_of(f"hf:{tmp_path}/one:test")


def test_a_saved_data_set_has_no_configuration(folder):
  assert "leave '@plain_text' out" in error_of(f"hf:{folder}@plain_text:test")


def test_a_folder_of_files_is_read_by_the_names_of_its_splits(tmp_path):
  for name, size in (("train", 3), ("test", 2)):
    imdb(*[1] * size).to_parquet(tmp_path / f"{name}.parquet")
  assert len(load(f"hf:{tmp_path}:test")) == 2
  assert len(load(f"hf:{tmp_path}")) == 3
  assert "did you mean 'test'" in error_of(f"hf:{tmp_path}:tests")


def test_a_damaged_folder_is_an_error_with_its_name(tmp_path):
  imdb(1, 0).save_to_disk(tmp_path / "one")
  (arrow,) = (tmp_path / "one").glob("*.arrow")
  arrow.write_bytes(arrow.read_bytes()[:100])
  assert f"{tmp_path}/one' cannot be loaded" in error_of(f"hf:{tmp_path}/one")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["nobody/no-such", "imdb@x"])
def test_what_cannot_be_reached_says_what_it_needs(name):
  message = error_of(f"hf:{name}:train")
  assert f"hf:{name}:train' cannot be loaded" in message
  assert "needs the network once" in message
  assert "a local folder" in message


@pytest.mark.parametrize("name", ["./no-such", "/no/such", "~/no-such"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
  message = error_of(f"hf:{name}")
  assert "there is no folder" in message
  assert "network" not in message


@pytest.mark.parametrize("spec", ["hf:", "hf::train", "hf:@config", "hf:x@"])
def test_a_malformed_spec_shows_the_form(spec):
  assert "hf:NAME_OR_FOLDER[@CONFIG][:SPLIT]" in error_of(spec)


@pytest.fixture
def mine(monkeypatch):
  """A function that makes a value the source "mine"."""
  return lambda made: monkeypatch.setitem(sources.SOURCES, "mine", lambda: made)


def test_a_data_set_of_a_notebook_is_a_source(mine):
  mine(imdb(0, 1))
  records = load("mine")
  assert labels_of(records) == [0, 1]
  assert [r.origin for r in records] == ["mine:0", "mine:1"]


def test_a_data_set_that_gives_arrays_is_read_as_plain_values(mine):
  row = {"prompt": "p", "completions": ["a", "b"], "pairs": [[1, 0]]}
  made = datasets.Dataset.from_list([row]).with_format("numpy")
  assert isinstance(made[0]["pairs"], np.ndarray)
  mine(made)
  (record,) = load("mine", "preference")
  assert record[:3] == ("p", ("a", "b"), ((1, 0),))


def test_a_null_is_a_missing_field(mine):
  rows = [
    {"text": "a", "prompt": None, "completion": None},
    {"text": None, "prompt": "p", "completion": "c"},
  ]
  mine(datasets.Dataset.from_list(rows))
  records = load("mine", "sft")
  assert [r[:2] for r in records] == [("", ("a",)), ("p", ("c",))]


def test_a_stream_is_refused_and_the_error_says_why(mine):
  mine(imdb(0, 1).to_iterable_dataset())
  message = error_of("mine")
  for word in ("'mine'", "without streaming=True", "permutation", "length"):
    assert word in message


def test_a_data_set_with_its_splits_is_refused(mine):
  mine(datasets.DatasetDict(train=imdb(0), test=imdb(1)))
  assert "'mine' has the splits train, test" in error_of("mine")


def test_a_data_set_is_told_from_another_by_its_content(folder, tmp_path):
  """Or the tokens of one would be taken for those of the other."""
  train, again, test = (
    sources.identity(f"hf:{folder}{split}") for split in ("", ":train", ":test")
  )
  assert train == again
  assert train.value != test.value
  assert (train.rows, test.rows) == (3, 2)
  imdb(1, 0, 0).save_to_disk(tmp_path / "other")
  assert sources.identity(f"hf:{tmp_path / 'other'}").value != train.value
