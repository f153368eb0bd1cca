"""SmolLM2 on the quickstart's task: stages that fit one another."""

import pytest

from dpo_jax import preflight
from dpo_jax.config import load
from tests import conftest

SPEC = "configs/smollm2.py"
METHODS = ("dpo", "ppo")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)


def stage(name, form=""):
  return load.load_config(f"{SPEC}:stage={name}{form}")


def names(form=""):
  return [name for _, name, *_ in load.load_config(f"{SPEC}:{form}").stages]


@pytest.mark.parametrize("form", ["", ",full", ",smoke"])
def test_every_stage_may_start(form):
  for name in names(form.lstrip(",")):
    preflight.config(stage(name, form), ())


def test_every_stage_reads_what_one_before_it_wrote():
  written = set()
  for name in names():
    c = stage(name)
    read = [c.data.train, c.data.eval, c.sample.rank_by]
    read += [c.rollout.scorer] if c.rollout is not None else []
    for spec in filter(None, read):
      path = str(spec).removeprefix("reward:").removesuffix("/pairs.jsonl")
      assert not path.startswith("runs/") or path in written, (name, spec)
    written.add(c.workdir)


def test_all_are_adapters_on_one_model_and_measured_alike():
  c = {name: stage(name) for name in (*METHODS, "reward")}
  assert all(
    x.lora.rank == 16 and x.init_from == c["dpo"].init_from for x in c.values()
  )
  assert c["dpo"].sample.to_dict() == c["ppo"].sample.to_dict()
  assert c["dpo"].sample.scorers[0] == "sentiment:reviews:train"  # in (0, 1)
  # What ranks the best of N, and what PPO climbs, is learned; r* tells.
  learned = stage("best_of").sample.rank_by
  assert learned == c["ppo"].rollout.scorer == f"reward:{c['reward'].workdir}"


def test_the_exported_policy_is_a_point_of_the_sweep():
  axis = next(
    step[2] for step in load.load_config(SPEC).stages if step[1] == "dpo"
  )
  field, values = axis.split("=")
  assert field == "loss.beta"
  first = values.split(",")[0]
  assert stage("export").workdir == f"runs/smollm2/dpo/beta={first}"
  assert stage("export").loss.beta == float(first)


def test_the_full_form_is_larger_in_all_that_takes_time():
  for name in names():
    small, full = stage(name), stage(name, ",full")
    assert full.data.max_completion_length == 3 * 16
    assert full.sample.max_new_tokens > small.sample.max_new_tokens
    assert full.sample.count > small.sample.count
