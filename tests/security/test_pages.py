"""What runs say in a report is text, wherever it comes from."""

import json

import pytest

from dpo_jax import report
from tests import test_report

MARK = "alert(71)"
SCRIPT = f"<script>{MARK}</script>"
BROKEN_OUT = f'"><img src=x onerror={MARK}>'


def put(path, change):
  """Changes the object of a JSON file."""
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("text", [SCRIPT, BROKEN_OUT])
def test_no_text_of_a_run_is_a_tag_on_the_page_or_in_markdown(text, tmp_path):
  """Titles, notes, names, configs, versions, rewards, prompts and samples."""
  test_report.build(tmp_path, betas=(0.1, 1.0), steps=5)

  def about(sweep):
    sweep["title"], sweep["notes"] = text, [text]
    sweep["points"][0]["name"] = text
    sweep["points"][1]["overrides"] = {text: text}

  put(tmp_path / "sweep.json", about)
  for name in ("b0.1", "b1.0", "reference"):
    path = tmp_path / name

    def evaluation(found, name=name):
      found["config"] = {"data": {"train": text, text: name}, "tokenizer": text}
      found["made_with"] = {"device": text, "commit": text}
      means = found.get("means", {})
      means[f"reward/{text}"] = next(iter(means.values()), 0.0)

    put(path / "evaluation.json", evaluation)
    rows = map(json.loads, (path / "samples.jsonl").read_text().splitlines())
    rows = [{**row, "prompt": text, "completion": text} for row in rows]
    test_report.lines(path / "samples.jsonl", rows)
  report.write(tmp_path)
  page = test_report.Page(tmp_path / "report.html")
  assert page.text.count(MARK) > 5  # it is there to be read
  assert "script" not in page.tags
  assert not [k for k, v in page.attrs if k.startswith("on") or v == "x"]
  markdown = (tmp_path / "report.md").read_text()
  assert MARK.partition("(")[0] in markdown
  assert "<script" not in markdown
  assert "<img" not in markdown
