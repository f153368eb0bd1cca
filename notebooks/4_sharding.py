# %% [markdown]
# # Sharding on fake devices
#
# A mesh of devices can be tried without having them: XLA makes eight devices of
# one CPU. Programs, shardings and results are those of eight real ones; only
# the speed is not.

# %%
# In Colab: clone the repository there, then take the # of the next line away.
# # %pip install -q ./dpo_jax

# %% [markdown]
# JAX reads this when it is imported, so it comes first. If this cell says that
# there is one device, restart the kernel.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

import dpo_jax as dj

jax.devices()

# %% [markdown]
# ## The pieces of a run
#
# `dj.fit` is made of these, and a loop of your own may be too: a pure function
# and its parameters, a step that is not compiled yet and its first state, and
# batches as dicts of arrays. All of it on one device so far.

# %%
config = dj.load_config("dpo:smoke")
config.train.steps = 3
apply, params = dj.build(config)
step, state = dj.train_step(config, apply, params)
batches = list(dj.batches(config))
jax.tree.map(lambda x: x.shape, batches[0])

# %% [markdown]
# ## A mesh
#
# `fsdp` splits the parameters and the rows of a batch, `tensor` splits heads,
# MLP and vocabulary; what is left of the devices splits rows alone (`data`).
# Here 2 × 2 × 2.

# %%
config.mesh.fsdp = 2
config.mesh.tensor = 2
sharded_step, sharded_state, place = dj.parallelize(config, step, state)


def kernels(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("kernel"):
      yield name, leaf


for name, leaf in kernels(sharded_state.params):
  local = leaf.addressable_shards[0].data.shape
  print(f"{name:32} {leaf.shape!s:18} a device holds {local}")

# %% [markdown]
# The table of embeddings as the devices have it, each number a device:

# %%
table = max(jax.tree.leaves(sharded_state.params), key=lambda leaf: leaf.size)
print(table.shape, table.sharding.spec)
jax.debug.visualize_array_sharding(table)

# %% [markdown]
# ## The same numbers
#
# One device and eight compute the same loss and the same updates, up to the
# rounding of sums that are taken in another order. `hparams` are traced:
# another β compiles nothing.

# %%
hparams = {"beta": 0.1, "label_smoothing": 0.0, "learning_rate": 1e-3}
alone = jax.jit(step)
for batch in batches:
  state, one = alone(state, batch, hparams)
  sharded_state, eight = sharded_step(sharded_state, place(batch), hparams)
  print(f"one device {one['loss']:.6f}   eight devices {eight['loss']:.6f}")

# %%
import numpy as np

pairs = zip(
  jax.tree.leaves(state.params),
  jax.tree.leaves(sharded_state.params),
  strict=True,
)
furthest = max(
  np.abs(np.subtract(*pair)).max() for pair in jax.device_get([*pairs])
)
assert furthest < 1e-4, furthest
print(f"parameters differ by {furthest:.1e} at the most")

# %% [markdown]
# A batch of too few rows, or a model whose heads do not divide by `tensor`, is
# an error that names the field. On a real machine nothing changes but the first
# cell: `dj.fit(config, folder)` and `dpo-jax train --config.mesh.fsdp=8` read
# the same `config.mesh`.
