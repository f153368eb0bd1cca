# %% [markdown]
# # Sweep β and read the frontier
#
# β says how dear it is to leave the reference. A small β lets the policy run
# after the reward, a large one keeps it close. Neither is right by itself: what
# a method achieves is the curve of reward over distance (the KL divergence from
# the reference), here for four β, as in section 6 of the DPO paper.

# %%
# In Colab: clone the repository there, then take the # of the next line away.
# # %pip install -q ./dpo_jax

# %% [markdown]
# ## A policy to start from
#
# The frontier is of a policy's own samples, so it must be able to speak. The
# generated remarks come in a kind and an unkind version; a small model learns
# both kinds first, from the completions alone.

# %%
import json
import pathlib

import dpo_jax as dj
from dpo_jax.data.read import sources

remarks = list(sources.SOURCES["toy"]())
rows = [
  {"prompt": remark["prompt"], "completion": remark[side]}
  for remark in remarks
  for side in ("chosen", "rejected")
]
text = "".join(json.dumps(row) + "\n" for row in rows)
pathlib.Path("remarks.jsonl").write_text(text)
remarks[0]

# %%
lengths = [
  "data.max_prompt_length=32",
  "data.max_completion_length=32",
  "data.batch_size=32",
  "data.max_shapes=1",  # one shape of batches: one program to compile
]
config = dj.load_config(
  "sft:smoke",
  [
    *lengths,
    "data.train=remarks.jsonl",
    "data.eval=None",
    "train.steps=300",
    "optim.learning_rate=3e-3",
  ],
)
start = dj.fit(config, "runs/start")
for row in dj.sample(start, ["The plot was"], draws=4, max_new_tokens=32):
  print(row["completion"])

# %% [markdown]
# ## A reward to measure with
#
# DPO never sees this one: it counts kind words and takes off the unkind ones. A
# scorer is a function in a table, made from what follows the colon of its name.

# %%
from dpo_jax.eval import rewards

KIND = ["warm", "clever", "moving", "funny", "lovely", "bright"]
UNKIND = ["dull", "clumsy", "empty", "slow", "ugly", "grim"]


def kindness(unit):
  def score(prompts, completions):
    counts = [
      sum(map(text.count, KIND)) - sum(map(text.count, UNKIND))
      for text in completions
    ]
    return [float(unit) * count for count in counts]

  return score


rewards.SCORERS["kindness"] = kindness

# %% [markdown]
# ## Four β
#
# A point is a dict of the fields that it sets. Each gets a folder of its own;
# what is finished is skipped when the cell runs again. `ref=cached` computes
# the reference's log-probabilities once for all four.

# %%
config = dj.load_config(
  "dpo:smoke",
  [
    *lengths,
    "init_from=runs/start",
    "ref=cached",
    "train.steps=40",
    "optim.learning_rate=1e-4",
    "sample.prompts=toy",
    "sample.count=64",
    "sample.draws=2",
    "sample.max_new_tokens=32",
    "sample.scorers=kindness:1",
  ],
)
points = [{"loss.beta": beta} for beta in (0.05, 0.2, 1.0, 5.0)]
table = dj.sweep(config, points, "runs/betas")
table

# %% [markdown]
# ## The frontier
#
# Up is more reward, left is closer to the reference (the diamond); bars are one
# standard error over prompts. A smaller β goes further to the right. At first
# that buys reward. Beyond, the policy leaves the language that it was taught,
# and the distance buys nothing more: the comparisons are won all the same, on
# completions that it no longer writes.

# %%
table.figures["frontier"]

# %% [markdown]
# The rows are plain dicts. Reward per nat of distance, for those who have to
# choose:

# %%
for row in table[1:]:
  reward, kl = row["reward/kindness"]["mean"], row["kl"]["mean"]
  gain = reward - table[0]["reward/kindness"]["mean"]
  print(
    f"{row['run']:10} reward {reward:5.2f}, KL {kl:5.2f}, a nat {gain / kl:.2f}"
  )

# %% [markdown]
# A look at the text itself is part of reading a frontier: see what the words of
# the smallest β look like.
# `runs/betas/report.html` has the samples of all policies side by side, the
# curves and the table.

# %%
for point in table[1:]:
  run = dj.load_run(f"runs/betas/{point['run']}")
  texts = [row["completion"] for row in run.samples[:4]]
  print(f"{point['run']:10} {texts}")

# %% [markdown]
# One seed and a toy: with data of your own, sweep `data.seed` beside β before
# you believe in a difference.
