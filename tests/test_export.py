"""The export verb: a run's policy as a folder, complete or not there."""

import json
import types

import jax
import numpy as np
import pytest

from dpo_jax import cli, export, loop, tree
from dpo_jax.config import load
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import hf
from dpo_jax.run import build, trained
from tests import conftest
from tests.models import parity

SMOKE = ["train.steps=2", "mesh.data=1"]
PYTHIA = "EleutherAI/pythia-70m"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: one)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """A folder with random published weights, whose vocabulary holds bytes."""
  folder = tmp_path_factory.mktemp("pretrained")
  parity.write(parity.small(PYTHIA, vocab_size=300), folder)
  return folder


def on(pretrained, *overrides, lora=True):
  """A smoke config that starts from the folder."""
  arg = "lora" if lora else "loss=dpo"
  spec = f"configs/dpo.py:{arg},model=hf:{pretrained}"
  small = ["data.train=toy", "data.eval=toy:8", "data.batch_size=8"]
  lengths = ["data.max_prompt_length=64", "data.max_completion_length=64"]
  given = ["tokenizer=bytes", *small, *lengths, "optim.learning_rate=0.001"]
  return load.load_config(spec, [*SMOKE, *given, *overrides])


def logps(setup, params):
  loader, _ = build.held_out_loader(setup)
  from dpo_jax.run import forward

  found = dict(forward.token_logps(setup, params, loader))
  return np.concatenate([found[i] for i in sorted(found)])


