"""One batch, one gradient: whatever the layout, the devices, the cut.

The truth is the plainest computation there is: one device, every example in
its own row, the prompt repeated for every completion, dense attention, all
logits at once. Everything else must give its loss, metrics and gradient.

The fast tier runs one program of each model with everything on, and one under
pmap of the model that has most; the slow tier runs every setting alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

from configs import base as base_config
from configs import common, losses
from dpo_jax import tree
from dpo_jax.algos import preference, sft
from dpo_jax.models import axes
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run
from dpo_jax.train import optim
from dpo_jax.train import state as state_lib
from dpo_jax.train import step as step_lib
from tests import worlds

ITEMS = worlds.examples(16, seed=1, completions=4)
HPARAMS = {
  name: jnp.float32(value)
  for name, value in {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "learning_rate": 0.1,
  }.items()
}


def config_of(algo="preference", loss="dpo"):
  config = base_config.get_config()
  config.algo, config.loss = algo, losses.loss(loss)
  config.ref = "frozen" if losses.needs_reference(loss) else "none"
  return config


def recording_sgd():
  """SGD whose state is the gradient it was given."""
  record = optax.GradientTransformation(
    lambda params: params, lambda grads, _, params=None: (grads, grads)
  )
  record = optax.with_extra_args_support(record)
  return optim.Optimizer(record, lambda step: 1.0, lambda path: True, None)


def make_state(params, extra=None):
  frozen = {"ref": worlds.noisy(params, 7, 0.05)}
  return state_lib.create(params, recording_sgd(), frozen, extra or {})


def gradient_and_step(algorithm, accumulation, axis_name):
  """f(state, batch, hparams) -> (gradient, metrics, params after one step)."""
  step = step_lib.make(
    algorithm, recording_sgd(), accumulation=accumulation, axis_name=axis_name
  )

  def fn(state, batch, hparams):
    state, metrics = step(state, batch, hparams)
    return state.opt_state, metrics, state.params

  return fn


def compute(name, *, attention="tiled", chunk=None, **how):
  """`compute_of` one of worlds.MODELS."""
  model, params = worlds.model(name, attention=attention, head_chunk=chunk)
  return compute_of(model.apply, params, **how)


def compute_of(
  apply,
  params,
  *,
  config=None,
  algo=preference,
  accumulation=1,
  mesh=None,
  mode="jit",
  items=ITEMS,
  hparams=HPARAMS,
  **layout,
):
  """Runs gradient_and_step in one topology and layout."""
  algorithm = algo.make(config or config_of(), apply)
  state = make_state(params, algorithm.extra(params))
  batch = worlds.batch(items, **layout)
  fn = gradient_and_step(algorithm, accumulation, run.axis_name(mode))
  if mesh is None:
    return jax.jit(fn)(state, batch, hparams)
  mesh = mesh_lib.make(config_dict.ConfigDict({**mesh, "context": 1}))
  if mode == "jit":
    shardings = mesh_lib.shardings(mesh, state, axes.spec)
    state = run.place(state, shardings)
  batch = run.place_batch(batch, mesh, mode)
  return run.evaluator(fn, mesh, mode)(state, batch, hparams)


@functools.cache
def truth(name, algo="preference"):
  algorithm = {"preference": preference, "sft": sft}[algo]
  loss = {"preference": "dpo", "sft": "sft"}[algo]
  return compute(
    name,
    algo=algorithm,
    config=config_of(algo, loss),
    attention="xla",
    packed=False,
    shared=False,
  )


def assert_equal_up_to_rounding(got, want):
  """Gradients to 1e-5 of each leaf's norm, the rest to f32 rounding."""
  whole = float(tree.norm(want[0]))
  pairs = zip(tree.named(got[0]), tree.named(want[0]), strict=True)
  for (path, a), (_, b) in pairs:
    a, b = np.asarray(a), np.asarray(b)
    size = np.linalg.norm(b)
    if path == "layers/attn/k/bias" and size < 1e-6 * whole:
      # Without RoPE a constant added to all keys cancels in the softmax: the
      # true gradient is 0, and what is left is rounding.
      size = 1e5 * 1e-6 * whole
    assert np.linalg.norm(a - b) <= 1e-5 * size, path
  for key in want[1]:
    np.testing.assert_allclose(got[1][key], want[1][key], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got[1]["loss"], want[1]["loss"], rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


LAYOUTS = {
  "packed, shared": {"extra": 3},
  "packed, shared, chunked head": {"chunk": 7},
  "packed, shared, dense": {"attention": "xla"},
  "packed, repeated": {"shared": False},
  "unpacked, shared": {"packed": False},
  "unpacked, repeated, tiled": {"packed": False, "shared": False},
  "several rows": {"row_multiple": 3, "extra": 5},
  "accumulation": {"row_multiple": 4, "accumulation": 4},
}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ONLY_DATA = {"data": 8, "fsdp": 1, "tensor": 1}
DEVICES = {
  "mesh 2x2x2": {"mesh": MESH, "row_multiple": 4},
  "mesh 2x2x2, chunked head": {
    "mesh": MESH,
    "row_multiple": 4,
    "chunk": 7,
  },
  "mesh 2x2x2, accumulation": {
    "mesh": MESH,
    "row_multiple": 8,
    "accumulation": 2,
  },
  "mesh 2x2x2, unpacked, repeated": {
    "mesh": MESH,
    "packed": False,
    "shared": False,
  },
  "pmap over 8": {"mesh": ONLY_DATA, "mode": "pmap", "row_multiple": 8},
  "pmap over 8, accumulation": {
    "mesh": ONLY_DATA,
    "mode": "pmap",
    "row_multiple": 16,
    "accumulation": 2,
  },
}


# Packed, shared, tiled, padded, in microbatches, the head in chunks.
EVERYTHING = {**DEVICES["mesh 2x2x2, accumulation"], "chunk": 7, "extra": 3}
# And the other side of two switches: prompts repeated, the head whole.
PMAP = {**DEVICES["pmap over 8, accumulation"], "shared": False}


# Of one model under pmap: that splits rows alone, whatever the model is.
@pytest.mark.parametrize(
  ("name", "how"),
  [
    *(
      pytest.param(
        name,
        EVERYTHING,
        id=f"{name}-mesh",
        marks=() if name in ("window", "llama") else pytest.mark.slow,
      )
      for name in worlds.MODELS
    ),
    *(
      pytest.param(
        name,
        PMAP,
        id=f"{name}-pmap",
        marks=pytest.mark.slow,
      )
      for name in worlds.MODELS
    ),
  ],
)
def test_everything_at_once_changes_nothing(name, how):
  assert_equal_up_to_rounding(compute(name, **how), truth(name))


# One by one, of the model that has most for a layout to change: windows by
# position, layers of two kinds, softcaps. The others have everything at once.
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["window", "neox"])
def test_layout_changes_nothing(name, layout):
  assert_equal_up_to_rounding(compute(name, **LAYOUTS[layout]), truth(name))


