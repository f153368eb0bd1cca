"""The export verb: a run's policy as a folder, complete or not there."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from dpo_jax import cli, export, loop, tree
from dpo_jax.config import load
from dpo_jax.data.tokens import tokenize
from dpo_jax.models import hf
from dpo_jax.run import build, forward, trained
from tests import conftest, folders
from tests.models import parity

SMOKE = ["train.steps=2", "mesh.data=1"]
PYTHIA = "EleutherAI/pythia-70m"


@pytest.fixture(autouse=True, scope="module")
def _in_the_checkout():
  one = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(conftest.ROOT)
    patch.setattr(jax, "devices", lambda *_: one)
    yield


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


def smoke_config(arg="smoke", *overrides):
  return load.load_config(f"configs/dpo.py:{arg}", [*SMOKE, *overrides])


@pytest.fixture(scope="module")
def born(tmp_path_factory):
  """A run folder of all parameters of a model that is born here."""
  folder = tmp_path_factory.mktemp("born")
  folders.untrained(smoke_config(), folder)
  return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
  """A run folder of an adapter on a model that is born here."""
  folder = tmp_path_factory.mktemp("adapter")
  folders.untrained(smoke_config("lora,smoke"), folder)
  return folder


@pytest.fixture(scope="module")
def adapted(pretrained, tmp_path_factory):
  """A run folder of an adapter on the published weights."""
  folder = tmp_path_factory.mktemp("adapted")
  folders.untrained(on(pretrained), folder)
  return folder


@pytest.fixture
def workdir(born, tmp_path):
  """A copy of `born`, to write in."""
  return shutil.copytree(born, tmp_path / "run")


def logps(config, setup, params):
  loader, _ = build.held_out_of(
    config, setup, build.algorithm_of(config, setup)
  ).loader()
  found = dict(forward.token_logps(setup, params, loader))
  return np.concatenate([found[i] for i in sorted(found)])


def test_an_exported_adapter_run_starts_the_next_as_its_merged_policy(
  pretrained, adapted, tmp_path
):
  config, folder = on(pretrained), tmp_path / "export"
  argv = ["export", "--workdir", str(adapted)]
  assert cli.main([*argv, f"--config.export.folder={folder}"]) == 0
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
  base = trained.initial(setup)
  policy = setup.trained.model(base, trained.restored(setup, base, adapted))
  start = logps(config, setup, base)
  next_config = on(folder, "tokenizer=hf:" + str(folder))
  again = build.prepare_model(next_config)
  found = logps(next_config, again, trained.initial(again))
  # Merged in f32: two ways to add products of order 1.
  np.testing.assert_allclose(found, logps(config, setup, policy), atol=2e-5)
  assert np.abs(found - start).max() > 1e-2
  raw = json.loads((folder / "config.json").read_text())
  source = json.loads((pretrained / "config.json").read_text())
  assert raw.pop("dtype") == "float32"
  source.pop("torch_dtype")
  assert raw == source
  text = "Prosit, 3 café 😀"
  ours, theirs = tokenize.load("bytes"), tokenize.load(str(folder))
  assert ours.encode([text]) == theirs.encode([text])


def test_a_full_run_exports_its_very_parameters(pretrained, tmp_path):
  _, state = folders.untrained(on(pretrained, lora=False), tmp_path)
  folder = export.publish(on(pretrained, lora=False), tmp_path)
  checkpoint = hf.open_folder(folder)
  _, params = parity.load(folder, parity.mesh())
  got, want = dict(tree.named(params)), dict(tree.named(state.params))
  assert got.keys() == want.keys()
  for path, x in want.items():
    x = np.asarray(x)
    if path in ("embed/tokens", "head/kernel"):  # padding is not in the file
      axis = 0 if path == "embed/tokens" else 1
      size = checkpoint.vocab_size
      x = np.moveaxis(x, axis, 0)[:size]
      got[path] = np.moveaxis(np.asarray(got[path]), axis, 0)[:size]
    np.testing.assert_array_equal(got[path], x, err_msg=path)


def test_a_model_born_here_is_exported_with_the_bytes_tokenizer(workdir):
  folder = export.publish(smoke_config(), workdir)
  raw = json.loads((folder / "config.json").read_text())
  assert (raw["model_type"], raw["vocab_size"]) == ("llama", 257)
  assert raw["eos_token_id"] == 256
  ends = json.loads((folder / "generation_config.json").read_text())
  assert ends == {"eos_token_id": 256}
  assert "dpo (beta 0.1" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
  ("there", "want"),
  [
    (None, [1, 256]),  # of config.json
    ({"eos_token_id": 256, "top_k": 5}, 256),
    ({"eos_token_id": [4, 256], "temperature": 0.6}, [4, 256]),
  ],
)
def test_an_export_names_what_ended_its_texts_and_what_its_base_ended_at(
  there, want, pretrained, tmp_path
):
  """As transformers reads it; what else was there stays."""
  import transformers

  base = shutil.copytree(pretrained, tmp_path / "base")
  if there is not None:
    (base / "generation_config.json").write_text(json.dumps(there))
  folders.untrained(on(base), tmp_path / "run")
  folder = export.publish(on(base), tmp_path / "run")
  found = json.loads((folder / "generation_config.json").read_text())
  assert found == {**(there or {"bos_token_id": 1}), "eos_token_id": want}
  read = transformers.GenerationConfig.from_pretrained(folder)
  assert read.eos_token_id == want


def test_a_run_starts_from_an_exported_peft_adapter_which_is_its_reference(
  pretrained, adapted, tmp_path
):
  out = f"export.folder={tmp_path / 'export'}"
  config = on(pretrained, "export.form=adapter", out)
  folder = export.publish(config, adapted)
  about = json.loads((folder / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] == str(pretrained)
  setup = build.prepare_model(config)
  base = trained.initial(setup)
  policy = setup.trained.model(base, trained.restored(setup, base, adapted))
  # NeoX has one adapter for queries, keys and values: of another rank there.
  next_config = on(pretrained, f"init_adapter=hf:{folder}")
  next_run = build.prepare(next_config)
  initial = trained.initial(next_run.setup)
  np.testing.assert_allclose(
    logps(next_config, next_run.setup, initial),
    logps(config, setup, policy),
    atol=2e-5,
  )
  state = build.initial_state(next_run, initial)
  batch, _ = next_run.feed.batch(0, None)
  step = next_run.step
  _, metrics = step(state, batch, next_run.hparams)
  # A new adapter adds 0; what is left is f32 rounding of log-probs near 100.
  assert abs(float(metrics["rewards/margins"])) < 1e-5


def test_an_adapter_is_never_joined_to_another_base(tmp_path, capsys):
  """Its base was a run, and that run was trained on."""
  sft = load.load_config("configs/sft.py:smoke", [*SMOKE, "train.steps=4"])
  folders.untrained(sft, tmp_path / "sft")
  start = f"init_from={tmp_path / 'sft'}"
  folders.untrained(smoke_config("lora,smoke", start), tmp_path / "dpo")
  folders.untrained(sft, tmp_path / "sft", step=4)
  workdir = ["--workdir", str(tmp_path / "dpo")]
  prompts = ["--config.sample.prompts=toy:4"]
  for argv in (["export", *workdir], ["sample", *workdir, *prompts]):
    assert cli.main(argv) == 2
    assert "not the reference" in capsys.readouterr().err
  third = smoke_config("lora,smoke", f"init_from={tmp_path / 'dpo'}")
  with pytest.raises(ValueError, match="not the reference"):
    loop.fit(third, tmp_path / "third")
  assert not list((tmp_path / "dpo").glob("export*"))


def test_an_adapter_is_joined_by_the_scale_it_was_trained_with(adapter, capsys):
  argv = ["export", "--workdir", str(adapter), "--config.lora.alpha=320.0"]
  assert cli.main(argv) == 2
  assert "lora.alpha (saved 32.0, now 320.0)" in capsys.readouterr().err


def test_another_policy_of_the_same_config_is_not_taken_for_done(
  born, tmp_path
):
  """As one is whose data has the same name and other content."""
  config = smoke_config("smoke", f"export.folder={tmp_path / 'out'}")
  folders.untrained(config, tmp_path / "other", seed=2)
  export.publish(config, born)
  with pytest.raises(ValueError, match="exists already"):
    export.publish(config, tmp_path / "other")


def test_an_export_that_is_there_is_skipped_and_another_is_kept(
  workdir, capsys
):
  argv = ["export", "--workdir", str(workdir)]
  assert cli.main(argv) == 0
  stamp = (workdir / "export/model.safetensors").stat().st_mtime_ns
  # What decides nothing of a policy makes no other export of it.
  same = ("sample.count=4", "log.every=3", "model.remat=full", "train.steps=9")
  assert cli.main([*argv, *(f"--config.{field}" for field in same)]) == 0
  assert "done before, skipped" in capsys.readouterr().out
  assert (workdir / "export/model.safetensors").stat().st_mtime_ns == stamp
  assert cli.main([*argv, "--config.export.dtype=bfloat16"]) == 2
  assert "exists already" in capsys.readouterr().err
  assert (workdir / "export/model.safetensors").stat().st_mtime_ns == stamp


def test_an_interrupted_export_leaves_no_folder_that_looks_complete(
  workdir, monkeypatch
):
  config = smoke_config()

  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(export, "_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
      export.publish(config, workdir)
  assert not (workdir / "export").exists()
  assert export.publish(config, workdir).exists()


def test_a_push_uploads_the_folder_and_a_failed_one_keeps_it(
  workdir, monkeypatch, capsys
):
  import huggingface_hub

  calls = []
  fake = types.SimpleNamespace(
    create_repo=lambda name, exist_ok, private: calls.append(
      ("create", name, private)
    ),
    repo_info=lambda name: types.SimpleNamespace(private=True),
    upload_folder=lambda repo_id, folder_path: calls.append(
      (repo_id, folder_path)
    ),
  )
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
  argv = ["export", "--workdir", str(workdir), "--config.export.push=me/it"]
  assert cli.main(argv) == 0
  folder = str(workdir / "export")
  assert calls == [("create", "me/it", True), ("me/it", folder)]
  assert "https://huggingface.co/me/it" in capsys.readouterr().out

  assert cli.main([*argv, "--config.export.public=true"]) == 0
  assert calls[2:] == [("create", "me/it", False), ("me/it", folder)]
  fake.repo_info = lambda name: types.SimpleNamespace(private=False)
  capsys.readouterr()
  assert cli.main(argv) == 2  # it was made public before
  assert "set export.public" in capsys.readouterr().err
  assert len(calls) == 5

  def refuse(**_):
    raise RuntimeError("401 Unauthorized")

  fake.repo_info = lambda name: types.SimpleNamespace(private=True)

  fake.upload_folder = refuse
  assert cli.main(argv) == 2  # the folder is there already, and is pushed
  err = capsys.readouterr().err
  assert "401 Unauthorized" in err
  assert "hf auth login" in err
  assert (workdir / "export/model.safetensors").exists()


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
  override, message, born, capsys
):
  argv = ["export", "--workdir", str(born), f"--config.{override}"]
  assert cli.main(argv) == 2
  assert message in capsys.readouterr().err
  assert not list(born.glob("export*"))


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


def test_an_export_names_no_folder_of_this_machine(pretrained, tmp_path):
  """Neither in its card, nor in the configs; the file names stay."""
  path = tmp_path / "mine" / "pairs.jsonl"
  path.parent.mkdir()
  row = {"prompt": "The plot", "chosen": " is warm.", "rejected": " is dull."}
  path.write_text(json.dumps(row) + "\n")
  base = shutil.copytree(pretrained, tmp_path / "mine" / "base")
  raw = json.loads((base / "config.json").read_text())
  raw["_name_or_path"] = str(base)
  (base / "config.json").write_text(json.dumps(raw))
  generation = {"eos_token_id": 0, "draft": str(base)}
  (base / "generation_config.json").write_text(json.dumps(generation))
  config = on(base, f"data.train=toy:8 + 2*{path}", f"workdir={tmp_path}/run")
  folders.untrained(config, tmp_path / "run")
  folder = export.publish(config, tmp_path / "run")
  for file in folder.iterdir():
    assert str(tmp_path).encode() not in file.read_bytes(), file
  card = (folder / "README.md").read_text()
  assert "`toy:8 + 2*pairs.jsonl`, from `hf:base`" in card
  assert json.loads((folder / "config.json").read_text()) == {
    **{k: v for k, v in raw.items() if k != "torch_dtype"},
    "dtype": "float32",
    "_name_or_path": "base",
  }
  assert export.publish(config, tmp_path / "run") == folder  # done before


def test_an_adapter_of_a_local_base_is_not_uploaded(pretrained, adapted):
  config = on(pretrained, "export.form=adapter", "export.push=me/it")
  with pytest.raises(ValueError, match="folder that others have not"):
    export.publish(config, adapted)
  assert not (adapted / "export").exists()


def test_an_adapter_alone_needs_a_base_that_peft_can_load(adapter, capsys):
  argv = ["export", "--workdir", str(adapter)]
  assert cli.main([*argv, "--config.export.form=adapter"]) == 2
  assert "init_from = 'hf:" in capsys.readouterr().err


def test_a_folder_without_a_run_is_not_exported_and_stays_as_it_was(
  tmp_path, capsys
):
  argv = ["export", "--workdir", str(tmp_path), "--config"]
  assert cli.main([*argv, "configs/dpo.py:smoke"]) == 2
  assert "train it first" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
