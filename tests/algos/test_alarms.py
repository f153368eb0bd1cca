"""What a run says of itself when its policy goes astray."""

import pytest

from dpo_jax import loop
from dpo_jax.algos import alarms
from tests.algos import rewarded

FIRST = {
  "objective/kl": 0.0,
  "objective/length": 20.0,
  "objective/ended": 0.6,
  "policy/entropy": 4.8,
}


@pytest.mark.parametrize(
  ("name", "well", "astray"),
  [
    ("objective/kl", 49.0, 51.0),
    ("objective/length", 39.0, 41.0),
    ("objective/length", 11.0, 9.0),
    ("objective/ended", 0.31, 0.29),
    ("policy/entropy", 1.7, 1.5),
  ],
)
def test_an_alarm_of_ppo_is_of_what_went_astray_alone(name, well, astray):
  assert alarms.of_rollouts(FIRST, {**FIRST, name: well}) == {}
  (raised,) = alarms.of_rollouts(FIRST, {**FIRST, name: astray})
  assert raised == name


def test_the_kl_of_ppo_is_measured_by_its_target():
  now = {**FIRST, "objective/kl": 10.0}
  assert alarms.of_rollouts(FIRST, now, target=6.0) == {}
  assert set(alarms.of_rollouts(FIRST, now, target=3.0)) == {"objective/kl"}


def test_metrics_that_a_run_does_not_have_raise_no_alarm():
  assert alarms.of_rollouts({}, {"objective/kl": 100.0}) == {}
  assert alarms.of_rollouts(FIRST, {"loss": 1.0}) == {}


@pytest.mark.slow
def test_a_run_of_ppo_says_once_what_went_astray(monkeypatch, capsys, tmp_path):
  rewarded.registered(monkeypatch)
  target = ("rollout.kl_target=1e-6", "rollout.kl_horizon=1000")
  target += ("optim.learning_rate=0.01",)
  loop.fit(rewarded.config_of(*target), tmp_path)
  said = [x for x in capsys.readouterr().out.splitlines() if "LOOK" in x]
  assert len(said) == 1
  assert said[0].startswith("LOOK: objective/kl ")
