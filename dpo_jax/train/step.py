"""One train step, the same body for jit over a mesh and for pmap.

denominators   Σ weights of every term, over the global batch
gradient       of Σ_terms Σ w·v / denominator, summed over microbatches
               and devices
update         optimiser, learning rate, and a guard against non-finite
"""

import jax
import jax.numpy as jnp

from dpo_jax import tree
from dpo_jax.algos import base
from dpo_jax.ops import reduce


def make(algorithm, optimizer, *, accumulation, axis_name):
  """Builds step(state, batch, hparams) -> (state, metrics).

  Args:
    algorithm: algos.base.Algorithm.
    optimizer: train.optim.Optimizer.
    accumulation: microbatches per step; the rows must be a multiple.
    axis_name: None under jit on global arrays, the axis under pmap.
  Returns: the step. hparams holds traced scalars: "learning_rate" and what the
    objective reads. metrics are f32 scalars over the global batch.
  """
  if algorithm.batch_level and (accumulation > 1 or axis_name is not None):
    raise ValueError(
      "this loss couples the examples of a batch, so it needs them all at "
      "once: set train.accumulation = 1 and mesh.mode = 'jit'"
    )

  def step(state, batch, hparams):
    trained, rest = tree.split(state.params, optimizer.trains)
    grads, loss, metrics = gradients(
      algorithm,
      lambda trained: tree.graft(rest, trained),
      trained,
      state,
      batch,
      hparams,
      accumulation,
      axis_name,
    )
    rate = hparams["learning_rate"] * optimizer.factor(state.step)
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, trained)
    updated = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
    norm = tree.norm(grads)
    moved = rate * tree.norm(updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(moved)

    def guard(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    state = state.replace(
      step=state.step + 1,
      params=tree.graft(rest, guard(updated, trained)),
      opt_state=guard(opt_state, state.opt_state),
      skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    extra = {
      "loss": loss,
      "grad_norm": norm,
      "learning_rate": rate,
      "skipped": state.skipped.astype(jnp.float32),
    }
    return state, {**metrics, **extra}

  return step


def gradients(
  algorithm, whole, trained, state, batch, hparams, accumulation, axis_name
):
  """(gradient of the loss for `trained`, loss, metrics) over the global batch.

  Args:
    whole: trained parameters -> all parameters of the policy.
    trained: what is differentiated.
    Others as in `make`.
  """

  def terms_of(params, batch):
    batch = algorithm.prepare(batch, state.frozen, state.extra)
    return algorithm.objective(params, state.frozen, batch, hparams)

  # Weights depend on the data only; the forward pass behind them is dead code
  # that the compiler drops.
  weights = reduce.denominators(_merged(terms_of(state.params, batch)))
  dens = jax.lax.stop_gradient(reduce.psum(weights, axis_name))

  def local_loss(trained, batch):
    terms = terms_of(whole(trained), batch)
    nums = reduce.numerators(_merged(terms))
    means = reduce.divide(nums, dens)
    return sum(means[_loss_key(name)] for name in terms.losses), nums

  grad_fn = jax.grad(local_loss, has_aux=True)
  if accumulation == 1:
    grads, nums = grad_fn(trained, batch)
  else:
    grads, nums = _accumulate(grad_fn, trained, batch, accumulation)
  grads, nums = reduce.psum((grads, nums), axis_name)
  means = reduce.divide(nums, dens)
  prefix = _loss_key("")
  loss = sum(v for k, v in means.items() if k.startswith(prefix))
  metrics = {k: v for k, v in means.items() if not k.startswith(prefix)}
  return grads, loss, metrics


def sums(algorithm, *, axis_name):
  """Builds f(state, batch, hparams) -> (numerators, denominators).

  For evaluation: add them over batches, then divide. "loss" is the sum of the
  means of all "loss/…" terms.
  """

  def evaluate(state, batch, hparams):
    batch = algorithm.prepare(batch, state.frozen, state.extra)
    terms = _merged(
      algorithm.objective(state.params, state.frozen, batch, hparams)
    )
    out = reduce.numerators(terms), reduce.denominators(terms)
    return reduce.psum(out, axis_name)

  return evaluate


def _loss_key(name):
  return f"loss/{name}"


def _merged(terms: base.Terms):
  losses = {_loss_key(name): term for name, term in terms.losses.items()}
  return {**losses, **terms.metrics}


def _accumulate(grad_fn, trained, batch, accumulation):
  """Sums gradients and numerators over microbatches of rows.

  Row i·A + a goes to microbatch a, so that each device's contiguous rows are
  spread over all microbatches and nothing moves between devices.
  """

  def split(x):
    x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  micros = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], micros)
  shapes = jax.eval_shape(grad_fn, trained, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def body(total, micro):
    return jax.tree.map(jnp.add, total, grad_fn(trained, micro)), None

  return jax.lax.scan(body, zeros, micros)[0]
