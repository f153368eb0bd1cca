"""One train step, the same body for jit over a mesh and for pmap.

denominators   Σ weights of every term, over the global batch
gradient       of Σ_terms Σ w·v / denominator, summed over microbatches
               and devices
update         optimiser, learning rate, what keeps still, and a guard against
               what is not finite and against spikes
"""

import jax
import jax.numpy as jnp

from dpo_jax import tree
from dpo_jax.algos import base, diagnostics
from dpo_jax.ops import reduce
from dpo_jax.train import guard

_LOSSES = "loss/"  # before the name of a term of the loss, where all are summed


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

  def step(state, batch, hparams):
    # ── Gradient: of the part that is trained, over the whole batch ──────────
    trained, rest = tree.split(state.params, optimizer.trains)
    grads, metrics, kept = gradients(
      *(algorithm, lambda trained: tree.graft(rest, trained), trained),
      *(state, batch, hparams, accumulation, axis_name),
    )

    # ── Update: the rate stays outside of the optimiser, or it would be
    # compiled in, and a sweep over it would compile every point anew. Of a part
    # that keeps still it keeps the moments and their count as they are, which
    # no guard of the whole state can do ──────────────────────────────────────
    rate = hparams["learning_rate"] * optimizer.factor(state.step)
    updates, opt_state = optimizer.tx.update(
      *(grads, state.opt_state, trained),
      still=algorithm.still(state.extra, state.step),
    )
    updated = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
    norm = tree.norm(grads)
    moved = rate * tree.norm(updates)

    # ── Guard: chosen on the device, since the host sees a step's numbers late
    loss = metrics["loss"]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(moved)
    accepted, skipped = guard.judge(
      state.skipped, finite, norm, optimizer.max_spike
    )
    applies = accepted & algorithm.applies(state.extra, state.step)

    def guarded(new, old, when=accepted):
      return jax.tree.map(lambda n, o: jnp.where(when, n, o), new, old)

    params = tree.graft(rest, guarded(updated, trained, applies))
    metrics |= {"grad_norm": norm, "learning_rate": rate}
    # After the metrics, so that a coefficient can follow them.
    extra = {**state.extra, **kept}
    extra = algorithm.update(extra, params, state.step + 1, metrics)
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=guarded(opt_state, state.opt_state, applies),
      extra=guarded(extra, state.extra),
      skipped=skipped,
    )
    return state, metrics | guard.metrics(skipped)

  return step


def gradients(
  algorithm, whole, trained, state, batch, hparams, accumulation, axis_name
):
  """Gradient of the loss for `trained`, over the global batch.

  Args:
    whole: trained parameters -> all parameters of the policy.
    trained: what is differentiated.
    Others as in `make`.
  Returns: (gradient, metrics, what of state.extra is new).
  """
  rng = base.rng_of(state.step)

  def features(trained, batch):
    batch = algorithm.prepare(batch, state.frozen, state.extra)
    return algorithm.features(whole(trained), state.frozen, batch, hparams, rng)

  def combine(moving, fixed):
    return algorithm.combine(moving, fixed, state.extra, hparams)

  # One microbatch on one device sees the whole batch, coupled or not; else a
  # loss that couples its examples needs all their features before its gradient.
  if algorithm.batch_level and (accumulation > 1 or axis_name is not None):
    grads, terms = _coupled(
      features, combine, trained, batch, accumulation, axis_name
    )
    totals, axis_name = reduce.denominators(_merged(terms)), None
    nums, peaks = reduce.numerators(_merged(terms)), reduce.peaks(terms.peaks)
    kept = terms.kept
  else:
    # Weights depend on the data only; the forward pass behind them is dead code
    # that the compiler drops.
    weights = reduce.denominators(_merged(combine(*features(trained, batch))))
    totals = jax.lax.stop_gradient(reduce.psum(weights, axis_name))

    def local_loss(trained, batch):
      terms = combine(*features(trained, batch))
      if terms.kept and not algorithm.batch_level:
        raise ValueError(
          f"`combine` keeps {sorted(terms.kept)}, but sees one microbatch of "
          "one device: set batch_level = True, or keep it in `update`, from "
          "the metrics of the whole batch"
        )
      nums = reduce.numerators(_merged(terms))
      aux = nums, reduce.peaks(terms.peaks), terms.kept
      return _loss(reduce.divide(nums, totals)), aux

    grad_fn = jax.grad(local_loss, has_aux=True)
    if accumulation == 1:
      grads, (nums, peaks, kept) = grad_fn(trained, batch)
    else:
      micros = _microbatches(batch, accumulation)
      grads, (nums, peaks, kept) = _accumulate(grad_fn, trained, micros)
    grads, nums = reduce.psum((grads, nums), axis_name)
  metrics = means_of(nums, totals) | reduce.pmax(peaks, axis_name)
  return grads, metrics, kept


