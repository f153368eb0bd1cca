"""What a user can get wrong on the command line, and what they are told."""

import json
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import dpo_jax
from dpo_jax import cli, sweeps
from dpo_jax.config import load
from tests import conftest, folders

GOOD = [
  {"prompt": f"The plot {i}", "chosen": " is fine.", "rejected": " is bad."}
  for i in range(8)
]


@pytest.fixture
def train(tmp_path, capsys, monkeypatch):
  """Runs `train` on a jsonl and returns (exit code, stderr, stdout)."""
  monkeypatch.chdir(dpo_jax.__path__[0] + "/..")
  data = tmp_path / "my.jsonl"
  data.write_text("".join(json.dumps(row) + "\n" for row in GOOD))

  def run(*words, content=None):
    if content is not None:
      data.write_bytes(content)
    code = cli.main(
      [
        "train",
        "--config=configs/dpo.py:smoke",
        f"--config.data.train={data}",
        "--config.data.eval=None",
        f"--workdir={tmp_path / 'run'}",
        *words,
      ]
    )
    out, err = capsys.readouterr()
    return code, err, out

  return run


def lines(*rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


PLAIN = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (lines(PLAIN, {"prompt": "p", "chose": "a", "rejected": "b"}),
     "my.jsonl:2: field 'chosen' is missing; did you mean 'chose'?"),
    (lines({**PLAIN, "chosen": ""}), "my.jsonl:1: field 'chosen' is empty"),
    (lines({**PLAIN, "rejected": "a"}),
     "my.jsonl:1: 'chosen' and 'rejected' are the same text"),
    (lines({**PLAIN, "chosen": 3}),
     "my.jsonl:1: field 'chosen' must be str, not int"),
    (lines(PLAIN) + b'{"prompt": "p", "cho',
     "my.jsonl:2: not JSON"),
    (b'{"prompt": "\xff"}\n', "my.jsonl:1: not UTF-8"),
    (lines({**PLAIN, "prompt": "p" * 400}),
     "my.jsonl:1: field 'prompt' has 400 tokens, more than "
     "data.max_prompt_length = 64"),
    (b"", "my.jsonl: no usable record"),
  ],
)  # fmt: skip
def test_bad_data_names_file_record_and_field(
  train, tmp_path, content, message
):
  code, err, _ = train(content=content)
  assert code == 2
  assert message in err
  assert len(err.splitlines()) == 1
  assert not (tmp_path / "run" / "checkpoints").exists()


def trained(tmp_path, *overrides):
  """Makes the run folder of `train`, so that nothing is left to train."""
  fields = [f"data.train={tmp_path}/my.jsonl", "data.eval=None", *overrides]
  config = load.load_config("configs/dpo.py:smoke", fields)
  folders.untrained(config, tmp_path / "run")


