"""Rollouts that no run can have are refused before anything is drawn."""

import numpy as np
import pytest

from dpo_jax import loop, verbs
from dpo_jax.eval import generate, rewards
from dpo_jax.models import sample
from tests.algos import rewarded


def scorer(made):
  """An entry of SCORERS whose scores are `made` of the completions."""
  return lambda _: lambda prompts, completions: made(completions)


BAD_SCORERS = {
  "nan": scorer(lambda texts: [float("nan")] * len(texts)),
  "inf": scorer(lambda texts: np.full(len(texts), np.inf)),
  "few": scorer(lambda texts: np.zeros(max(len(texts) - 1, 0))),
  "many": scorer(lambda texts: np.zeros((len(texts), 2))),
  "one": scorer(lambda texts: 0.5),
  "some": scorer(lambda texts: [np.nan if "b" in t else 0.7 for t in texts]),
}


@pytest.fixture(autouse=True)
def _scorers(monkeypatch):
  rewarded.registered(monkeypatch)
  for name, make in BAD_SCORERS.items():
    monkeypatch.setitem(rewards.SCORERS, name, make)


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError("something was drawn")

  monkeypatch.setattr(generate, "draws", fail)
  monkeypatch.setattr(sample, "sample", fail)


# (argument of the config, overrides, what is said)
REFUSED = {
  "no-scorer": ("", "rollout.scorer=None", r"rollout\.scorer = None"),
  "unknown-scorer": ("", "rollout.scorer=vadder", r"'vadder'.*'vader'"),
  "bare-scorer": ("", "rollout.scorer=tfidf", r"'tfidf'"),
  "nan": ("", "rollout.scorer=nan:x", r"not finite"),
  "inf": ("", "rollout.scorer=inf:x", r"not finite"),
  "too-few": ("", "rollout.scorer=few:x", r"one number"),
  "too-many": ("", "rollout.scorer=many:x", r"one number"),
  "one-for-all": ("", "rollout.scorer=one:x", r"one number"),
  "no-prompts": ("", "data.train=None", r"data\.train = None"),
  "long-prompt": ("", "data.max_prompt_length=4", r"max_prompt_length"),
  "no-room": (
    ",model=gpt2",
    "model.max_positions=64",
    r"max_positions|positions",
  ),
  "one-draw-rloo": (",loss=rloo", "rollout.draws=1", r"rollout\.draws = 1"),
  "one-draw-grpo": (",loss=grpo", "rollout.draws=1", r"rollout\.draws = 1"),
  "minibatches": ("", "rollout.prompts=6", r"rollout\.prompts = 6"),
  "too-many-prompts": ("", "rollout.prompts=48", r"only 24 distinct"),
  "steps": ("", "train.steps=6", r"6 steps end inside .* train\.steps = 8"),
  "target-alone": ("", "rollout.kl_target=6.0", r"kl_horizon = None"),
  "horizon-alone": ("", "rollout.kl_horizon=100", r"kl_target = None"),
  "no-coefficient": (
    "",
    "rollout.kl_target=6.0 rollout.kl_horizon=100 loss.beta=0",
    r"rollout\.kl_target = 6\.0 with loss\.beta = 0",
  ),
  "cached": ("", "ref=cached", r"ref = 'cached'.*'frozen'"),
  "no-reference": ("", "ref=none", r"ref = 'none'.*'frozen'"),
  "moving": ("", "ref=ema ref_mix=0.6 ref_every=4", r"ref = 'ema'"),
  "not-the-base": (",lora", "ref=frozen", r"ref = 'frozen'.*'base'"),
  "no-critic": ("", "rollout.critic=none", r"rollout\.critic = 'none'"),
  "a-critic": (",loss=rloo", "rollout.critic=head", r"must be 'none'"),
  "unknown-critic": ("", "rollout.critic=heads", r"'heads'.*'head'"),
  "warmup": (",loss=rloo", "rollout.warmup=1", r"rollout\.warmup = 1"),
  "centre-of-one": ("", "rollout.centre=prompt", r"rollout\.draws = 1"),
  "centre-of-a-group": (
    ",loss=rloo",
    "rollout.centre=prompt",
    r"rollout\.centre = 'prompt' has no effect with loss 'rloo'",
  ),
  "unknown-centre": ("", "rollout.centre=prompts", r"'prompts'.*'prompt'"),
  "packed": ("", "data.packed=true", r"data\.packed = True"),
  "end": ("", "rollout.missing_end=drop", r"rollout\.missing_end"),
  "end-without-score": (
    "",
    "rollout.missing_end=replace",
    r"rollout\.missing_score = None",
  ),
  "score-without-end": (
    "",
    "rollout.missing_score=-1.0",
    r"rollout\.missing_score = -1\.0",
  ),
  "prefix": ("", "rollout.prefix=(0,3)", r"rollout\.prefix"),
  "temperature": ("", "rollout.temperature=0", r"rollout\.temperature = 0"),
  "epochs": ("", "rollout.epochs=0", r"rollout\.epochs = 0"),
  "held-out": ("", "data.eval=toy:8", r"data\.eval = 'toy:8' has no effect"),
  "average": ("", "loss.average=all", r"loss\.average"),
  "clip": ("", "loss.clip=0", r"loss\.clip = 0"),
  "lam": ("", "loss.lam=1.5", r"loss\.lam = 1\.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_ppo_cannot_have_is_refused(name, tmp_path):
  arg, overrides, said = REFUSED[name]
  with pytest.raises(ValueError, match=f"(?s){said}") as error:
    loop.fit(rewarded.config_of(*overrides.split(), arg=arg), tmp_path / "run")
  assert not list(tmp_path.rglob("checkpoints"))
  assert len(str(error.value)) > 20  # a sentence, with a way out


def test_rollouts_of_an_algorithm_that_samples_nothing_are_refused(tmp_path):
  config = rewarded.config_of().unlock()
  config.algo = "sft"
  with pytest.raises(ValueError, match="'sft'"):
    loop.fit(config.lock(), tmp_path)


def test_ppo_needs_rollouts(tmp_path):
  config = rewarded.config_of().unlock()
  config.rollout = None
  with pytest.raises(ValueError, match=r"config\.rollout"):
    loop.fit(config.lock(), tmp_path)


def test_prompts_of_ppo_are_nothing_to_audit():
  with pytest.raises(ValueError, match="audit looks at completions"):
    verbs.audit(rewarded.config_of(), None, None)


def drawn(texts):
  return [
    generate.Draw(n, "a prompt", [1], text, [2], True, [-1.0])
    for n, text in enumerate(texts)
  ]


def test_scores_of_ppo_that_are_not_finite_are_refused_as_they_come():
  """Of a scorer that fails on some alone, while the run goes on."""
  some = rewards.load("some:x")
  with pytest.raises(ValueError, match=r"'some:x'.*1 of 3.*not finite"):
    rewards.of_draws(some, drawn(["a", "b", "c"]))
  good = rewards.of_draws(some, drawn(["a", "c"]))
  np.testing.assert_array_equal(good, [0.7, 0.7])  # .7 stays .7
