"""A chat template comes with a model: it may not go on for ever."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest

from dpo_jax.data.read import fields, records
from dpo_jax.data.tokens import chat, limit, tokenize
from tests import conftest, templates

USER = {"role": "user", "content": "How is the plot?"}
REPLY = {"role": "assistant", "content": "Warm."}
RECORD = records.Record((USER,), ((REPLY,),), (), "my.jsonl:3")
# What the sandbox of jinja2 lets through: its ranges end at 100,000.
ENDLESS = {
  "loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
  "{% endfor %}{% endfor %}",
  "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
  "{% endif %}{% endmacro %}{{ f(60) }}",
  "output": "{% for a in range(99999) %}{% for b in range(99999) %}"
  "{{ '' }}{% endfor %}{% endfor %}",
}


@pytest.fixture
def brief(monkeypatch):
  monkeypatch.setattr(chat, "_SECONDS", 0.2)


def spin(seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    pass


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_an_error_that_names_it(
  name, tmp_path, brief
):
  began = time.monotonic()
  with pytest.raises(limit.TooLong, match=r"chat template of .* is not done"):
    chat.render_record(
      RECORD, tokenize.load(str(templates.write(tmp_path, ENDLESS[name])))
    )
  assert time.monotonic() - began < 30


def test_it_is_no_bad_record_which_could_be_skipped(tmp_path, brief):
  """Or how fast the machine is would decide what a run is trained on."""
  assert not issubclass(limit.TooLong, fields.BadRecord)
  slow = "{% if messages | length > 1 %}" + ENDLESS["loops"] + "{% endif %}."
  tokenizer = templates.write(tmp_path, slow)
  with pytest.raises(limit.TooLong):
    chat.render_record(RECORD, tokenize.load(str(tokenizer)))


def test_one_thread_is_ended_and_the_others_go_on():
  def work(number):
    limit.within(
      *(0.3 if number == 1 else 60, f"number {number}"),
      lambda: spin(60 if number == 1 else 0.8),
    )
    return number

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    done = [pool.submit(work, number) for number in range(3)]
  assert (done[0].result(), done[2].result()) == (0, 2)
  with pytest.raises(limit.TooLong, match=r"^number 1$"):
    done[1].result()


def test_what_ends_in_time_hears_nothing_of_it_later():
  """Around the limit: it is told, or it is not, and nothing comes after."""
  for share in (0.5, 0.9, 1.0, 1.1):
    with contextlib.suppress(limit.TooLong):
      limit.within(0.1, "late", lambda share=share: spin(0.2 * share))
    spin(0.15)
  assert not limit._running


def test_an_error_inside_stays_what_it_is_and_no_thread_is_left():
  with pytest.raises(KeyError):
    limit.within(5, "late", lambda: {}["nothing"])
  end = time.monotonic() + 10
  while limit._watchers and time.monotonic() < end:
    time.sleep(0.02)
  assert not limit._watchers
  names = {thread.name for thread in threading.enumerate()}
  assert not any("_watch" in name for name in names)


def test_what_swallows_it_once_is_told_again(monkeypatch):
  """As a destructor does, or a callback of the collector of garbage."""
  monkeypatch.setattr(limit, "_AGAIN", 0.2)
  swallowed = []

  def work():
    try:
      spin(30)
    except limit._Stop:
      swallowed.append(1)
    spin(30)

  with pytest.raises(limit.TooLong, match="late"):
    limit.within(0.1, "late", work)
  assert swallowed == [1]


PROFILED = """
import contextlib, time
import jax
from dpo_jax.data.tokens import limit
with contextlib.suppress(limit.TooLong):
  limit.within(0.1, "late", lambda: [time.sleep(0.01) for _ in range(1000)])
with jax.profiler.trace("."):
  for _ in range(50):
    time.sleep(0.001)
"""


def test_a_process_in_which_one_was_ended_can_be_profiled(tmp_path):
  env = {**os.environ, "PYTHONPATH": str(conftest.ROOT)}
  subprocess.run(
    [sys.executable, "-c", PROFILED],
    cwd=tmp_path,
    env=env,
    check=True,
    timeout=60,
  )
  assert list(tmp_path.rglob("*.xplane.pb"))
