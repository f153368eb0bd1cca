"""Actor, reference, reward model and critic: where each starts, on one base."""

import jax
import numpy as np
import pytest

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.eval import rewards
from dpo_jax.run import build, gain
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import checkpoint
from tests import conftest

ROOT = conftest.ROOT


def config_of(name, *overrides):
  return load.load_config(str(ROOT / f"configs/{name}"), overrides)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
  """Folder of a reward model, an adapter on the random base of seed 0."""
  folder = tmp_path_factory.mktemp("reward") / "run"
  loop.fit(config_of("reward.py:smoke,lora", "data.eval=None"), folder)
  return folder


def ppo(folder, *overrides):
  return config_of(
    "ppo.py:smoke,lora",
    *(f"rollout.scorer=reward:{folder}", "rollout.critic=copy"),
    *(f"rollout.critic_from={folder}", *overrides),
  )


@pytest.mark.slow
def test_a_critic_starts_as_the_reward_model_on_the_one_base(reward_model):
  config = ppo(reward_model)
  run = build.prepare(config)
  base = trained_lib.initial(run.setup)
  state = build.initial_state(run, base)
  # What was restored, with gain and bias in the head.
  setup = build.prepare_model(config_of("reward.py:smoke,lora"))
  saved = trained_lib.restored(
    setup, trained_lib.initial(setup), reward_model, "the reward model"
  )
  step = checkpoint.latest_step(reward_model)
  found = gain.read(reward_model, setup.asked, step)
  head = gain.folded(saved["reward"], *found)
  same = jax.tree.map(
    lambda a, b: np.array_equal(a, b),
    *(state.params["critic"], saved["model"]),
  )
  assert all(jax.tree.leaves(same))
  np.testing.assert_array_equal(state.params["value"]["kernel"], head["kernel"])
  # The policy starts at its base: the adapter's product is 0.
  policy = run.setup.trained.merged(base, state.params)
  for merged, plain in zip(
    jax.tree.leaves(policy), jax.tree.leaves(base), strict=True
  ):
    np.testing.assert_array_equal(merged, plain)
  # Policy, reference, critic and the scorer's model are on the same arrays.
  other = trained_lib.initial(build.prepare_model(config))
  scored = trained_lib.initial(setup)
  for leaves in zip(*map(jax.tree.leaves, (base, other, scored)), strict=True):
    assert leaves[0] is leaves[1] is leaves[2]


@pytest.mark.slow
def test_a_run_with_its_reward_model_as_scorer_and_critic_trains(
  reward_model, tmp_path
):
  result = loop.fit(ppo(reward_model), tmp_path)
  row = result.history[-1]
  assert row["objective/scores"] != 0
  assert np.isfinite(row["value/loss"])
  assert rewards.load(f"reward:{reward_model}").name == "reward"


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    (("rollout.critic=head",), r"critic_from = .* has no effect"),
    (("lora.rank=8",), "rollout.critic_from = .*"),
    (("init_seed=1",), "is not the reference that this run was trained with"),
  ],
)
def test_a_reward_model_that_does_not_fit_is_refused(
  overrides, said, reward_model
):
  config = ppo(reward_model, *overrides)

  def begun():
    build.check(config)
    run = build.prepare(config)
    build.initial_state(run, trained_lib.initial(run.setup))

  with pytest.raises(ValueError, match=said):
    begun()
