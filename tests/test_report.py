"""The report of a sweep: numbers of the files, nothing lost, nothing loaded."""

import html.parser
import json
import math
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest
from matplotlib import text as text_lib

from dpo_jax import notebook, report
from dpo_jax.report import content, figures, folder, markdown, samples

BETAS = (5.0, 0.05, 0.1, 1.0)  # not in their order
TRUTH = "reward/tfidf"
SCRIPT = "<script>alert(1)</script>"
TEXTS = (
  " that I would watch again.\n\nThe cast is great & the score < the 🎬👍🏽",
  f" {SCRIPT} <img src=https://x.test/a.png> **bold** `code` | $x$",
  " " + "unbreakable" * 30,
)
PROMPTS = (
  "This movie is one of those",
  "I rented <this> one\nbecause",
  "When the film began, the audience",
)


def means_of(beta, rng):
  """Plausible means: less β is more reward and more KL."""
  kl = 0.0 if beta is None else 9 / (1 + 6 * beta)
  reward = -0.2 + 0.75 * math.log1p(kl)
  noisy = {
    TRUTH: (reward, 0.031),
    "reward/vader": (0.31 + 0.3 * reward, 0.024),
    "kl": (kl, 0.02 * kl + 1e-9),
    "log_ratio": (kl + rng.gauss(0, 0.05), 0.021 * kl + 1e-9),
    "length": (48.3 + rng.gauss(0, 1), 0.62),
  }
  return {k: {"mean": mean, "se": se} for k, (mean, se) in noisy.items()}


def evaluation_of(beta, rng):
  """The content of an evaluation.json."""
  kl = 0.0 if beta is None else 9 / (1 + 6 * beta)
  return {
    "step": 0 if beta is None else 200,
    "samples": 512,
    "means": means_of(beta, rng),
    "distinct_1": 0.213 - 0.004 * kl,
    "distinct_2": 0.701 - 0.011 * kl,
    "comparisons": {
      "loss": 0.69 - 0.02 * kl,
      "rewards/accuracies": 0.5 + 0.03 * kl,
      "rewards/margins": 0.1 * kl,
      "logps/chosen": -151.2 - 3 * kl,
      "logps/rejected": -148.7 - 9 * kl,
    },
    "count": 640,
  }


def samples_of(beta, rng):
  """The rows of a samples.jsonl, two draws a prompt."""
  kl = 0.0 if beta is None else 9 / (1 + 6 * beta)
  for number, prompt in enumerate(PROMPTS):
    for draw in range(2):
      yield {
        "id": number,
        "prompt": prompt,
        "completion": TEXTS[number] if draw == 0 else "second draw",
        "finished": number != 2,
        "length": 40 + number,
        "kl": kl,
        "log_ratio": kl,
        TRUTH: round(rng.gauss(0.2 * kl, 1), 6),
      }


def curves_of(beta, steps, rng):
  """The rows of a metrics.jsonl."""
  for step in range(1, steps + 1):
    gain = (1 - math.exp(-step / 60)) * 2 / (1 + beta)
    margin = beta * 10 * gain + rng.gauss(0, 0.15)
    values = {
      "loss": math.log1p(math.exp(-margin)),
      "rewards/margins": margin,
      "rewards/accuracies": min(1, 0.5 + 0.12 * gain + rng.gauss(0, 0.06)),
      "logps/chosen": -150 - 6 * gain + rng.gauss(0, 4),
      "logps/rejected": -148 - 17 * gain + rng.gauss(0, 4),
    }
    yield {"step": step, "kind": "train", **values}


