"""Online DPO in the language whose every answer can be listed.

The whole run: the feed draws answers of the policy as it is, a table scores
them, and the train step learns from comparisons of them.
"""

import json

import jax
import numpy as np

from dpo_jax import loop
from dpo_jax.config import load
from dpo_jax.eval import rewards
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import model as model_lib
from dpo_jax.run import trained
from tests import conftest
from tests.exact import language
from tests.exact import world as world_lib

BETA = 1.0
REWARD = np.random.default_rng(0).normal(
  size=(len(language.PROMPTS), len(language.TEXTS))
)


def score(prompts, completions):
  """r* of the table."""
  where = [language.PROMPTS.index(prompt) for prompt in prompts]
  return REWARD[where, [language.TEXTS.index(text) for text in completions]]


def config_of(folder, arg="", *overrides):
  """The config of a run, whose prompts are written into a folder."""
  path = folder / "prompts.jsonl"
  rows = [{"prompt": prompt} for prompt in language.PROMPTS]
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return load.load_config(
    f"{conftest.ROOT}/configs/online.py:smoke{arg}",
    (
      *(f"data.train={path}", "data.eval=None", "data.batch_size=2"),
      *("data.max_prompt_length=3", f"data.max_completion_length={LONGEST}"),
      *("data.shape_multiple=1", "log.every=1000"),
      *("rollout.prompts=2", "rollout.draws=16", "rollout.scorer=table:r"),
      *(f"loss.beta={BETA}", "optim.schedule=linear", "train.steps=300"),
      *("optim.learning_rate=0.01", *overrides),
    ),
  )


LONGEST = language.LONGEST


def in_the_language(patch):
  """Has runs take the model, its parameters, the tokenizer and the table."""
  model, params = language.model()
  patch.setattr(model_lib, "build", lambda *_: (model, language.TOKENIZER))
  patch.setattr(trained, "initial", lambda setup: params)
  one = mesh_lib.of_devices(jax.devices()[:1])  # two rows are few for eight
  patch.setattr(mesh_lib, "make", lambda options: one)
  patch.setitem(rewards.SCORERS, "table", lambda _: score)


def distances(config, folder):
  """Total variation from π_ref e^(r/β) / Z, f64[2]: before, and after a run."""
  rows = language.batch(language.everything_compared())
  ref = language.log_policy(language.model()[1], rows)
  want = world_lib.normalised(ref + REWARD / BETA)
  result = loop.fit(config, folder / "run")
  policy = language.log_policy(result.state.params, rows)
  far = world_lib.total_variation
  return far(ref, want), far(policy, want)
