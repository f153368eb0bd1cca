"""The train step: optimiser, guard, reference, compilations, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dpo_jax import tree
from dpo_jax.algos import preference
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib
from tests import worlds
from tests.parallel import test_topology as topology

BATCH = worlds.batch(worlds.examples(8))


def make(optim_name="sgd", loss="dpo", **changes):
  """(step, state with an optimiser of its own, hparams) of a micro model."""
  model, params = worlds.model("llama")
  algorithm = preference.make(topology.config_of(loss=loss), model.apply)
  options = common.optim(optim_name)
  options.update({"warmup": 0, "learning_rate": 1e-2, **changes})
  optimizer = optim.make(options, 100)
  state = state_lib.create(
    params, optimizer, {"ref": params}, algorithm.extra(params)
  )
  step = step_lib.make(algorithm, optimizer, accumulation=1, axis_name=None)
  hparams = {
    "beta": jnp.float32(0.1),
    "label_smoothing": jnp.float32(0.0),
    "learning_rate": jnp.float32(options.learning_rate),
  }
  return step, state, hparams


@functools.cache
def shared(name, **changes):
  """`make`, its step compiled once: it donates a copy of what it is given."""
  step, state, hparams = make(name, **changes)
  compiled = jax.jit(step, donate_argnums=0)

  def call(state, hparams):
    return compiled(jax.tree.map(jnp.copy, state), BATCH, hparams)

  call.compiled = compiled
  return call, state, hparams


@functools.cache
def trained():
  """(state at first, state after ten steps, metrics of each)."""
  step, state, hparams = shared("rmsprop")
  first, history = state, []
  for _ in range(10):
    state, metrics = step(state, hparams)
    history.append(metrics)
  return first, state, history


def test_training_starts_at_log_two_and_the_loss_falls():
  _, _, history = trained()
  first, last = history[0], history[-1]
  np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
  np.testing.assert_allclose(first["rewards/margins"], 0, atol=1e-6)
  assert last["loss"] < 0.5 * first["loss"]
  assert last["rewards/margins"] > 1


def test_the_reference_is_bit_unchanged_after_ten_steps_and_gets_no_gradient():
  first, state, _ = trained()
  before = jax.tree.map(np.asarray, first.frozen)
  jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
  moved = jax.tree.map(
    lambda a, b: bool(jnp.any(a != b)), state.params, before["ref"]
  )
  assert all(jax.tree.leaves(moved))

  model, params = worlds.model("llama")
  algorithm = preference.make(topology.config_of(), model.apply)
  _, _, hparams = shared("rmsprop")

  def loss(ref):
    batch = algorithm.prepare(BATCH, {"ref": ref}, {})
    terms = algorithm.objective(params, {}, batch, hparams)
    return jnp.sum(terms.losses["dpo"][0])

  for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
    np.testing.assert_array_equal(leaf, 0.0)


def test_at_the_reference_each_pair_pulls_with_half_beta():
  """∂loss/∂log π is −β/2 for the chosen and +β/2 for the rejected completion,
  through the model: the gradient is that of −β/2 · (log π_w − log π_l)."""
  model, params = worlds.model("llama")
  config = topology.config_of()
  algorithm = preference.make(config, model.apply)
  beta = 0.7
  hparams = {"beta": beta, "label_smoothing": 0.0}

  def through_the_loss(params, ref):
    batch = algorithm.prepare(BATCH, {"ref": ref}, {})
    values, weights = algorithm.objective(params, {}, batch, hparams).losses[
      "dpo"
    ]
    return jnp.sum(values * weights), (values, weights)

  def by_hand(params):
    terms = algorithm.objective(
      params,
      {},
      algorithm.prepare(BATCH, {"ref": params}, {}),
      {"beta": 1.0, "label_smoothing": 0.0},
    )
    chosen, weights = terms.metrics["logps/chosen"]
    rejected, _ = terms.metrics["logps/rejected"]
    return jnp.sum(weights * (chosen - rejected))

  grad_fn = jax.jit(jax.grad(through_the_loss, has_aux=True))
  gradient, (values, weights) = grad_fn(params, params)
  # Two programs: sums of some 100 nats may differ by an ulp, 8e-6, times β / 2.
  np.testing.assert_allclose(values[weights > 0], np.log(2), atol=3e-6)

  # The metrics carry no gradient, so the slope is taken by differences along
  # one direction, in the exact sum of log-ratios.
  direction = worlds.noisy(jax.tree.map(jnp.zeros_like, params), 11, 1.0)
  size = 1e-3

  @jax.jit
  def along(t):
    moved = jax.tree.map(lambda p, d: p + t * d, params, direction)
    return by_hand(moved)

  slope = float(along(size) - along(-size)) / (2 * size)
  dot = sum(
    float(jnp.vdot(g, d))
    for g, d in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )
  # Central differences in f32: 1e-6 of sums of order 100 over 2e-3.
  np.testing.assert_allclose(dot, -beta / 2 * slope, rtol=0.02)


@pytest.mark.parametrize("field", ["beta", "label_smoothing", "learning_rate"])
def test_changing_a_hyper_parameter_does_not_recompile(field):
  step, state, hparams = shared("rmsprop")
  changed_hparams = {**hparams, field: jnp.float32(0.3)}
  _, one = step(state, hparams)
  other_state, other = step(state, changed_hparams)
  assert step.compiled._cache_size() == 1
  if field == "learning_rate":
    changed = tree.norm(
      jax.tree.map(jnp.subtract, other_state.params, state.params)
    )
    assert changed > 0
    assert other["learning_rate"] != one["learning_rate"]
  else:
    _, later = step(other_state, hparams)
    _, later_other = step(other_state, changed_hparams)
    assert later["loss"] != later_other["loss"]
  assert step.compiled._cache_size() == 1


def test_rmsprop_is_torchs():
  """v ← .99 v + .01 g², p ← p − lr · g / (√v + 1e-8): eps outside the root."""
  options = common.optim("rmsprop")
  options.clip_norm, options.warmup = None, 0
  optimizer = optim.make(options, 10)
  rng = np.random.default_rng(0)
  params, v = rng.normal(size=5), np.zeros(5)
  ours = {"x": jnp.float32(params)}
  opt_state = optimizer.tx.init(ours)
  for _ in range(4):
    g = rng.normal(size=5) * 1e-4
    v = 0.99 * v + 0.01 * g**2
    params -= 0.01 * g / (np.sqrt(v) + 1e-8)
    updates, opt_state = optimizer.tx.update(
      {"x": jnp.float32(g)}, opt_state, ours
    )
    ours = {"x": ours["x"] - 0.01 * updates["x"]}
  np.testing.assert_allclose(ours["x"], params, rtol=1e-5)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_moments_in_bf16_follow_those_in_f32(name):
  """Though each change is below the rounding of the moment that it changes."""
  steps, size = 1500, 256
  options = common.optim(name)
  options.clip_norm = None
  decay = "decay" if name == "rmsprop" else "b2"
  options[decay] = 0.999
  found = {}
  for kept in ("float32", "bfloat16"):
    options.moments = kept
    tx, params = optim.make(options, 10).tx, {"kernel": jnp.ones(size)}

    def body(state, i, tx=tx, params=params):
      # Gradients of 1, then of 0.1: the second moment must come down again.
      noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), size)
      g = jnp.where(i < steps // 3, 1.0, 0.1) * noise
      updates, state = tx.update({"kernel": g}, state, params)
      return state, updates["kernel"]

    state = jax.jit(tx.init)(params)
    state, updates = jax.lax.scan(body, state, jnp.arange(steps))
    found[kept] = state, updates
  moments = {
    k: [x for x in jax.tree.leaves(v[0]) if x.size == size]
    for k, v in found.items()
  }
  assert all(x.dtype == jnp.bfloat16 for x in moments["bfloat16"])
  got, want = (
    np.asarray(moments[k][-1], np.float32) for k in ("bfloat16", "float32")
  )
  # Each is off by its own roundings, of 2⁻⁸ at most; their mean is not off.
  assert np.std(got / want) < 0.15
  np.testing.assert_allclose(got.mean(), want.mean(), rtol=0.01)
  lost = np.asarray(1.0, jnp.bfloat16)
  for _ in range(steps):  # rounded to the nearest, it would never come down
    lost = (np.float32(0.999) * lost.astype(np.float32)).astype(jnp.bfloat16)
  assert lost > 0.99
  assert want.mean() < 0.5


OPTIMISERS = {
  "adamw": {"weight_decay": 0.1, "moments": "float32"},
  "adamw-bf16": {"moments": "bfloat16"},
  "rmsprop": {},
}


def taken(name, still, parts):
  """(parameters, state) after updates of a policy and a head.

  Args:
    still: for each update, whether the policy keeps still.
    parts: whether the optimiser knows that it may.
  """
  options = common.optim(name.split("-")[0])
  options.update({**OPTIMISERS[name], "clip_norm": 0.5})
  rests = (lambda path: path.startswith("model/")) if parts else None
  tx = optim.make(options, 10, rests).tx
  params = {"model": {"kernel": jnp.ones((2, 3))}, "head": jnp.ones(4)}
  state = tx.init(params)
  for i, now in enumerate(still):
    grads = jax.tree.map(
      lambda x, i=i: jnp.cos(i + jnp.cumsum(x, axis=-1)), params
    )
    updates, state = tx.update(grads, state, params, still=jnp.bool_(now))
    params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
  return params, state


same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_keeps_still_learns_later_as_it_would_have_at_first(name):
  """Neither it, nor its moments and their count see the updates before."""
  start, fresh = taken(name, (), parts=True)
  params, state = taken(name, (True,) * 3, parts=True)
  same(params["model"], start["model"])
  same(state[1].resting, fresh[1].resting)
  assert np.all(params["head"] != start["head"])
  later, _ = taken(name, (True, True, True, False), parts=True)
  moved = np.abs(later["model"]["kernel"] - start["model"]["kernel"])
  assert np.all(moved > 0)
  if name.startswith("adamw"):  # the first update of Adam is a sign
    decay = 0.1 * OPTIMISERS[name].get("weight_decay", 0)
    assert np.all(np.abs(moved - 0.1) <= decay + 1e-3)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_never_rests_learns_in_the_same_bits(name):
  """An optimiser without parts has no ear for what keeps still."""
  whole, state = taken(name, (False,) * 4, parts=False)
  same((whole, state), taken(name, (True,) * 4, parts=False))
  apart, _ = taken(name, (False,) * 4, parts=True)
  # Two programs of the same f32; moments in bf16 are rounded by other bits.
  rtol = 0.02 if name == "adamw-bf16" else 1e-6
  close = functools.partial(np.testing.assert_allclose, rtol=rtol)
  jax.tree.map(close, apart, whole)


def test_adamw_decays_matrices_only():
  options = common.optim("adamw")
  options.update({"weight_decay": 0.1, "clip_norm": None, "warmup": 0})
  optimizer = optim.make(options, 10)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.tx.update(zeros, optimizer.tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], 0.1, rtol=1e-6)
  np.testing.assert_array_equal(updates["bias"], 0.0)


def test_schedules_warm_up_and_decay():
  options = common.optim("sgd")
  options.warmup, options.schedule = 3, "linear"
  factor = optim.make(options, 13).factor
  values = [float(factor(s)) for s in range(14)]
  np.testing.assert_allclose(values[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(values[8], 0.5, rtol=1e-6)
  assert values[13] == 0
  options.schedule = "cosine"
  factor = optim.make(options, 13).factor
  for s in range(3, 14):
    want = 0.5 * (1 + np.cos(np.pi * (s - 3) / 10))
    np.testing.assert_allclose(factor(s), want, atol=1e-6)
  options.schedule = "constant"
  assert float(optim.make(options, 13).factor(12)) == 1.0


def test_the_first_step_takes_the_first_factor_of_the_schedule():
  step, state, hparams = shared("sgd", warmup=3, clip_norm=0.01)
  for want in (0.25, 0.5, 0.75, 1.0, 1.0):
    state, metrics = step(state, hparams)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 * want, rtol=1e-6)


def test_frozen_paths_do_not_move_and_have_no_optimizer_state():
  freeze = ("embed/", "norm")
  step, state, hparams = make("rmsprop", freeze=freeze)
  new, _ = jax.jit(step)(state, BATCH, hparams)
  for (path, a), (_, b) in zip(
    tree.named(state.params), tree.named(new.params), strict=True
  ):
    same = bool(jnp.all(a == b))
    assert same == tree.matches(freeze, path), path
  paths = [path for path, _ in tree.named(state.opt_state)]
  assert paths
  assert not [path for path in paths if tree.matches(freeze, path)]


def counts(state):
  return {name: int(x) for name, x in state.skipped.items()}


def test_a_non_finite_update_changes_nothing_but_its_count():
  step, state, hparams = shared("rmsprop")
  state, _ = step(state, hparams)
  bad, metrics = step(state, {**hparams, "beta": jnp.float32(jnp.nan)})
  jax.tree.map(np.testing.assert_array_equal, bad.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, bad.opt_state, state.opt_state)
  assert counts(bad) == {"row": 1, "longest": 1, "total": 1}
  assert metrics["skipped"] == 1
  assert int(bad.step) == int(state.step) + 1
  good, _ = step(bad, hparams)
  assert counts(good) == {"row": 0, "longest": 1, "total": 1}
  # Finite gradients, but an update that is not.
  huge, _ = step(state, {**hparams, "learning_rate": jnp.float32("inf")})
  jax.tree.map(np.testing.assert_array_equal, huge.params, state.params)
  assert counts(huge) == {"row": 1, "longest": 1, "total": 1}


def test_gradients_are_clipped_by_their_global_norm():
  step, state, hparams = shared("sgd", warmup=3, clip_norm=0.01)
  new, metrics = step(state, hparams)
  moved = jax.tree.map(jnp.subtract, new.params, state.params)
  assert metrics["grad_norm"] > 0.1
  # The first quarter of the warm-up. Differences of parameters of order 1 lose
  # digits of updates of order 1e-5.
  np.testing.assert_allclose(tree.norm(moved), 1e-2 * 0.01 / 4, rtol=0.05)


def follower(algorithm):
  """The algorithm, which keeps the sum of its losses and counts its updates."""

  def update(extra, params, step, metrics):
    del params, step
    loss, count = extra["losses"], extra["updates"]
    return {**extra, "losses": loss + metrics["loss"], "updates": count + 1}

  def extra(params):
    own = algorithm.extra(params)
    return {**own, "losses": jnp.float32(0), "updates": jnp.int32(0)}

  return algorithm._replace(extra=extra, update=update)


# Accumulation and mode.
HOW = {"plain": (1, "jit"), "accumulation": (2, "jit"), "pmap": (1, "pmap")}


def running(algorithm, how):
  """(step of a batch, first state, hparams) on two devices, in one of HOW."""
  accumulation, mode = HOW[how]
  mesh = mesh_lib.of_devices(jax.devices()[:2])
  _, params = worlds.model("llama")
  optimizer = topology.recording_sgd()
  step = step_lib.make(
    algorithm,
    optimizer,
    accumulation=accumulation,
    axis_name=run_lib.axis_name(mode),
  )
  state = state_lib.create(
    params, optimizer, {"ref": params}, algorithm.extra(params)
  )
  compiled = run_lib.evaluator(step, mesh, mode)
  batch = worlds.batch(worlds.examples(8), packed=False, row_multiple=4)
  batch = run_lib.place_batch(batch, mesh, mode)
  _, _, hparams = make()
  return (
    (lambda state, hparams: compiled(state, batch, hparams)),
    state,
    hparams,
  )


def dpo():
  model, _ = worlds.model("llama")
  return preference.make(topology.config_of(), model.apply)


@pytest.mark.parametrize("how", HOW)
def test_what_an_algorithm_keeps_follows_updates_and_not_those_refused(how):
  """It sees the metrics of the whole batch, whatever this is cut into."""
  step, state, hparams = running(follower(dpo()), how)
  once, first = step(state, hparams)
  assert first["loss"] == once.extra["losses"]
  np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
  bad, metrics = step(once, {**hparams, "beta": jnp.float32(jnp.nan)})
  assert np.isnan(metrics["loss"])
  assert (int(bad.step), counts(bad)["row"]) == (2, 1)
  assert int(bad.extra["updates"]) == 1
  assert bad.extra["losses"] == once.extra["losses"]
  twice, second = step(bad, hparams)
  assert int(twice.extra["updates"]) == 2
  want = float(first["loss"]) + float(second["loss"])
  np.testing.assert_allclose(twice.extra["losses"], want, rtol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_what_is_kept_of_a_part_of_the_batch_is_refused(how):
  """Before anything is computed: that of other parts would be lost."""
  whole = dpo()

  def combine(*args):
    return whole.combine(*args)._replace(kept={"mine": jnp.float32(1)})

  step, state, hparams = running(whole._replace(combine=combine), how)
  with pytest.raises(ValueError, match=r"keeps \['mine'\].*batch_level = True"):
    step(state, hparams)


@pytest.mark.parametrize(
  ("field", "value"), [("beta", 0.0), ("beta", -1.0), ("label_smoothing", 0.5)]
)
def test_hyper_parameters_out_of_range_are_refused(field, value):
  config = topology.config_of()
  config.loss[field] = value
  with pytest.raises(ValueError, match=f"loss.{field}"):
    preference.make(config, lambda params, batch: None)


def test_an_optimizer_field_without_effect_is_refused():
  options = common.optim("rmsprop")
  options.weight_decay = 0.1
  with pytest.raises(ValueError, match="weight_decay"):
    optim.make(options, 10)