def test_bad_records_are_skipped_and_counted_if_the_config_says_so(
  train, tmp_path
):
  bad = {**PLAIN, "chosen": ""}
  content = lines(*GOOD, bad, bad) + b'{"prompt": '
  (tmp_path / "my.jsonl").write_bytes(content)
  trained(tmp_path, "data.bad_records=skip")
  code, _, out = train("--config.data.bad_records=skip")
  assert code == 0
  assert "8 examples" in out
  assert "2 skipped: empty, 1 skipped: invalid JSON" in out


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--config.loss.betta=1", "--config.loss.betta is not a field of "
     "configs/dpo.py; did you mean 'loss.beta'?"),
    ("--config.loss.dialect=paper", "not a field"),
    ("--config.loss.beta=big", "must be of type float"),
    ("--config.loss.beta=-1", "loss.beta = -1.0 must be above 0"),
    ("--config.data.batch_size=1.5", "must be of type int"),
    ("--config.data.train=absent.jsonl", "absent.jsonl: cannot be read"),
    ("--config.data.train=my.yaml", "the suffix of data.train = '.yaml'"),
    ("--config.data.train=tuy", "did you mean 'toy'?"),
    ("--config=configs/dpi.py", "did you mean 'configs/dpo.py'?"),
    ("--config=configs/dpo.py:los=ipo", "did you mean 'loss'?"),
    ("--config=configs/dpo.py:loss=ipso", "did you mean 'ipo'?"),
    ("--wrokdir=x", "did you mean 'workdir'?"),
    ("--profil --config=dpo", "did you mean 'profile'?"),
    ("--profile=3", "--profile=3: --profile takes no value"),
    ("train", "unexpected argument 'train'"),
    ("--config.optim.name=adam", "did you mean 'adamw'?"),
    ("--config.optim.name=adamw", "field of optim (adamw) = 'decay'"),
    ("--config.mesh.mode=jitt", "did you mean 'jit'?"),
    ("--config.mesh.tensor=3", "there are 8 devices"),
    ("--config.mesh.tensor=8",
     "layers/attn/k/kernel: dimension 2 (kv_heads) of size 2 does not divide "
     "over mesh axis 'tensor' of size 8"),
    ("--config.mesh.context=2", "mesh.context = 2"),
    ("--config.ref=base", "ref = 'base' is the base of an adapter"),
    ("--config.ref=bass", "ref = 'bass' is not known"),
    ("--config.ref=ema", "ref_mix = None with ref = 'ema'"),
    ("--config.ref_every=5", "ref_every = 5 with ref = 'frozen'"),
    ("--config.ref=none --config.loss.name=kto", "loss=kto"),
    ("--config.tokenizer=/nowhere", "tokenizer = '/nowhere' cannot be loaded"),
    ("--config.model.norm=batch", "model.norm = 'batch'"),
    ("--config.data.max_prompt_length=9999", "model.max_positions"),
    ("--config.checkpoint.keep=1", "checkpoint.keep = 1"),
    ("--config.data.batch_size=0", "data.batch_size = 0 must be at least 1"),
    ("--config.data.batch_size=None", "data.batch_size = None"),
    ("--config.train.steps=-5", "train.steps = -5 must be at least 1"),
    ("--config.train.epochs=-1", "train.epochs = -1.0 must be above 0"),
    ("--config.optim.clip_norm=-1", "optim.clip_norm = -1.0 must be above 0"),
    ("--config.optim.warmup=-1", "optim.warmup = -1 must be at least 0"),
    ("--config.optim.decay=1", "optim.decay = 1.0 must be below 1"),
    ("--config.model.head_chunk=0", "head_chunk = 0 must be at least 1"),
    ("--config.model.window=0", "model.window = 0 must be at least 1"),
    ("--config.mesh.fsdp=0", "mesh.fsdp = 0 must be at least 1"),
    ("--config.loss.beta=None", "loss.beta = None"),
    ("--config.loss.name=ipo", "--config FILE.py:loss=ipo"),
    ("--config.optim.freeze=('(',)", "optim.freeze: '('"),
    ("--config.optim.freeze=('typo',)", "'typo' matches no parameter"),
    ("--config.optim.freeze=('.*',)", "leaves nothing to train"),
    ("--config.data.packed=false --config.data.max_row_length=64",
     "data.max_row_length has no effect"),
  ],
)  # fmt: skip
def test_a_wrong_setting_gets_one_line_that_says_what_to_do(
  train, word, message, monkeypatch
):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  code, err, _ = train(*word.split())
  assert code == 2
  assert message in err
  assert len(err.splitlines()) == 1


def test_help_and_unknown_verbs(capsys):
  for words in ([], ["--help"], ["help"], ["train", "--help"]):
    assert cli.main(words) == 0
    assert "--config.FIELD=VALUE" in capsys.readouterr().out
  assert cli.main(["train", "--help", "--config", "dpo:loss=simpo"]) == 0
  assert "loss.gamma=1.0" in capsys.readouterr().out
  assert cli.main(["losses", "--help"]) == 0
  assert "loss.beta" not in capsys.readouterr().out
  assert cli.main(["trian"]) == 2
  assert "did you mean 'train'?" in capsys.readouterr().err
  assert cli.main(["train"]) == 2
  assert "train needs --config" in capsys.readouterr().err


def test_a_reader_of_the_help_may_go_away():
  command = f"{sys.executable} -m dpo_jax train --help | head -1"
  done = subprocess.run(
    command, shell=True, cwd=conftest.ROOT, capture_output=True, text=True
  )
  assert done.stderr == ""
  assert done.stdout.startswith("train ")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """The words of a sweep command, and the folder in which it ran."""
  workdir = tmp_path_factory.mktemp("sweep")
  words = [
    "sweep",
    f"--config={dpo_jax.__path__[0]}/../configs/dpo.py:smoke",
    "--config.sample.prompts=toy",
    "--config.sample.count=8",
    "--config.sample.batch_size=8",
    "--config.sample.max_new_tokens=4",
    "--config.sample.scorers=vader",
    f"--workdir={workdir}",
  ]
  assert cli.main(words) == 0
  return words, workdir


def test_a_sweep_ends_with_its_table_and_where_the_report_is(swept, capsys):
  words, workdir = swept
  assert cli.main(words) == 0
  out = capsys.readouterr().out.splitlines()
  (start,) = (n for n, line in enumerate(out) if line.startswith("run "))
  table = out[start:]
  names = ["reference", *(f"beta={b}" for b in ("0.05", "0.1", "1.0", "5.0"))]
  assert [line.split()[0] for line in table[1:6]] == names
  assert table[6] == f"report: {workdir}/report.html"
  assert out.count("done before, skipped") == 5


