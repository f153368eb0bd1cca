"""`dpo-jax judge`: from sample files to rates, with what needs no network."""

import json
import math
import subprocess
import sys

import pytest

from dpo_jax import cli, preflight
from dpo_jax.config import load
from dpo_jax.eval import rewards
from dpo_jax.eval.judge import judges, judging, matched, verdicts
from tests import conftest, folders
from tests.eval import judge_stub

PROMPTS = [f"p{n}" for n in range(5)]


@pytest.fixture
def scored(monkeypatch):
  """A scorer by the number of x in a text."""
  monkeypatch.setitem(rewards.SCORERS, "xs", _xs)


def _xs(prompts, completions):
  return [text.count("x") for text in completions]


def config(folder, ours, theirs, **fields):
  values = {"by": "xs", "cache": None, **fields}
  return judge_stub.config(folder, ours, theirs, **values)


def run(folder, ours, theirs, out="out", **fields):
  c = config(folder, ours, theirs, **fields)
  return judging.judge(load.plain(c.judge), c.to_dict(), folder / out)


def of(*counts):
  """{prompt: that many x}."""
  texts = dict(zip(PROMPTS, counts, strict=False))
  return {p: f"{p} {'x' * count}" for p, count in texts.items()}


def test_the_higher_score_wins_and_equal_scores_tie(tmp_path, scored, capsys):
  ours = {**of(3, 3, 1, 0), "p3": "same"}
  theirs = {**of(1, 4, 1, 0), "p2": "p2 yx", "p3": "same"}
  result = run(tmp_path, ours, theirs)
  (found,) = result["results"]
  assert found["why"] == {"decided": 2, "equal": 1, "identical": 1}
  assert (found["wins"], found["ties"], found["losses"]) == (1, 2, 1)
  assert found["win_rate"] == 0.5
  assert found["flip_rate"] is None  # nobody was asked in two orders
  rows = (tmp_path / "out/judgements.jsonl").read_text().splitlines()
  row = json.loads(rows[0])
  assert row == {
    "samples": str(tmp_path / "ours.jsonl"), "prompt": "p0", "ours": "p0 xxx",
    "theirs": "p0 x", "verdict": 1.0, "why": "decided", "scores": [3.0, 1.0],
  }  # fmt: skip
  out = capsys.readouterr().out
  assert "by xs, over 4 prompts (a tie counts ½; intervals of 95 %, seed 0" in (
    out
  )
  assert json.loads((tmp_path / "out/judge.json").read_text())["config"]


def test_each_text_is_scored_once(tmp_path, monkeypatch):
  calls = []

  def count(prompts, completions):
    calls.append(len(completions))
    return [float(len(c)) for c in completions]

  monkeypatch.setitem(rewards.SCORERS, "xs", count)
  other = judge_stub.samples(tmp_path / "other.jsonl", of(9, 1, 3))
  ours = str(tmp_path / "ours.jsonl")
  run(tmp_path, of(3, 4, 5), of(1, 2, 3), samples=(ours, other))
  assert calls == [3 + 3 + 2]  # one text of `other` is theirs


def test_a_run_trained_here_judges(tmp_path):
  """An implicit reward, whose score depends on the prompt too."""
  folders.untrained(load.load_config("dpo:smoke"), tmp_path / "run")
  spec = f"implicit:{tmp_path / 'run'}"
  ours, theirs = of(1, 2, 3, 0), of(2, 1, 0, 3)
  (found,) = run(tmp_path, ours, theirs, by=spec)["results"]
  score = rewards.load(spec).score
  pairs = zip(*(score(list(x), list(x.values())) for x in (ours, theirs)),
              strict=True)  # fmt: skip
  assert found["wins"] == sum(a > b for a, b in pairs)
  assert found["judged"] == 4


def test_a_judge_of_ones_own_is_a_line(tmp_path, monkeypatch):
  def mine(argument, pairs, options):
    assert argument == "first"
    return [verdicts.Verdict(1.0, "decided", {})] * len(pairs), {}, ["done"]

  monkeypatch.setitem(judges.JUDGES, "mine", mine)
  result = run(tmp_path, of(1, 2), of(2, 1), by="mine:first")
  assert result["results"][0]["win_rate"] == 1.0