@pytest.mark.slow
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", ["window", "gpt2"])
def test_devices_change_nothing(name, devices):
  assert_equal_up_to_rounding(compute(name, **DEVICES[devices]), truth(name))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "how",
  [
    EVERYTHING,
    pytest.param(LAYOUTS["accumulation"], marks=SLOW),
    pytest.param(DEVICES["mesh 2x2x2"], marks=SLOW),
    pytest.param(DEVICES["pmap over 8"], marks=SLOW),
  ],
  ids=["everything", "accumulation", "mesh", "pmap"],
)
def test_sft_is_a_mean_over_the_tokens_of_the_global_batch(how):
  got = compute("llama", algo=sft, **{**how, "config": config_of("sft", "sft")})
  assert_equal_up_to_rounding(got, truth("llama", "sft"))


@functools.cache
def plain(dtype="float32"):
  """(gradient_and_step, the same compiled, params, batch), the head chunked."""
  model, params = worlds.model("llama", dtype=dtype, head_chunk=7)
  algorithm = preference.make(config_of(), model.apply)
  fn = gradient_and_step(algorithm, 1, None)
  return fn, jax.jit(fn), params, worlds.batch(ITEMS)


BETAS = jnp.float32([0.05, 0.3, 5.0])
OVER_BETA = {"beta": 0, "label_smoothing": None, "learning_rate": None}


