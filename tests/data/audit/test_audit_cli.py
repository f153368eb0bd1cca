"""`dpo-jax audit` as a user, or a CI job, runs it."""

import json
import subprocess
import sys

import pytest

import dpo_jax
from dpo_jax import cli
from dpo_jax.config import load

ROOT = dpo_jax.__path__[0] + "/.."
GOOD = [
  {"prompt": f"The plot {i}", "chosen": " is fine.", "rejected": " is bad."}
  for i in range(8)
]
SAME = {"prompt": "The plot", "chosen": " is fine.", "rejected": " is fine."}


@pytest.fixture
def audit(tmp_path, capsys, monkeypatch):
  """Runs `audit` on rows and returns (exit code, stdout, stderr)."""
  monkeypatch.chdir(ROOT)
  data = tmp_path / "my.jsonl"

  def run(*words, rows=GOOD):
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = cli.main(
      [
        "audit",
        "--config=configs/dpo.py:smoke",
        f"--config.data.train={data}",
        "--config.data.eval=None",
        *words,
      ]
    )
    return code, *capsys.readouterr()

  return run


def test_good_data_exits_with_0_and_needs_no_folder(audit, tmp_path):
  code, out, err = audit()
  assert (code, err) == (0, "")
  assert "no limit is exceeded\naudit: 0:0" in out
  assert [path.name for path in tmp_path.iterdir()] == ["my.jsonl"]


def test_bad_data_exits_with_1_naming_limit_record_and_what_to_do(audit):
  code, out, err = audit(rows=[*GOOD, SAME])
  assert (code, err) == (1, "")
  assert "FAILED  skipped          1 of 9 records (11.1 %), at most 0 %" in out
  said = " ".join(out.split())
  assert "my.jsonl:9: 'chosen' and 'rejected' are the same text" in said
  assert "→ mend them or take them out" in out
  assert "limits of data.train exceeded: skipped\n" in out


@pytest.mark.parametrize("limit", ["None", "1", "0.2"])
def test_a_limit_of_the_config_decides(audit, limit):
  rows = [*GOOD, SAME]
  assert audit(f"--config.audit.skipped={limit}", rows=rows)[0] == 0


def test_the_held_out_data_decides_too(audit, tmp_path):
  path = tmp_path / "held_out.jsonl"
  path.write_text(json.dumps(GOOD[0]) + "\n" + json.dumps(SAME) + "\n")
  code, out, _ = audit(f"--config.data.eval={path}")
  assert code == 1
  assert "limits of data.eval exceeded: skipped\n" in out


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--config.data.train=absent.jsonl", "absent.jsonl: cannot be read"),
    ("--config.data.train=None", "data.train is not set"),
    ("--config.data.train=tuy", "did you mean 'toy'?"),
    ("--config.data.train=2*toy + x*toy", "data.train: the weight 'x'"),
    ("--config.data.long_prompt=cut", "data.long_prompt = 'cut'"),
    ("--config.tokenizer=/nowhere", "tokenizer = '/nowhere' cannot be loaded"),
    ("--config.algo=ppoo", "algo = 'ppoo' is not known"),
    ("--config.audit.skiped=0", "did you mean 'audit.skipped'?"),
    ("--config.audit.skipped=-1", "audit.skipped = -1.0 must be at least 0"),
    ("--config.audit.cut=2", "audit.cut = 2.0 is a share: it must be at most"),
    ("--config.audit.show=-1", "audit.show = -1 must be at least 0"),
    ("--config.audit.show=None", "audit.show = None: it needs a value"),
    ("--config=configs/quickstart.py:stage=tokenizer", "is not a field"),
  ],
)
def test_a_wrong_setting_gets_one_line_that_says_what_to_do(
  audit, monkeypatch, word, message
):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  code, out, err = audit(word)
  assert code == 2
  assert message in err
  assert len(err.splitlines()) == 1
  assert out == ""


def test_messages_without_a_template_get_one_line(audit):
  said = [{"role": "user", "content": "How is the plot?"}]
  sides = {
    name: [{"role": "assistant", "content": name}]
    for name in ("chosen", "rejected")
  }
  code, _, err = audit(rows=[{"prompt": said, **sides}])
  assert code == 2
  assert "messages need a tokenizer with a chat template" in err
  assert len(err.splitlines()) == 1


def test_a_config_without_limits_is_refused(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = ["audit", "--config=configs/quickstart.py:stage=tokenizer"]
  assert cli.main(words) == 2
  assert "starts from configs/base.py" in capsys.readouterr().err
  assert cli.main(["audit"]) == 2
  assert "audit needs --config" in capsys.readouterr().err


def test_the_config_of_a_run_folder_can_be_audited(tmp_path, capsys):
  config = load.load_config(f"{ROOT}/configs/dpo.py:smoke")
  (tmp_path / "config.json").write_text(config.to_json())
  assert cli.main(["audit", f"--workdir={tmp_path}"]) == 0
  out = capsys.readouterr().out
  assert "data.eval = toy:64" in out
  assert f"audit {tmp_path}: 0:0" in out


def test_the_audit_starts_no_device():
  code = (
    "import jax; from dpo_jax import cli; "
    "code = cli.main(['audit', '--config=configs/dpo.py:smoke']); "
    "import jax._src.xla_bridge as b; "
    "assert code == 0 and not b._backends, b._backends"
  )
  made = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert made.returncode == 0, made.stderr
