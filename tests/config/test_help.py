"""The page of a config's fields."""

from dpo_jax.config import help, load, saved
from tests import conftest

BASE = (conftest.ROOT / "configs/base.py").read_text()
JUDGE = (conftest.ROOT / "configs/judge.py").read_text()

SOURCE = """
def get_config():
  c = ConfigDict()
  c.algo = "dpo"  # a name
  # Of the data,
  # all of it.
  c.data = d = ConfigDict()
  d.seed = 0  # of the order
  # Long before
  d.rows = 3  # and behind
  c.log.every = 10  # steps
  other = 1  # no field
  return c
"""


def test_a_comment_stands_above_a_field_or_behind_it():
  assert help.comments(SOURCE) == {
    "algo": "a name",
    "data": "Of the data, all of it.",
    "data.seed": "of the order",
    "data.rows": "Long before and behind",
    "log.every": "steps",
  }


def test_every_field_of_the_base_is_on_the_page_with_its_value():
  config = load.load_config("configs/base.py")
  lines = help.page(config, help.comments(BASE)).splitlines()
  for path, value in saved.flatten(config.to_dict()).items():
    assert any(line.startswith(f"{path}={value}") for line in lines), path


def test_every_field_that_the_base_writes_has_a_comment():
  notes = help.comments(BASE)
  config = load.load_config("configs/base.py")
  for path in saved.flatten(config.to_dict()):
    own = path.partition(".")[0] not in ("loss", "optim", "model")
    assert not own or notes[path], path
  notes = help.comments(JUDGE)
  config = load.load_config("configs/judge.py")
  assert all(notes[path] for path in saved.flatten(config.to_dict()))


def test_a_value_of_several_lines_stands_on_one():
  page = help.page(load.load_config("configs/judge.py"), help.comments(JUDGE))
  (line,) = (x for x in page.splitlines() if x.startswith("judge.template="))
  assert line.endswith(r"\n\n{prompt}\n\n{a}\n\n{b}'")


def test_a_page_keeps_to_the_width_of_a_terminal():
  config = load.load_config("configs/dpo.py")
  page = help.page(config, help.comments(BASE))
  assert max(map(len, page.splitlines())) <= 80


def test_fields_of_a_section_stand_together():
  config = load.load_config("configs/base.py")
  notes = help.comments(BASE) | help.entries('  "warmup": 1,  # rise', "optim")
  lines = help.page(config, notes).splitlines()
  (rise,) = (line for line in lines if line.startswith("optim.warmup="))
  assert rise.endswith(" rise")
  # A field of no section does not read as one of the section above it.
  for name in ("workdir", "precision"):
    (place,) = (i for i, line in enumerate(lines) if line.startswith(name))
    assert lines[place - 1] == ""
  names = [n for n, x in enumerate(lines) if x.startswith("optim.")]
  assert names[-1] - names[0] == len(names) - 1