@pytest.mark.slow
def test_vmap_over_beta_equals_one_run_for_each():
  fn, single, params, batch = plain()
  state = make_state(params)
  points = jax.jit(jax.vmap(fn, in_axes=(None, None, OVER_BETA)))(
    state, batch, {**HPARAMS, "beta": BETAS}
  )
  for i, beta in enumerate(BETAS):
    want = single(state, batch, {**HPARAMS, "beta": beta})
    got = jax.tree.map(lambda x, i=i: x[i], points)
    assert_equal_up_to_rounding(got, want)


# The fast tier has whole runs in one program: tests/run/test_together.py.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vmap_over_states_and_beta_equals_one_step_for_each(dtype):
  """Three small models, each with its β, in one program and of one batch."""
  fn, single, params, batch = plain(dtype)
  states = [make_state(worlds.noisy(params, 20 + i, 0.02)) for i in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
  points = jax.jit(jax.vmap(fn, in_axes=(0, None, OVER_BETA)))(
    stacked, batch, {**HPARAMS, "beta": BETAS}
  )
  for i, (state, beta) in enumerate(zip(states, BETAS, strict=True)):
    got = jax.tree.map(lambda x, i=i: x[i], points)
    want = single(state, batch, {**HPARAMS, "beta": beta})
    if dtype == "float32":
      assert_equal_up_to_rounding(got, want)
    else:
      # bf16 activations keep 8 bits; the sums over tokens average them.
      difference = tree.norm(jax.tree.map(jnp.subtract, got[0], want[0]))
      assert difference < 0.02 * tree.norm(want[0])


def test_four_completions_serving_six_pairs_equal_six_separate_pairs():
  apart = []
  for e in ITEMS:
    for w, l, weight in e.pairs:
      two = (e.completions[w], e.completions[l])
      apart.append(e._replace(completions=two, pairs=((0, 1, weight),)))
  assert any(len(e.pairs) == 6 for e in ITEMS)
  _, single, params, batch = plain()
  state = make_state(params)
  got = single(state, batch, HPARAMS)
  want = single(state, worlds.batch(apart), HPARAMS)
  assert_equal_up_to_rounding(got, want)


def test_a_planted_window_by_row_index_fails(monkeypatch):
  """The same comparison, with the bug it is there to catch."""
  from dpo_jax.ops.attention import rule

  right = rule.visible

  def wrong(positions, segment_ids, branch_ids, window):
    rows = jnp.broadcast_to(jnp.arange(positions.shape[-1]), positions.shape)
    return right(rows, segment_ids, branch_ids, window)

  want = truth("window")
  monkeypatch.setattr(rule, "visible", wrong)
  with pytest.raises(AssertionError):
    assert_equal_up_to_rounding(compute("window"), want)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_optimizers_agree_across_devices_given_one_gradient(name):
  """End to end their first step is ±lr·sign(g): noise in g would decide it."""
  model, params = worlds.model("llama")
  del model
  options = common.optim(name)
  options.learning_rate = 1e-2
  optimizer = optim.make(options, 10)
  grads = worlds.noisy(jax.tree.map(jnp.zeros_like, params), 3)

  def three_steps(params, grads):
    opt_state = optimizer.tx.init(params)
    for _ in range(3):
      updates, opt_state = optimizer.tx.update(grads, opt_state, params)
      params = optax.apply_updates(
        params, jax.tree.map(lambda u: -1e-2 * u, updates)
      )
    return params

  want = jax.jit(three_steps)(params, grads)
  mesh = mesh_lib.make(config_dict.ConfigDict({**MESH, "context": 1}))
  shardings = mesh_lib.shardings(mesh, params, axes.spec)
  placed = run.place((params, grads), (shardings, shardings))
  with jax.set_mesh(mesh):
    got = jax.jit(three_steps)(*placed)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # The clip's global norm sums in another order.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
