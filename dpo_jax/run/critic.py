"""A critic that starts as a reward model: its trunk, and its head of values."""

import jax

from dpo_jax import tree
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import gain
from dpo_jax.run import trained as trained_lib
from dpo_jax.train import checkpoint

FIELD = "rollout.critic_from"


def started(setup, base, params):
  """The trained tree whose critic is a reward model, gain and bias in its head.

  V of a whole completion is then its reward, which is what it is worth.

  Args:
    setup: base.Setup; `source.critic` is the reward model's run.
    base: what this run starts from.
    params: the trained tree at step 0, with a "critic" and a "value".
  Raises: ValueError for a run of no reward model, or of another kind of model.
  Source: arXiv:2009.01325 section 3.4.
  """
  folder, trained, source, asked = setup.source.critic
  named = f"{FIELD} = {folder}"
  if trained.heads != ("reward",):
    raise ValueError(
      f"{named}: that run trained no reward model (its algo is "
      f"{asked['algo']!r})"
    )
  if trained.on_base != setup.trained.on_base:
    kinds = {True: "an adapter", False: "a whole model"}
    raise ValueError(
      f"{named} is {kinds[trained.on_base]}, and this run trains "
      f"{kinds[setup.trained.on_base]}: their weights are not of one kind"
    )
  other = setup._replace(trained=trained, source=source, asked=asked)
  reward = trained_lib.restored(
    other, base if trained.on_base else None, folder, FIELD
  )
  shapes = {path: x.shape for path, x in tree.named(params["critic"])}
  if shapes != {path: x.shape for path, x in tree.named(reward["model"])}:
    raise ValueError(f"{named} is of another shape than this run's model")
  step = checkpoint.latest_step(folder)
  head = gain.folded(reward["reward"], *gain.read(folder, asked, step))
  begun = {**params, "critic": reward["model"], "value": head}
  return run_lib.place(begun, jax.tree.map(lambda x: x.sharding, params))
