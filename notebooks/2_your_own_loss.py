# %% [markdown]
# # Your own loss
#
# A loss is a function of log-probabilities. It sees no model, no data and no
# training loop, so it can be tried on four numbers before it trains anything.

# %%
# In Colab: clone the repository there, then take the # of the next line away.
# # %pip install -q ./dpo_jax

# %% [markdown]
# `policy_logps` and `ref_logps` hold the log-probability of each completion in
# nats, `[..., 0]` of the chosen one and `[..., 1]` of the rejected one. The
# loss of this example wants the margin of each comparison to be 1, and pays for
# how much further away than `slack` it is.

# %%
import jax
import jax.numpy as jnp

import dpo_jax as dj


def mine(policy_logps, ref_logps, *, beta, slack):
  ratios = policy_logps - ref_logps
  margin = beta * (ratios[..., 0] - ratios[..., 1])
  return {"loss": jnp.maximum(jnp.abs(1 - margin) - slack, 0.0)}


# %% [markdown]
# Two comparisons: in the first the policy is the reference, so the margin is 0;
# in the second it has learned something.

# %%
policy = jnp.array([[-5.0, -6.0], [-4.0, -9.0]])
reference = jnp.array([[-5.0, -6.0], [-5.0, -6.0]])
mine(policy, reference, beta=0.1, slack=0.1)["loss"]

# %% [markdown]
# The slope says what a step will do: log-probabilities of chosen completions
# (first column) go up, those of rejected ones down.

# %%
jax.grad(lambda p: mine(p, reference, beta=0.1, slack=0.1)["loss"].sum())(
  policy
)

# %% [markdown]
# ## It trains
#
# A row in `LOSSES` gives it a name and the defaults of its numbers, which are
# fields of the config from here on: `config.loss.slack`, or a sweep over
# `"loss.slack"`. It runs on every device layout, packed rows and adapters
# included, as the built-in losses do.

# %%
from dpo_jax.ops.losses import LOSSES, Loss

LOSSES["mine"] = Loss(mine, {"beta": 0.1, "slack": 0.1})
config = dj.load_config("dpo:smoke,loss=mine")
config.train.steps = 40
config.log.every = 1
result = dj.fit(config, "runs/own_loss")
result

# %% [markdown]
# The function returned nothing but the loss, and still margins and accuracy are
# logged: those of the rewards β (log π − log π_ref), with the loss's own `beta`
# (1 for a loss that has none). A loss that has a better idea of its rewards
# returns `"rewards/chosen"` and the others itself.

# %%
for row in result.history[::10]:
  print({k: round(row[k], 3) for k in ("loss", "rewards/margins")})

# %% [markdown]
# ## A changed loss is another run
#
# The code of the function is part of what the run is. Were this cell trained
# into the same folder, the curve would be of two losses; so it is refused.


# %%
def mine(policy_logps, ref_logps, *, beta, slack):
  ratios = policy_logps - ref_logps
  margin = beta * (ratios[..., 0] - ratios[..., 1])
  return {"loss": jnp.maximum((1 - margin) ** 2 - slack, 0.0)}


LOSSES["mine"] = Loss(mine, {"beta": 0.1, "slack": 0.1})
try:
  dj.fit(config, "runs/own_loss")
except ValueError as error:
  print(error)

# %% [markdown]
# A new folder is a new run, and the two can be laid over one another.

# %%
import matplotlib.pyplot as plt

squared = dj.fit(config, "runs/own_loss_squared")
for name, one in (("distance", result), ("its square", squared)):
  rows = [row for row in one.history if row["kind"] == "train"]
  plt.plot([row["rewards/margins"] for row in rows], label=name)
plt.xlabel("step")
plt.ylabel("margin")
plt.legend()
plt.show()