def _coupled(features, combine, trained, batch, accumulation, axis_name):
  """(gradient, Terms) of a loss that couples the global batch, in two stages.

  First the features of all microbatches and devices, and with them
  g = ∂loss/∂features; then the gradient of Σ sg(g)·features, microbatch by
  microbatch. One more forward pass, and no microbatch holds another's
  activations.
  """
  micros = _microbatches(batch, accumulation)
  micro_features = jax.lax.map(lambda micro: features(trained, micro), micros)
  rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), micro_features)
  moving, fixed = reduce.gather_rows(rows, axis_name)

  def loss(moving):
    terms = combine(moving, fixed)
    merged = _merged(terms)
    totals = jax.lax.stop_gradient(reduce.denominators(merged))
    return _loss(reduce.divide(reduce.numerators(merged), totals)), terms

  slopes, terms = jax.grad(loss, has_aux=True)(moving)

  def mine(slope):
    """This device's rows, by microbatch."""
    count = accumulation * jax.tree.leaves(micros)[0].shape[1]
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count
    slope = jax.lax.dynamic_slice_in_dim(slope, start, count)
    return slope.reshape(accumulation, -1, *slope.shape[1:])

  def pull(trained, xs):
    micro, slopes = xs
    moving, _ = features(trained, micro)
    parts = jax.tree.map(lambda s, x: jnp.sum(s * x), slopes, moving)
    return sum(jax.tree.leaves(parts)), ({}, {}, {})

  by_micro = micros, jax.tree.map(mine, slopes)
  grads, _ = _accumulate(jax.grad(pull, has_aux=True), trained, by_micro)
  return reduce.psum(grads, axis_name), terms


def sums(algorithm, *, axis_name):
  """Builds f(state, batch, hparams) -> (numerators, denominators).

  For evaluation: add them over batches, then `means_of`. "loss" is the sum of
  the means of all "loss/…" terms.
  """

  def evaluate(state, batch, hparams):
    batch = algorithm.prepare(batch, state.frozen, state.extra)
    features = algorithm.features(
      state.params, state.frozen, batch, hparams, base.rng_of(0)
    )
    axis = axis_name
    if algorithm.batch_level:
      features, axis = reduce.gather_rows(features, axis), None
    terms = _merged(algorithm.combine(*features, state.extra, hparams))
    out = reduce.numerators(terms), reduce.denominators(terms)
    return reduce.psum(out, axis)

  return evaluate


def means_of(nums, totals):
  """{metric: value} of sums over all data, "loss" among them."""
  means = reduce.divide(nums, totals)
  metrics = {k: v for k, v in means.items() if not k.startswith(_LOSSES)}
  return {"loss": _loss(means), **diagnostics.derived(metrics, totals)}


def _loss(means):
  return sum(v for k, v in means.items() if k.startswith(_LOSSES))


def _merged(terms):
  """All terms, those of the loss under names of their own."""
  losses = {f"{_LOSSES}{name}": term for name, term in terms.losses.items()}
  return {**losses, **terms.metrics}


def _microbatches(batch, accumulation):
  """Rows as [accumulation, R / accumulation, …].

  Row i·A + a goes to microbatch a, so that each device's contiguous rows are
  spread over all microbatches and nothing moves between devices.
  """

  def split(x):
    x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)


def _accumulate(grad_fn, trained, micros):
  """Sums gradients and numerators over microbatches; keeps the largest peaks.

  `grad_fn` is (trained, xs) -> (gradient, (numerators, peaks, kept)).
  """
  first = jax.tree.map(lambda x: x[0], micros)
  shapes = jax.eval_shape(grad_fn, trained, first)
  grads, (nums, peaks, _) = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), shapes
  )
  lowest = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), peaks)

  def body(total, micro):
    grads, (nums, peaks, _) = grad_fn(trained, micro)
    grads, nums = jax.tree.map(jnp.add, total[:2], (grads, nums))
    return (grads, nums, jax.tree.map(jnp.maximum, total[2], peaks)), None

  (grads, nums, peaks), _ = jax.lax.scan(body, (grads, nums, lowest), micros)
  return grads, (nums, peaks, {})