def test_the_answers_of_data_are_what_samples_are_held_against(
  tmp_path, scored
):
  """The chosen ones of comparisons, and the completions of examples."""
  pairs = [
    {"prompt": p, "chosen": t, "rejected": f"{t} xxxxx"}
    for p, t in of(1, 1, 9).items()
  ]
  data = judge_stub.write(tmp_path / "data.jsonl", pairs)
  got = run(tmp_path, of(3, 3, 3), {"": ""}, against=data)
  assert (got["results"][0]["wins"], got["results"][0]["losses"]) == (2, 1)
  (tmp_path / "data.csv").write_text("prompt,completion\np0,xxxx\np1,x\n")
  path = str(tmp_path / "data.csv")
  got = run(tmp_path, of(3, 3, 3), {"": ""}, out="csv", against=path)
  assert (got["prompts"], got["results"][0]["wins"]) == (2, 1)


def test_the_first_completion_of_a_prompt_counts(tmp_path):
  rows = [
    {"prompt": "p", "completion": text, "id": 0} for text in ("one", "two")
  ]
  path = judge_stub.write(tmp_path / "a.jsonl", rows)
  assert matched.read(path, "judge.samples").texts == {"p": "one"}


def test_prompts_are_those_that_all_files_have_in_the_order_of_the_first(
  tmp_path, scored, capsys
):
  ours = dict(reversed(of(1, 1, 1, 1, 1).items()))
  other = judge_stub.samples(tmp_path / "other.jsonl", of(2, 2, 2, 2))
  theirs = {p: t for p, t in of(3, 0, 0, 0, 0).items() if p != "p1"}
  paths = (str(tmp_path / "ours.jsonl"), other)
  c = config(tmp_path, ours, theirs, samples=paths)
  _, pairs, told = matched.pairs(load.plain(c.judge))
  assert [pair.prompt for pair in pairs] == ["p3", "p2", "p0"] * 2
  assert [pair.ours for pair in pairs][2::3] == ["p0 x", "p0 xx"]
  assert "2 of 5 prompts are not in all files" in told[0]
  assert len(told) == 3
  c = config(tmp_path, ours, theirs, samples=paths, count=1)
  _, pairs, _ = matched.pairs(load.plain(c.judge))
  assert [pair.prompt for pair in pairs] == ["p3", "p3"]


def sweep(folder, temperatures):
  """Sample files as `sample` and `eval` write them, ever worse."""
  paths = []
  for number, temperature in enumerate(temperatures):
    about = {"sample": {"temperature": temperature}}
    run = folder / f"T{temperature}"
    run.mkdir()
    if number % 2:
      path = run / "samples.jsonl"
      (run / "evaluation.json").write_text(json.dumps({"config": about}))
    else:
      path = run / "completions.jsonl"
      (run / "completions.json").write_text(json.dumps(about))
    counts = [int(n >= number) * 2 for n in range(5)]
    paths.append(judge_stub.samples(path, of(*counts)))
  return tuple(paths)


def test_a_sweep_of_temperatures_has_a_line_each_and_paired_differences(
  tmp_path, scored, capsys
):
  paths = sweep(tmp_path, (0.7, 0.0, 1.0))
  result = run(tmp_path, of(), of(1, 1, 1, 1, 1), samples=paths)
  found = {r["temperature"]: r["win_rate"] for r in result["results"]}
  assert found == {0.7: 1.0, 0.0: 0.8, 1.0: 0.6}
  lines = capsys.readouterr().out.splitlines()
  (start,) = (n for n, line in enumerate(lines) if line.startswith("samples "))
  # By temperature, whatever the order of the files.
  assert [line.split()[1] for line in lines[start + 1 : start + 4]] == [
    "0", "0.7", "1",
  ]  # fmt: skip
  differences = [d["difference"] for d in result["differences"]]
  assert differences == pytest.approx([-0.2, -0.4])
  assert all(d["prompts"] == 5 for d in result["differences"])
  assert "-0.200 [" in "\n".join(lines)
  assert "paired over 5 prompts" in "\n".join(lines)