@pytest.mark.parametrize(("code", "written"), [(1, True), (130, False)])
def test_a_sweep_whose_point_failed_has_its_report_all_the_same(
  swept, code, written, monkeypatch
):
  """One that was stopped goes on, and has it at its end."""
  words, workdir = swept
  page = workdir / "report.html"
  before = page.read_bytes()
  page.unlink()
  monkeypatch.setattr(sweeps, "sweep", lambda *args, **options: code)
  assert cli.main(words) == code
  assert page.exists() == written
  page.write_bytes(before)


@pytest.mark.slow
def test_methods_and_seeds_are_points_of_a_command(tmp_path, capsys):
  words = ["sweep", "--config=dpo:smoke", f"--workdir={tmp_path}"]
  words += ["--config.train.steps=1", "--config.data.eval=None"]
  words += ["--sweep", ":loss=dpo,simpo", "--sweep=loss.beta=0.5,1"]
  assert cli.main(words) == 0
  names = [f"loss={x},beta={b}" for x in ("dpo", "simpo") for b in (0.5, 1.0)]
  for name in names:
    saved = json.loads((tmp_path / name / "config.json").read_text())
    assert saved["loss"]["name"] == name.partition(",")[0][5:]
    assert f"beta={saved['loss']['beta']}" in name
  assert "gamma" in saved["loss"]
  about = json.loads((tmp_path / "sweep.json").read_text())
  assert about["title"] == "dpo and simpo over loss, loss.beta"
  assert [p["name"] for p in about["points"]] == names
  assert (tmp_path / "report.html").exists()


def test_the_report_is_written_again_from_the_folder(swept, capsys):
  _, workdir = swept
  before = (workdir / "report.html").read_bytes()
  (workdir / "report.html").unlink()
  assert cli.main(["report", f"--workdir={workdir}"]) == 0
  assert (workdir / "report.html").read_bytes() == before
  assert "beta=5.0" in capsys.readouterr().out


def test_eval_takes_the_config_of_the_run_and_the_sweep_sees_what_it_did(
  swept, capsys
):
  words, workdir = swept
  path = workdir / "beta=0.1/evaluation.json"
  before = json.loads(path.read_text())
  point = f"--workdir={workdir}/beta=0.1"
  assert cli.main(["eval", point, "--config.sample.count=4"]) == 0
  assert json.loads(path.read_text())["samples"] == 4
  assert "reward/vader" in capsys.readouterr().out
  assert cli.main(words) == 0
  assert capsys.readouterr().out.count("done before, skipped") == 4
  assert json.loads(path.read_text()) == before


def test_sample_draws_from_a_run_and_goes_on_where_it_is(swept, capsys):
  _, workdir = swept
  words = ["sample", f"--workdir={workdir}/beta=5.0"]
  words += ["--config.sample.count=2", "--config.sample.draws=3"]
  assert cli.main(words) == 0
  out = capsys.readouterr().out
  assert out.count(" ⟶") == 3
  assert all(c.isprintable() or c == "\n" for c in out)
  path = workdir / "beta=5.0/completions.jsonl"
  assert f"6 completions in {path}\n" in out
  before = path.read_bytes()
  assert len(before.splitlines()) == 6
  assert cli.main(words) == 0
  assert path.read_bytes() == before
  assert cli.main([*words, "--config.sample.seed=1"]) == 2
  assert "drawn from another policy, prompts or settings" in (
    capsys.readouterr().err
  )
  assert path.read_bytes() == before