def lines(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(workdir, betas=BETAS, steps=60, sampled=True):
  """A made-up sweep, as `dpo-jax sweep` leaves it."""
  rng = random.Random(0)
  about = {
    "title": "dpo over loss.beta",
    "points": [
      {"name": f"beta={b}", "overrides": {"loss.beta": b}, "folder": f"b{b}"}
      for b in betas
    ],
    "reference": "reference" if sampled else None,
    "notes": ["tfidf: AUC 0.838 on the 1,290 texts of <held-out>"],
  }
  workdir.mkdir(exist_ok=True)
  (workdir / "sweep.json").write_text(json.dumps(about))
  for beta in (*betas, None) if sampled else betas:
    path = workdir / ("reference" if beta is None else f"b{beta}")
    values = evaluation_of(beta, rng)
    if sampled:
      lines(path / "samples.jsonl", samples_of(beta, rng))
    else:
      values = {k: values[k] for k in ("step", "comparisons", "count")}
    lines(path / "evaluation.json", [values])
    if beta is not None:
      lines(path / "metrics.jsonl", curves_of(beta, steps, rng))
  return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A complete sweep's folder, with its report."""
  workdir = build(tmp_path_factory.mktemp("sweep"))
  report.write(workdir)
  return workdir


@pytest.fixture
def undrawn(monkeypatch):
  """Reports without figures, for what is said in words: 1.5 s less each."""
  nothing = {"frontier": None, "curves": None}
  monkeypatch.setattr(content, "draw", lambda sweep: nothing)


class Page(html.parser.HTMLParser):
  """Tags, attributes and visible text of a page."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.attrs, self.texts = [], [], []
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attrs += attrs

  def handle_data(self, data):
    if self.tags and self.tags[-1] != "style":
      self.texts.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.texts).split())


def saved(workdir, name, file):
  return json.loads((workdir / name / file).read_text())


def test_rows_hold_the_numbers_of_the_files_in_the_order_of_beta(whole):
  rows = report.rows(whole)
  assert [row["run"] for row in rows] == [
    "reference",
    *(f"beta={b}" for b in sorted(BETAS)),
  ]
  for row, name in zip(rows[1:], sorted(BETAS), strict=True):
    values = saved(whole, f"b{name}", "evaluation.json")
    for key in (TRUTH, "reward/vader", "kl", "log_ratio", "length"):
      assert row[key] == values["means"][key]
    for key in ("rewards/accuracies", "logps/chosen", "logps/rejected"):
      assert row[key] == values["comparisons"][key]
    assert row["distinct_1"] == values["distinct_1"]
    assert row["distinct_2"] == values["distinct_2"]


@pytest.mark.parametrize("style", ["text", "markdown"])
def test_a_line_of_the_table_is_the_files_numbers_in_the_heads_order(
  whole, style
):
  values = saved(whole, "b0.1", "evaluation.json")
  start = saved(whole, "reference", "evaluation.json")["comparisons"]
  means, pairs = values["means"], values["comparisons"]
  expected = [*means[TRUTH].values()]
  for key in ("reward/vader", "kl", "log_ratio"):
    expected += [means[key]["mean"], means[key]["se"]]
  expected += [pairs["loss"], pairs["rewards/accuracies"]]
  sides = ("logps/chosen", "logps/rejected")
  if style == "text":
    expected += [pairs[key] for key in sides]
  else:
    expected += [0.631, 0.704]  # scipy's Wilson interval of 428 in 640
    expected += [pairs[key] - start[key] for key in sides]
  expected += [2 / 3, means["length"]["mean"], means["length"]["se"]]
  expected += [values["distinct_1"], values["distinct_2"]]
  table = report.table(report.rows(whole), style)
  (line,) = (line for line in table.splitlines() if "beta=0.1" in line)
  line = re.sub(r"beta=0\.1|[|±() ]+", " ", line).replace("–", " ")
  found = line.split()
  if style != "text":
    del found[2:4]  # at equal length, tested with measures
  assert len(found) == len(expected)
  for text, value in zip(found, expected, strict=True):
    decimals = len(text.partition(".")[2])
    assert text == f"{value:.{decimals}f}"


def test_errors_get_one_digit_and_a_rounded_zero_no_sign():
  rows = [
    {"run": "a", "reward/x": {"mean": -0.0004, "se": 0.02}},
    {"run": "b", "reward/x": {"mean": 1.239, "se": 0.21}},
    {"run": "c", "reward/x": {"mean": 1.5, "se": None}},
  ]
  rows = [dict.fromkeys(key for key, *_ in report.COLUMNS) | r for r in rows]
  _, body = report.grid(rows, "text")
  assert [line[1] for line in body] == [
    ("0.00", "0.02"),
    ("1.24", "0.21"),
    ("1.50",),
  ]


def test_an_error_of_rounding_alone_asks_for_no_digits(whole):
  _, body = report.grid(report.rows(whole), "text")
  kl = [line[3] for line in body]
  assert kl[0] == ("0.00", "0.00")  # the reference's 1e-9
  assert kl[1][1] == "0.14"


def test_columns_of_the_console_table_align_in_120_columns(whole):
  rows = report.rows(whole)
  rows[2] |= {"kl": None, "length": None, "logps/chosen": None}
  lines = report.table(rows, "text").splitlines()
  assert len({len(line) for line in lines}) == 1
  assert len(lines[0]) <= 120
  for head in ("r* tfidf", "vader", "acc", "chosen", "dist-1", "dist-2"):
    end = lines[0].index(head) + len(head)
    assert all(line[end - 1] != " " for line in lines), head
    assert all(line[end : end + 1] in (" ", "") for line in lines), head
  assert len({line.index("±") for line in lines[1:]}) == 1
  assert lines[3].count("–") == 3


def test_an_unknown_style_is_refused(whole):
  with pytest.raises(ValueError, match=r"style = 'txt'.*text"):
    report.table(report.rows(whole), "txt")


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("- no list", r"\- no list"),
    ("12. no list", r"12\. no list"),
    ("-0.25 and 0.5", "-0.25 and 0.5"),
    ("a_b*c* #7 @me", r"a\_b\*c\* \#7 \@me"),
    ("two\n\n lines ", "two<br>lines"),
    ("1 < 2 & www.x.test", "1 &lt; 2 &amp; www&#46;x.test"),
  ],
)
def test_markdown_shows_a_text_as_it_is(text, shown):
  assert markdown.plain(text) == shown


def test_the_page_shows_the_same_table(whole):
  text = Page(whole / "report.html").text
  _, body = report.grid(report.rows(whole), "page")
  for _, *cells in body:
    for cell in cells:
      assert content.cell(cell).replace("-", "−") in text


def test_the_page_loads_nothing_and_runs_nothing(whole):
  page = Page(whole / "report.html")
  forbidden = {"script", "link", "img", "iframe", "object", "image", "base"}
  assert not forbidden & set(page.tags)
  for name, value in page.attrs:
    assert not name.startswith("on"), name
    if name in ("href", "xlink:href", "src", "srcset"):
      assert value.startswith("#"), value
  text = (whole / "report.html").read_text()
  assert "@import" not in text
  assert all(u.startswith("url(#") for u in re.findall(r"url\([^)]*", text))
  assert re.findall(r"https?://", text) == ["https://"] * 5  # of the sample


def test_ids_in_the_page_are_unique_and_every_reference_has_one(whole):
  text = (whole / "report.html").read_text()
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(ids) == len(set(ids)) > 50
  used = re.findall(r'(?:url\(|href=")#([^")]*)', text)
  assert used
  assert set(used) <= set(ids)


def test_samples_are_shown_as_text_whatever_they_hold(whole):
  text = (whole / "report.html").read_text()
  assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5
  assert SCRIPT not in text
  shown = Page(whole / "report.html").text
  for sample in (*TEXTS, *PROMPTS):
    assert " ".join(sample.split()) in shown
  assert "second draw" not in shown
  words = (whole / "report.md").read_text()
  assert SCRIPT not in words
  assert "https://" not in words
  assert r"\*\*bold\*\* \`code\` \| \$x\$" in words


@pytest.mark.usefixtures("undrawn")
def test_control_characters_and_half_surrogates_do_not_reach_the_page(
  tmp_path,
):
  build(tmp_path, betas=(0.1,))
  row = {"id": 0, "prompt": "p", "completion": "a\0b\x1bc\ud83dd\u2028e\r\nf"}
  for name in ("b0.1", "reference"):
    lines(tmp_path / name / "samples.jsonl", [row])
  text = report.write(tmp_path).read_bytes().decode()
  assert "a\ufffdb\ufffdc\ufffdd\u2028e\nf" in text
  assert "\0" not in text


def test_scores_stand_under_their_samples(whole):
  text = Page(whole / "report.html").text
  first = json.loads(
    (whole / "b0.1" / "samples.jsonl").read_text().splitlines()[0]
  )
  reward = f"{first[TRUTH]:.2f}".replace("-", "−")
  assert f"r* {reward} · {first['length']} tokens" in text
  assert "42 tokens · cut off" in text


def test_samples_are_of_the_first_three_prompts_that_all_runs_have(tmp_path):
  build(tmp_path, betas=(0.1,))

  def rows(ids):
    return [{"id": i, "prompt": f"p{i}", "completion": "c"} for i in ids]

  lines(tmp_path / "reference" / "samples.jsonl", rows((9, 1, 2, 3, 4, 5)))
  lines(tmp_path / "b0.1" / "samples.jsonl", rows((5, 4, 3, 1, 7)))
  shown = samples.prompts(folder.read(tmp_path))
  assert [prompt for prompt, _ in shown] == ["p1", "p3", "p4"]
  assert [run.name for run, _ in shown[0][1]] == ["reference", "beta=0.1"]


def test_markdown_names_pictures_that_exist(whole):
  text = (whole / "report.md").read_text()
  names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
  assert names == ["frontier.png", "curves.png"]
  for name in names:
    assert (whole / name).read_bytes().startswith(b"\x89PNG")
  assert report.table(report.rows(whole), "markdown") in text


@pytest.mark.parametrize("content", ["{}", '{"title": "x", "points": 3}'])
def test_a_sweep_that_names_no_points_is_damaged(content, tmp_path):
  (tmp_path / "sweep.json").write_text(content)
  with pytest.raises(ValueError, match=r"sweep\.json is damaged: .*no points"):
    report.write(tmp_path)
  with pytest.raises(ValueError, match="is the folder of a sweep"):
    notebook.load_run(tmp_path)


def test_a_folder_without_a_sweep_says_which_command_makes_one(tmp_path):
  with pytest.raises(ValueError, match=r"dpo-jax sweep --config .* --workdir"):
    report.write(tmp_path)
  build(tmp_path)
  for path in tmp_path.glob("*/*"):
    path.unlink()
  with pytest.raises(ValueError, match=r"nothing of its runs.*dpo-jax sweep"):
    report.rows(tmp_path)


@pytest.mark.parametrize(
  "gone", ["evaluation.json", "samples.jsonl", "metrics.jsonl"]
)
def test_what_a_run_lacks_is_said_and_the_rest_is_shown(
  tmp_path, gone, monkeypatch
):
  build(tmp_path)
  (tmp_path / "b0.1" / gone).unlink()
  marks = [m.name for m in drawn(tmp_path)["frontier"]]
  nothing = {"frontier": None, "curves": None}
  monkeypatch.setattr(content, "draw", lambda sweep: nothing)
  text = Page(report.write(tmp_path)).text
  assert f"beta=0.1: no {gone}" in text
  assert text.count(": no ") == 1
  assert f"beta=0.1: no {gone}" in (tmp_path / "report.md").read_text()
  (row,) = (r for r in report.rows(tmp_path) if r["run"] == "beta=0.1")
  of_samples = ("run", "seeds", "reward_at_length", "ended")
  values = [value for key, value in row.items() if key not in of_samples]
  missing = gone == "evaluation.json"
  assert all((value is None) == missing for value in values)
  assert ("beta=0.1" in marks) != missing


@pytest.mark.parametrize(
  ("gone", "said"),
  [
    ("evaluation.json", content.NOTHING["frontier"]),
    ("samples.jsonl", content.NOTHING["samples"]),
    ("metrics.jsonl", content.NOTHING["curves"]),
  ],
)
def test_a_section_without_data_says_so(tmp_path, gone, said):
  """Nor does a picture stay that was drawn when there were some."""
  build(tmp_path, betas=(0.1,), steps=5)
  for path in tmp_path.glob(f"*/{gone}"):
    path.unlink()
  for name in ("frontier.png", "curves.png"):
    (tmp_path / name).write_bytes(b"of before")
  assert said in Page(report.write(tmp_path)).text
  text = (tmp_path / "report.md").read_text()
  assert said in text
  pictures = {path.name for path in tmp_path.glob("*.png")}
  assert pictures == set(re.findall(r"\((\w+\.png)\)", text))
  for name in pictures:
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_without_sampling_lacks_no_samples(tmp_path):
  build(tmp_path, sampled=False)
  text = Page(report.write(tmp_path)).text
  assert "the sweep names no prompts (sample.prompts)" in text
  assert ": no " not in text
  assert "640 held-out pairs" in text
  # Nor is anything said of columns that are not there.
  caption = content.captions(folder.read(tmp_path))["table"]
  assert caption.startswith("Of the held-out comparisons")
  assert not any(word in caption for word in ("±", "log-ratio", "share ended"))
  table = report.table(report.rows(tmp_path), "text")
  assert re.search(r"^beta=0\.05 +– +– +0\.\d+ +0\.\d+ +-\d", table, re.M)


def test_a_run_that_ended_in_nothing_finite_is_named(tmp_path):
  build(tmp_path, betas=(0.1, 1.0), steps=5)
  rows = [
    {"step": s, "kind": "train", "skipped": n} for s, n in ((1, 0), (4, 3))
  ]
  lines(tmp_path / "b1.0/metrics.jsonl", rows)
  (said,) = content.missing(folder.read(tmp_path))[:1]
  assert said == "beta=1.0: its last 3 updates were not finite"
  last = {**rows[-1], "skipped": 0, "skipped/total": 5, "skipped/longest": 3}
  lines(tmp_path / "b1.0/metrics.jsonl", [rows[0], last])
  (said,) = content.missing(folder.read(tmp_path))[:1]  # nothing lacks
  assert said == (
    "beta=1.0: updates refused for not being finite: 5, at most 3 in a row"
  )


def test_of_what_was_not_compared_no_pairs_and_no_accuracy_are_told(tmp_path):
  build(tmp_path, betas=(0.1,), sampled=False)
  path = tmp_path / "b0.1/evaluation.json"
  means = {"loss": 4.8, "logps/chosen": -91.0}
  lines(path, [{"comparisons": means, "count": 0, "examples": 64}])
  sweep = folder.read(tmp_path)
  assert content.facts(sweep) == "1 run · 64 held-out examples"
  said = "Of the held-out examples: the loss; and the mean of log p, in nats."
  assert content.captions(sweep)["table"] == said


@pytest.mark.parametrize(
  ("algos", "said"),
  [
    (("preference", "preference"), "the higher implicit reward (in"),
    (("reward", "reward"), "the higher reward of the reward model (in"),
    (("reward", "preference"), "the higher reward, of a reward model or impl"),
  ],
)
def test_an_accuracy_says_whose_reward_it_is_by(algos, said, tmp_path):
  build(tmp_path, betas=(0.1, 1.0), sampled=False)
  for beta, algo in zip((0.1, 1.0), algos, strict=True):
    path = tmp_path / f"b{beta}/evaluation.json"
    row = json.loads(path.read_text())
    lines(path, [{**row, "config": {"algo": algo}}])
  captions = content.captions(folder.read(tmp_path))
  assert f"whose chosen completion has {said}" in captions["table"]


def test_curves_of_a_history_have_gaps_for_what_is_no_number():
  rows = [
    {"step": 1, "kind": "train", "loss": "cut"},
    {"step": None, "kind": "eval", "loss": 0.5},
    {"step": 2, "kind": "train", "loss": 0.25},
  ]
  steps, values = folder.curves(rows)["loss"]
  assert steps == [1, 2]
  assert math.isnan(values[0])
  assert values[1] == 0.25


@pytest.mark.parametrize("source", [None, "my.jsonl"])
def test_an_evaluation_that_nobody_asked_for_is_not_missing(tmp_path, source):
  build(tmp_path, betas=(0.1,), sampled=False)
  (tmp_path / "b0.1/evaluation.json").unlink()
  config = {"data": {"eval": source}, "sample": {"prompts": None}}
  lines(tmp_path / "b0.1/config.json", [config])
  said = " ".join(content.missing(folder.read(tmp_path)))
  assert ("no evaluation.json" in said) == (source is not None)
  assert ("goes on where it stopped" in said) == (source is not None)


def test_values_that_are_not_numbers_are_dashes_and_no_marks(tmp_path):
  build(tmp_path)
  path = tmp_path / "b1.0" / "evaluation.json"
  values = json.loads(path.read_text())
  values["means"]["kl"] = {"mean": math.nan, "se": math.nan}
  values["means"][TRUTH]["se"] = None
  values["comparisons"]["logps/chosen"] = None
  path.write_text(json.dumps(values))
  report.write(tmp_path)
  row = report.rows(tmp_path)[3]
  assert row["run"] == "beta=1.0"
  assert row["kl"] is None
  assert row["logps/chosen"] is None
  assert row[TRUTH]["se"] is None
  assert len(drawn(tmp_path)["frontier"]) == 4
  for name in ("report.html", "report.md"):
    assert not re.search(r"\bnan\b", (tmp_path / name).read_text())


def test_null_and_cut_off_metrics_leave_gaps(tmp_path):
  build(tmp_path, betas=(0.1,))
  path = tmp_path / "b0.1" / "metrics.jsonl"
  rows = [
    {"step": s, "kind": "train", "loss": None if s == 3 else float(s)}
    for s in range(1, 7)
  ]
  rows.append({"step": 6, "kind": "eval", "loss": 99.0})
  path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 7,')
  steps, values = folder.read(tmp_path).runs[0].metrics["loss"]
  assert steps == [1, 2, 3, 4, 5, 6]
  assert math.isnan(values[2])
  assert [v for v in values if v == v] == [1.0, 2.0, 4.0, 5.0, 6.0]
  (thin, _, thick) = drawn(tmp_path)["curves"].axes[0].lines
  for line in (thin, thick):
    gaps = [math.isnan(y) for y in line.get_ydata()]
    assert gaps == [False, False, True, False, False, False]


@pytest.mark.parametrize(
  "damage", ["[1]", "7", "null", '{"kind": "train"}', "\x00"]
)
def test_damaged_metrics_leave_the_rest(tmp_path, damage):
  build(tmp_path, betas=(0.1,))
  path = tmp_path / "b0.1" / "metrics.jsonl"
  rows = [{"step": s, "kind": "train", "loss": float(s)} for s in (1, 2)]
  first, second = map(json.dumps, rows)
  path.write_text("\n".join([first, damage, second, ""]))
  (run,) = folder.read(tmp_path).runs
  assert run.metrics["loss"] == ([1, 2], [1.0, 2.0])


def drawn(workdir):
  """The marks and the curves of a sweep, caught on their way to the page.

  Nothing is rendered, which takes the time.
  """
  caught = {}

  def frontier(marks, reference, *args, **options):
    caught["frontier"] = [*marks, reference]
    caught["joined"] = options["joined"]

  def curves(*args, **options):
    caught["curves"] = original[1](*args, **options)

  original = figures.frontier, figures.curves
  figures.frontier, figures.curves = frontier, curves
  try:
    content.draw(folder.read(workdir))
  finally:
    figures.frontier, figures.curves = original
  return caught


def test_marks_stand_at_kl_and_reward_in_the_order_of_beta(whole):
  caught = drawn(whole)
  *marks, reference = caught["frontier"]
  for mark, beta in zip(marks, sorted(BETAS), strict=True):
    means = saved(whole, f"b{beta}", "evaluation.json")["means"]
    assert (mark.kl, mark.kl_se) == tuple(means["kl"].values())
    assert (mark.reward, mark.reward_se) == tuple(means[TRUTH].values())
  assert reference.kl == 0
  assert math.isnan(reference.kl_se)
  assert caught["joined"]


def test_an_argument_of_the_config_may_be_the_swept_number(tmp_path):
  build(tmp_path)
  path = tmp_path / "sweep.json"
  about = json.loads(path.read_text())
  for point, beta in zip(about["points"], BETAS, strict=True):
    point["overrides"] = {"arg": f"beta={beta}"}
  path.write_text(json.dumps(about))
  sweep = folder.read(tmp_path)
  assert sweep.axis == "beta"
  assert [run.name for run in sweep.runs] == [
    f"beta={b}" for b in sorted(BETAS)
  ]
  assert drawn(tmp_path)["joined"]


def test_points_of_two_fields_or_of_words_are_not_joined(tmp_path):
  build(tmp_path)
  path = tmp_path / "sweep.json"
  about = json.loads(path.read_text())
  for overrides in (
    {"loss.beta": 1.0, "seed": 1},
    {"loss.beta": "high"},
    {"arg": "loss=ipo"},
  ):
    about["points"][0]["overrides"] = overrides
    path.write_text(json.dumps(about))
    assert not drawn(tmp_path)["joined"]
    # Nor sorted: the order of the file stays.
    names = [run.name for run in folder.read(tmp_path).runs]
    assert names == [f"beta={b}" for b in BETAS]


def test_smoothing_is_a_centred_mean_that_skips_gaps():
  values = [float(i % 7) for i in range(100)]
  values[40] = math.nan
  smoothed = figures.smooth(values)
  assert smoothed[20] == pytest.approx(sum(values[18:23]) / 5, rel=1e-12)
  assert smoothed[0] == pytest.approx(sum(values[:3]) / 3, rel=1e-12)
  assert smoothed[41] == pytest.approx(
    (values[39] + sum(values[41:44])) / 4, rel=1e-12
  )
  assert math.isnan(smoothed[40])


def test_axes_show_no_share_above_one_no_half_step_and_no_rounding():
  metrics = {
    "loss": ([1], [0.6931473]),
    "rewards/accuracies": ([1], [1.0]),
    "drift/chosen": ([1], [-1e-6]),
    "drift/rejected": ([1], [5e-7]),
  }
  fig = figures.curves([figures.Line("a", "#000000", metrics)], wide=True)
  fig.draw_without_rendering()
  loss, accuracy, drift = fig.axes
  assert accuracy.get_ylim()[1] < 1.02
  assert all(tick == int(tick) for tick in loss.get_xticks())
  assert drift.get_ylim()[1] - drift.get_ylim()[0] > 0.9
  assert not drift.yaxis.get_offset_text().get_text()


def test_names_of_marks_cover_no_mark_and_no_other_name():
  marks = [
    figures.Mark(f"beta={b}", kl, reward, 0.05, 0.02, "#101010")
    for b, kl, reward in (
      (0.05, 9.0, 1.4),
      (0.5, 1.1, 0.5),
      (1, 0.9, 0.45),
      (2, 0.5, 0.4),
      (5, 0.1, 0.3),
    )
  ]
  start = figures.Mark("reference", 0.0, 0.28, math.nan, 0.02, "#202020")
  for wide in (True, False):
    fig = figures.frontier(marks, start, "reward", joined=True, wide=wide)
    (ax,) = fig.axes
    fig.draw_without_rendering()
    names = [t for t in ax.texts if t.get_text()]
    assert len(names) == 6
    boxes = [
      text_lib.Text.get_window_extent(name, fig.canvas.get_renderer())
      for name in names
    ]
    spots = ax.transData.transform([(m.kl, m.reward) for m in (*marks, start)])
    for i, box in enumerate(boxes):
      assert not any(box.overlaps(other) for other in boxes[:i])
      assert not any(box.contains(*spot) for spot in spots)
      assert box.x0 >= 0
      assert box.x1 <= fig.bbox.x1


def test_colours_are_ordered_and_keep_clear_of_their_background():
  def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
      c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
    ]
    return sum(
      w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )

  for count in (1, 4, 9):
    for shades in zip(*figures.palette(count), strict=True):
      levels = [luminance(shade) for shade in shades]
      assert levels == sorted(set(levels))
    light, dark = zip(*figures.palette(count), strict=True)
    # Contrast to #fefefe and to #14171b, as of WCAG.
    assert 1.05 / (luminance(light[-1]) + 0.05) > 2.2
    assert (luminance(dark[0]) + 0.05) / 0.058 > 2.2


def test_a_second_write_overwrites(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "again")
  page = workdir / "report.html"
  before = page.read_text()
  page.write_text("another")
  assert report.write(workdir) == page
  assert page.read_text() == before


@pytest.mark.usefixtures("undrawn")
def test_another_title_takes_the_place_of_the_one_before(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "again")
  about = json.loads((workdir / "sweep.json").read_text())
  (workdir / "sweep.json").write_text(
    json.dumps(about | {"title": "another & <title>"})
  )
  page = report.write(workdir)
  assert page == pathlib.Path(workdir, "report.html")
  assert "another &amp; &lt;title&gt;" in page.read_text()
  assert "dpo over loss.beta" not in page.read_text()
  assert (workdir / "report.md").read_text().startswith("# another &amp; ")


@pytest.mark.parametrize(
  ("text", "said"), [("{", "is not JSON"), ("[]", "is damaged")]
)
def test_a_file_that_is_not_json_is_named(text, said, tmp_path):
  build(tmp_path)
  (tmp_path / "b1.0" / "evaluation.json").write_text(text)
  with pytest.raises(ValueError, match=rf"b1\.0/evaluation\.json {said}"):
    report.write(tmp_path)


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
  build(tmp_path, betas=(0.1, 0.2))
  path = tmp_path / "sweep.json"
  about = json.loads(path.read_text())
  for point in about["points"]:
    point["name"] = "cost=$\\frac$"
  about["points"][1]["name"] += "2"
  path.write_text(json.dumps(about))
  assert "cost=$\\frac$2" in Page(report.write(tmp_path)).text


def test_importing_the_report_imports_neither_jax_nor_pyplot():
  code = "import sys; from dpo_jax import report; print(*sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  modules = done.stdout.split()
  assert "matplotlib.figure" in modules
  assert not {"jax", "matplotlib.pyplot"} & set(modules)