def test_agreement_of_two_judges_is_told_with_kappa(
  tmp_path, scored, monkeypatch, capsys
):
  monkeypatch.setitem(
    rewards.SCORERS, "short", lambda _, texts: [-len(t) for t in texts]
  )
  ours, theirs = of(3, 0, 3, 3, 1), of(1, 2, 1, 1, 0)
  theirs["p0"] += " a much longer text"
  run(tmp_path, ours, theirs, out="short", by="short")
  other = str(tmp_path / "short/judgements.jsonl")
  result = run(tmp_path, ours, theirs, agree_with=(other,))
  (found,) = result["agreement"]
  # xs: win, loss, win, win, win; short: win, win, loss, loss, loss
  assert (found["pairs"], found["agree"]) == (5, 0.2)
  # p_e = 0.8 · 0.4 + 0.2 · 0.6 = 0.44
  assert found["kappa"] == pytest.approx((0.2 - 0.44) / 0.56)
  assert "agree on 0.200 of 5 pairs, Cohen's κ -0.429" in (
    capsys.readouterr().out
  )


def test_files_have_no_nan_and_the_same_judging_leaves_the_same(
  tmp_path, scored
):
  for _ in range(2):
    run(tmp_path, of(1), of(0), count=1)
    text = (tmp_path / "out/judge.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["results"][0]["bootstrap"] is None  # of one prompt
    before = text
  assert before == text
  assert math.isfinite(found["results"][0]["at_equal_length"])


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("", "judge.samples names no file"),
    ("samples=a.jsonl,a.jsonl", "names a file twice"),
    ("samples=a.jsonl", "judge.against is not set"),
    ("samples=a.jsonl against=b.jsonl", "judge.by is not set"),
    ("samples=a.jsonl against=b.jsonl by=openai:", "written openai:…"),
    ("samples=a.jsonl against=b.jsonl by=form", "written form:…"),
    ("samples=a.jsonl against=b.jsonl by=vadr", "did you mean 'vader'?"),
    ("samples=no.jsonl against=b.jsonl by=vader", "no.jsonl: cannot be read"),
    ("samples=a.jsonl against=no.jsonl by=vader", "no.jsonl: cannot be read"),
    ("samples=bad.jsonl against=b.jsonl by=vader", "bad.jsonl:2: not JSON"),
    ("samples=c.jsonl against=b.jsonl by=vader",
     "c.jsonl:1: field 'completion' is missing; did you mean 'completions'?"),
    ("samples=a.jsonl against=d.jsonl by=vader", "share no prompt"),
    ("samples=a.jsonl against=2*toy by=vader", "weights have no effect"),
    ("samples=a.jsonl against=talk.jsonl by=vader", "needs text, not messages"),
    ("samples=a.jsonl against=b.jsonl by=vader budget_tokens=5",
     "judge.budget_tokens = 5 has no effect with judge.by = 'vader'"),
    ("samples=a.jsonl against=b.jsonl by=vader cache=x", "judge.cache = 'x'"),
    ("samples=a.jsonl against=b.jsonl by=openai:m form_key=x",
     "judge.form_key = 'x' has no effect"),
    ("samples=a.jsonl against=b.jsonl by=openai:m price_in=1", "go together"),
    ("samples=a.jsonl against=b.jsonl by=openai:m budget=1", "is a cost"),
    ("samples=a.jsonl against=b.jsonl by=openai:m budget=0", "above 0"),
    ("samples=a.jsonl against=b.jsonl by=openai:m concurrency=0", "at least 1"),
    ("samples=a.jsonl against=b.jsonl by=openai:m retries=-1", "at least 0"),
    ("samples=a.jsonl against=b.jsonl by=openai:m base_url=a:80", "no addr"),
    ("samples=a.jsonl against=b.jsonl by=openai:m template=Which?", "0 times"),
    ("samples=a.jsonl against=b.jsonl by=openai:m verdict=", "judge.verdict"),
    ("sample=a.jsonl", "did you mean 'judge.samples'?"),
  ],
)  # fmt: skip
def test_a_wrong_setting_gets_one_line_and_writes_nothing(
  tmp_path, monkeypatch, capsys, words, message
):
  monkeypatch.chdir(tmp_path)
  for name in ("a", "b"):
    judge_stub.samples(tmp_path / f"{name}.jsonl", of(1, 2))
  judge_stub.samples(tmp_path / "d.jsonl", {"other": "text"})
  judge_stub.write(tmp_path / "c.jsonl", [{"prompt": "p", "completions": []}])
  (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "completion": ""}\n{"p')
  turns = [{"role": "user", "content": "p"}]
  talk = {"prompt": turns, "chosen": [{"role": "assistant", "content": "c"}]}
  rejected = [{"role": "assistant", "content": "d"}]
  judge_stub.write(tmp_path / "talk.jsonl", [{**talk, "rejected": rejected}])
  fields = [f"--config.judge.{word}" for word in words.split()]
  assert cli.main(["judge", *fields, "--workdir=out"]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert len(error.splitlines()) == 1
  assert not (tmp_path / "out").exists()


SECRET = "sk-Very-Secret-0123456789"


@pytest.mark.parametrize(
  "word",
  [
    f"key_from={SECRET}",
    f"base_url=https://me:{SECRET}@host/v1",
    f"base_url=https://host/v1?api-key={SECRET}",
  ],
)
def test_a_key_in_a_field_is_refused_and_not_repeated(tmp_path, capsys, word):
  words = ["samples=a.jsonl", "against=b.jsonl", "by=openai:m", word]
  fields = [f"--config.judge.{w}" for w in words]
  assert cli.main(["judge", *fields, f"--workdir={tmp_path / 'out'}"]) == 2
  out, err = capsys.readouterr()
  assert "not shown" in err
  assert SECRET not in out + err
  assert not list(tmp_path.iterdir())


def test_another_verb_takes_no_judge_and_it_no_other_config(tmp_path, capsys):
  for words in (["train", "--config=judge"], ["judge", "--config=dpo"]):
    assert cli.main([*words, f"--workdir={tmp_path}"]) == 2
  one, other = capsys.readouterr().err.splitlines()
  assert "is one of `dpo-jax judge`, not of train" in one
  assert "judge takes configs/judge.py" in other


def test_the_name_of_a_model_at_an_endpoint_is_none_of_the_hub():
  for by, names in (("openai:hf:a/model:b", []), ("model:a/b", ["a/b"])):
    c = load.load_config("judge", {"judge.by": by})
    assert preflight.on_hub(c) == names


def test_help_lists_the_fields_of_a_judge_and_no_others(capsys):
  assert cli.main(["judge", "--help"]) == 0
  out = capsys.readouterr().out
  assert "judge.concurrency=8               questions at once" in out
  assert "loss.beta" not in out
  assert cli.main(["judge", "--help", "--config=judge:prompt=dialogue"]) == 0
  assert "judge.verdict=More helpful" in capsys.readouterr().out


@pytest.mark.parametrize(
  "code",
  [
    "import dpo_jax",
    "from dpo_jax import cli; assert cli.main(['help']) == 0",
    "from dpo_jax import cli; assert cli.main(['judge', '--help']) == 0",
    "from dpo_jax.eval.judge import judging",
  ],
)
def test_what_judges_is_imported_when_it_judges(code):
  check = "import sys; assert not {'jax', 'openai'} & set(sys.modules)"
  done = [sys.executable, "-c", f"{code}; {check}"]
  subprocess.run(done, check=True, cwd=conftest.ROOT)


def test_without_its_client_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setenv(judge_stub.VARIABLE, "a-key-that-is-long")
  monkeypatch.setitem(sys.modules, "openai", None)
  with pytest.raises(ValueError, match=r"pip install 'dpo_jax\[judge\]'"):
    run(tmp_path, of(1), of(2), by="openai:stub")
