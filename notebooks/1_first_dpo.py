# %% [markdown]
# # A first DPO in ten lines
#
# Direct Preference Optimization (DPO) trains a language model on comparisons:
# of two completions of a prompt, one was preferred. No reward model, no
# sampling: the loss needs the log-probabilities of both completions under the
# model and under a frozen copy of where it began, the *reference*.

# %%
# In Colab: clone the repository there, then take the # of the next line away.
# # %pip install -q ./dpo_jax

# %% [markdown]
# A config is a file of fields; `dpo:smoke` is one that comes with the package:
# DPO on a very small model with random parameters and generated remarks about
# films, kind ones preferred. Seconds on a laptop.

# %%
import dpo_jax as dj

config = dj.load_config("dpo:smoke")
config.train.steps = 60
config.log.every = 1
result = dj.fit(config, "runs/first")
result

# %% [markdown]
# `result.history` is a list of dicts, one a logged step and one an evaluation
# of held-out comparisons; `pandas.DataFrame(result.history)` reads it. The loss
# begins at log 2, where policy and reference are the same and each comparison
# is a coin toss. The *margin* is how much more the policy has come to prefer
# the chosen completion than the reference does.

# %%
import matplotlib.pyplot as plt

steps = [row for row in result.history if row["kind"] == "train"]
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for axis, name in zip(
  axes, ("loss", "rewards/margins", "rewards/accuracies"), strict=True
):
  axis.plot([row["step"] for row in steps], [row[name] for row in steps])
  axis.set_title(name)
  axis.set_xlabel("step")
plt.show()

# %% [markdown]
# What was measured at the end on comparisons that were not trained on:

# %%
{name: round(result.evaluation[name], 3) for name in sorted(result.evaluation)}

# %% [markdown]
# ## The run is a folder
#
# Everything is in `runs/first`. The same `dj.fit` again finds it done; with
# more steps it goes on from the last checkpoint. `dj.load_run` reads the
# folder, today or next week, also that of a run that the command line trained.

# %%
run = dj.load_run("runs/first")
run

# %%
run.figures["curves"]

# %% [markdown]
# Your own comparisons are a file with one JSON object a line, `{"prompt": …,
# "chosen": …, "rejected": …}`: set `config.data.train` to its path, and take
# `dj.load_config("dpo")` for a model that is not quite as small. Completions
# are drawn by `dj.sample(run, ["The plot was"])`; after 60 batches there is
# little to read yet, so that is left to the third notebook.
