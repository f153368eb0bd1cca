"""Several train states as one, and one step of all of them at once.

The arrays of a stacked state have a first axis of points; what is frozen has
none where all points share it, so that the reference is computed once.
"""

import jax
import jax.numpy as jnp


def stack(trees):
  """One tree of arrays [points, …] of trees of arrays […]."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree, index):
  """Point `index` of a stacked tree."""
  return jax.tree.map(lambda x: x[index], tree)


def over_points(step, count, *, shared):
  """The step of `count` points over one batch.

  Args:
    step: (state, batch, hparams) -> (state, metrics) of one point.
    count: points.
    shared: whether all have one frozen part; else it is stacked too.
  Returns: the same function of a stacked state and stacked hparams; metrics
    are a list, the dict of each point. What depends on the batch and on a
    shared frozen part alone, such as the reference's log-probs, is not stacked:
    vmap leaves it as it is.
  """

  def stacked_step(state, batch, hparams):
    def one(moving, frozen, hparams):
      state, metrics = step(moving.replace(frozen=frozen), batch, hparams)
      return state.replace(frozen={}), metrics

    every = jax.vmap(one, in_axes=(0, None if shared else 0, 0))
    moving, metrics = every(state.replace(frozen={}), state.frozen, hparams)
    metrics = [unstack(metrics, index) for index in range(count)]
    return moving.replace(frozen=state.frozen), metrics

  return stacked_step
