"""Seconds of compiling, on a clock of our own and on JAX's."""

import time

import jax
import pytest

from dpo_jax.train import compiles


@pytest.fixture
def spans(monkeypatch):
  monkeypatch.setattr(compiles, "_spans", [])


def test_what_is_told_inside_of_another_counts_once(spans, monkeypatch):
  def told(end, duration, event="/jax/core/compile/x"):
    monkeypatch.setattr(compiles.time, "perf_counter", lambda: end)
    compiles.told(event, duration, fun_name="f")

  told(10.0, 1.0)
  told(12.0, 1.0)
  told(13.0, 2.5)  # 10.5 to 13, and the one before in it
  assert compiles.seconds() == 3.5
  told(13.5, 1.0)  # begins before the end of the last
  assert compiles.seconds() == 4.0
  told(99.0, 50.0, "/jax/compilation_cache/x")
  assert compiles.seconds() == 4.0


def test_a_compilation_is_seen_and_a_call_is_none():
  def slow_to_trace(x):
    time.sleep(0.2)
    return x + 1

  f = jax.jit(slow_to_trace)
  before = compiles.seconds()
  f(1.0)
  once = compiles.seconds()
  assert once - before >= 0.2
  f(2.0)
  assert compiles.seconds() == once