def test_an_exported_adapter_run_starts_the_next_as_its_merged_policy(
  pretrained, tmp_path
):
  config = on(pretrained)
  loop.fit(config, tmp_path)
  assert cli.main(["export", "--workdir", str(tmp_path)]) == 0
  folder = tmp_path / "export"
  assert {p.name for p in folder.iterdir()} == {
    "README.md",
    "config.json",
    "dpo_jax.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  setup = build.prepare_model(config)
  policy = trained.saved(setup, trained.initial(setup), tmp_path)
  again = build.prepare_model(on(folder, "tokenizer=hf:" + str(folder)))
  # Merged in f32: two ways to add products of order 1.
  np.testing.assert_allclose(
    logps(again, trained.initial(again)), logps(setup, policy), atol=2e-5
  )
  raw = json.loads((folder / "config.json").read_text())
  source = json.loads((pretrained / "config.json").read_text())
  assert raw.pop("dtype") == "float32"
  source.pop("torch_dtype")
  assert raw == source
  text = "Prosit, 3 café 😀"
  ours, theirs = tokenize.load("bytes"), tokenize.load(str(folder))
  assert ours.encode([text]) == theirs.encode([text])


def test_a_full_run_exports_its_very_parameters(pretrained, tmp_path):
  result = loop.fit(on(pretrained, lora=False), tmp_path)
  folder = export.publish(on(pretrained, lora=False), tmp_path)
  checkpoint = hf.open_folder(folder)
  _, params = parity.load(folder, parity.mesh())
  got, want = dict(tree.named(params)), dict(tree.named(result.state.params))
  assert got.keys() == want.keys()
  for path, x in want.items():
    x = np.asarray(x)
    if path in ("embed/tokens", "head/kernel"):  # padding is not in the file
      axis = 0 if path == "embed/tokens" else 1
      size = checkpoint.vocab_size
      x = np.moveaxis(x, axis, 0)[:size]
      got[path] = np.moveaxis(np.asarray(got[path]), axis, 0)[:size]
    np.testing.assert_array_equal(got[path], x, err_msg=path)


def test_a_model_born_here_is_exported_with_the_bytes_tokenizer(tmp_path):
  config = load.load_config("configs/dpo.py:smoke", SMOKE)
  loop.fit(config, tmp_path)
  folder = export.publish(config, tmp_path)
  raw = json.loads((folder / "config.json").read_text())
  assert (raw["model_type"], raw["vocab_size"]) == ("llama", 257)
  assert raw["eos_token_id"] == 256
  ends = json.loads((folder / "generation_config.json").read_text())
  assert ends == {"eos_token_id": 256}
  assert "dpo (beta 0.1" in (folder / "README.md").read_text()


def test_a_run_starts_from_an_exported_peft_adapter_which_is_its_reference(
  pretrained, tmp_path
):
  loop.fit(on(pretrained, "train.steps=4"), tmp_path / "run")
  config = on(pretrained, "train.steps=4", "export.form=adapter")
  folder = export.publish(config, tmp_path / "run")
  about = json.loads((folder / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] == str(pretrained)
  setup = build.prepare_model(config)
  policy = trained.saved(setup, trained.initial(setup), tmp_path / "run")
  # NeoX has one adapter for queries, keys and values: of another rank there.
  next_run = build.prepare(on(pretrained, f"init_adapter=hf:{folder}"))
  initial = trained.initial(next_run.setup)
  np.testing.assert_allclose(
    logps(next_run.setup, initial), logps(setup, policy), atol=2e-5
  )
  state = build.initial_state(next_run, initial)
  batch, _ = next_run.feed.batch(0, None)
  step = next_run.step
  _, metrics = step(state, batch, next_run.hparams)
  # A new adapter adds 0; what is left is f32 rounding of log-probs near 100.
  assert abs(float(metrics["rewards/margins"])) < 1e-5


def test_an_adapter_is_never_joined_to_another_base(tmp_path, capsys):
  """Its base was a run, and that run was trained on."""
  sft = "configs/sft.py:smoke"
  loop.fit(load.load_config(sft, SMOKE), tmp_path / "sft")
  spec, start = "configs/dpo.py:lora,smoke", f"init_from={tmp_path / 'sft'}"
  loop.fit(load.load_config(spec, [*SMOKE, start]), tmp_path / "dpo")
  loop.fit(
    load.load_config(sft, ["train.steps=4", "mesh.data=1"]), tmp_path / "sft"
  )
  workdir = ["--workdir", str(tmp_path / "dpo")]
  prompts = ["--config.sample.prompts=toy:4"]
  for argv in (["export", *workdir], ["sample", *workdir, *prompts]):
    assert cli.main(argv) == 2
    assert "not the reference" in capsys.readouterr().err
  third = load.load_config(spec, [*SMOKE, f"init_from={tmp_path / 'dpo'}"])
  with pytest.raises(ValueError, match="not the reference"):
    loop.fit(third, tmp_path / "third")
  assert not list((tmp_path / "dpo").glob("export*"))


def test_an_adapter_is_joined_by_the_scale_it_was_trained_with(
  tmp_path, capsys
):
  loop.fit(load.load_config("configs/dpo.py:lora,smoke", SMOKE), tmp_path)
  argv = ["export", "--workdir", str(tmp_path), "--config.lora.alpha=320.0"]
  assert cli.main(argv) == 2
  assert "lora.alpha (saved 32.0, now 320.0)" in capsys.readouterr().err


def test_another_policy_of_the_same_config_is_not_taken_for_done(
  tmp_path, capsys
):
  """Its data has the same name and other content."""
  lines = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
  for path, word in zip(lines, ("good", "fine"), strict=True):
    record = {"prompt": "It is", "chosen": f" {word}.", "rejected": " bad."}
    path.write_text(json.dumps(record) + "\n")
  data = tmp_path / "data.jsonl"
  config = load.load_config(
    "configs/dpo.py:smoke",
    [*SMOKE, f"data.train={data}", f"export.folder={tmp_path / 'out'}"],
  )
  for number, path in enumerate(lines):
    data.write_text(path.read_text())
    loop.fit(config, tmp_path / str(number))
  export.publish(config, tmp_path / "0")
  with pytest.raises(ValueError, match="exists already"):
    export.publish(config, tmp_path / "1")


def test_a_checkpoints_own_ends_are_kept_beside_the_tokenizers(
  pretrained, tmp_path
):
  own = {"eos_token_id": [7, 9], "temperature": 0.6}
  (pretrained / "generation_config.json").write_text(json.dumps(own))
  try:
    loop.fit(on(pretrained), tmp_path)
    folder = export.publish(on(pretrained), tmp_path)
  finally:
    (pretrained / "generation_config.json").unlink()
  got = json.loads((folder / "generation_config.json").read_text())
  assert got == {"eos_token_id": [7, 9, 256], "temperature": 0.6}


def test_an_export_that_is_there_is_skipped_and_another_is_kept(
  tmp_path, capsys
):
  config = load.load_config("configs/dpo.py:smoke", SMOKE)
  loop.fit(config, tmp_path)
  argv = ["export", "--workdir", str(tmp_path)]
  assert cli.main(argv) == 0
  stamp = (tmp_path / "export/model.safetensors").stat().st_mtime_ns
  # What decides nothing of a policy makes no other export of it.
  same = ("sample.count=4", "log.every=3", "model.remat=full", "train.steps=9")
  assert cli.main([*argv, *(f"--config.{field}" for field in same)]) == 0
  assert "done before, skipped" in capsys.readouterr().out
  assert (tmp_path / "export/model.safetensors").stat().st_mtime_ns == stamp
  loop.fit(load.load_config("configs/dpo.py:smoke", SMOKE), tmp_path)
  assert cli.main([*argv, "--config.export.dtype=bfloat16"]) == 2
  assert "exists already" in capsys.readouterr().err
  assert (tmp_path / "export/model.safetensors").stat().st_mtime_ns == stamp


def test_an_interrupted_export_leaves_no_folder_that_looks_complete(
  tmp_path, monkeypatch
):
  config = load.load_config("configs/dpo.py:smoke", SMOKE)
  loop.fit(config, tmp_path)

  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(export, "_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
      export.publish(config, tmp_path)
  assert not (tmp_path / "export").exists()
  assert export.publish(config, tmp_path).exists()


def test_a_push_uploads_the_folder_and_a_failed_one_keeps_it(
  tmp_path, monkeypatch, capsys
):
  import huggingface_hub

  calls = []
  fake = types.SimpleNamespace(
    create_repo=lambda name, exist_ok: calls.append(("create", name)),
    upload_folder=lambda repo_id, folder_path: calls.append(
      (repo_id, folder_path)
    ),
  )
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
  config = load.load_config("configs/dpo.py:smoke", SMOKE)
  loop.fit(config, tmp_path)
  argv = ["export", "--workdir", str(tmp_path), "--config.export.push=me/it"]
  assert cli.main(argv) == 0
  folder = str(tmp_path / "export")
  assert calls == [("create", "me/it"), ("me/it", folder)]
  assert "https://huggingface.co/me/it" in capsys.readouterr().out

  def refuse(**_):
    raise RuntimeError("401 Unauthorized")

  fake.upload_folder = refuse
  assert cli.main(argv) == 2  # the folder is there already, and is pushed
  err = capsys.readouterr().err
  assert "401 Unauthorized" in err
  assert "hf auth login" in err
  assert (tmp_path / "export/model.safetensors").exists()


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("export.form=adapter", "trained all parameters"),
    ("export.folder=gs://bucket/x", "local folder"),
    ("export.form=lora", "export.form"),
    ("export.dtype=int8", "export.dtype"),
  ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(
  override, message, tmp_path, capsys
):
  config = load.load_config("configs/dpo.py:smoke", SMOKE)
  loop.fit(config, tmp_path)
  argv = ["export", "--workdir", str(tmp_path), f"--config.{override}"]
  assert cli.main(argv) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.glob("export*"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
  parity.write(parity.small(PYTHIA), tmp_path)
  with pytest.raises(ValueError, match="has 257 tokens"):
    loop.fit(on(tmp_path), tmp_path / "run")


def test_a_shape_beside_a_checkpoint_that_has_its_own_is_refused(
  pretrained, tmp_path
):
  config = load.load_config(
    "configs/dpo.py:smoke", [*SMOKE, f"init_from=hf:{pretrained}"]
  )
  with pytest.raises(ValueError, match=f":model=hf:{pretrained}"):
    loop.fit(config, tmp_path)


def test_an_adapter_alone_needs_a_base_that_peft_can_load(tmp_path, capsys):
  loop.fit(load.load_config("configs/dpo.py:lora,smoke", SMOKE), tmp_path)
  argv = ["export", "--workdir", str(tmp_path)]
  assert cli.main([*argv, "--config.export.form=adapter"]) == 2
  assert "init_from = 'hf:" in capsys.readouterr().err


def test_a_folder_without_a_run_is_not_exported_and_stays_as_it_was(
  tmp_path, capsys
):
  argv = ["export", "--workdir", str(tmp_path), "--config"]
  assert cli.main([*argv, "configs/dpo.py:smoke"]) == 2
  assert "train it first" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