def test_eval_refuses_a_reference_that_was_trained_on(tmp_path, capsys):
  def main(*words):
    code = cli.main(list(words))
    return code, capsys.readouterr().err

  configs = f"{dpo_jax.__path__[0]}/../configs"
  sft = load.load_config(f"{configs}/sft.py:smoke", ["train.steps=3"])
  folders.untrained(sft, tmp_path / "a", step=2)
  start = [f"init_from={tmp_path}/a"]
  dpo = load.load_config(f"{configs}/dpo.py:smoke", start)
  folders.untrained(dpo, tmp_path / "b")
  run = f"--workdir={tmp_path}/b"
  assert main("eval", run)[0] == 0
  random = f"--config={configs}/dpo.py:smoke"
  code, err = main("eval", run, random)
  assert code == 2
  assert "init_from (saved " in err
  folders.untrained(sft, tmp_path / "a", step=3)
  code, err = main("eval", run)
  assert code == 2
  assert "is not the reference that this run was trained with" in err


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("sweep --config=configs/dpo.json --workdir=x", "config.json: no such"),
    ("train --config=configs/dpo.py:smoke --workdir=x "
     "--config.sample.labels=bradley_terry", "sample.draws must be at least 2"),
    ("eval --workdir=nowhere",
     "nowhere/config.json: no such file; is nowhere the folder of a run?"),
    ("sample --workdir=nowhere", "nowhere/config.json: no such file"),
    ("report --workdir=nowhere", "nowhere holds no sweep"),
    ("report", "report needs --workdir"),
    ("train --config=dpo:smoke --workdir=x --sweep loss.beta=1",
     "--sweep is of `dpo-jax sweep`, not of train"),
    ("sweep --config=dpo:smoke --workdir=x --sweep loss.betta=1",
     "--sweep loss.betta is not a field of dpo; did you mean 'loss.beta'?"),
    ("sweep --config=dpo:smoke --workdir=x --sweep loss.beta=1,-1",
     "loss.beta = -1.0 must be above 0"),
    ("sweep --config=configs/dpo.py:smoke", "sweep needs --workdir"),
    ("sweep --config=configs/sft.py:smoke --workdir=x", "has no sweep()"),
    ("sweep --config=configs/dpo.py:smoke,loss=sft --workdir=x",
     "the sweep sets loss.beta, which is not a field"),
    ("eval --config=configs/dpo.py:smoke --workdir=nowhere",
     "the run = nowhere holds no checkpoints/ folder"),
    ("sample --config=configs/dpo.py:smoke --workdir=nowhere",
     "nowhere holds no trained policy"),
    ("train --config=configs/quickstart.py:stage=dpoo",
     "did you mean 'dpo'?"),
    ("train --config=configs/dpo.py:smoke --workdir=x "
     "--config.sample.labels=bradley", "sample.labels = 'bradley'"),
    ("train --config=configs/dpo.py:smoke --workdir=x "
     "--config.sample.prefix=(8,2)", "sample.prefix = (8, 2)"),
    ("train --config=configs/dpo.py:smoke --workdir=x "
     "--config.ref_store=y", "ref_store has no effect with ref = 'frozen'"),
  ],
)  # fmt: skip
def test_a_wrong_verb_or_folder_gets_one_line_and_writes_nothing(
  words, message, capsys, monkeypatch, tmp_path
):
  root = pathlib.Path(dpo_jax.__path__[0]).parent
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(root / "configs")
  assert cli.main(words.split()) == 2
  error = capsys.readouterr().err
  assert message in error
  assert len(error.splitlines()) == 1
  assert [p.name for p in tmp_path.iterdir()] == ["configs"]


def test_another_config_in_the_same_folder_is_refused_and_loses_nothing(
  train, tmp_path
):
  trained(tmp_path)

  def files():
    root = tmp_path / "run"
    return {
      str(p.relative_to(root)): p.read_bytes()
      for p in root.rglob("*")
      if p.is_file()
    }

  before = files()
  code, err, _ = train("--config.loss.beta=0.5")
  assert code == 2
  assert "loss.beta (saved 0.1, now 0.5)" in err
  code, err, _ = train("--config.data.train=absent.jsonl")
  assert code == 2
  assert files() == before


def test_overrides_take_the_types_of_their_fields():
  config = load.load_config(
    "configs/dpo.py:loss=ipo",
    [
      "loss.beta=1",
      "data.packed=false",
      "mesh.data=4",
      "optim.freeze=('embed',)",
      "sample.scorers=tfidf:my.csv,vader",
      "optim.clip_norm=None",
    ],
  )
  assert config.loss.to_dict() == {
    "name": "ipo",
    "beta": 1.0,
    "dialect": "paper",
  }
  assert config.data.packed is False
  assert config.mesh.data == 4
  assert config.optim.freeze == ("embed",)
  assert config.sample.scorers == ("tfidf:my.csv", "vader")
  assert config.optim.clip_norm is None
  with pytest.raises(AttributeError):
    config.new_field = 1


def test_the_names_of_a_notebook_are_there():
  for name in dpo_jax.__all__:
    assert getattr(dpo_jax, name) is not None
  with pytest.raises(AttributeError):
    _ = dpo_jax.nothing


def test_no_module_of_the_package_hides_a_name_of_a_notebook():
  """Importing dpo_jax.x sets the attribute x of the package."""
  modules = {m.name for m in pkgutil.iter_modules(dpo_jax.__path__)}
  hidden = modules & set(dpo_jax.__all__)
  assert hidden == {"report"}
  assert callable(dpo_jax.report)  # the package is what the name stands for
