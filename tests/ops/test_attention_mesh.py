"""Attention inside the model, over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict

from dpo_jax import tree
from dpo_jax.algos import base
from dpo_jax.models import axes
from dpo_jax.ops import attention, reduce
from dpo_jax.ops.attention import blockwise, cudnn, splash
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run
from tests import worlds

ITEMS = worlds.examples(8, seed=6, completions=4)
MESH = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
KERNELS = {
  "blockwise": functools.partial(blockwise.blockwise, block=8),
  "cudnn": functools.partial(cudnn.cudnn, implementation="xla"),
  "splash": functools.partial(splash.splash, interpret=True),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_is_split_over_rows_and_heads(kernel):
  """Eight devices give what one does, and none sees another's part."""
  items = worlds.examples(4, seed=6)
  batch = worlds.batch(items, shared=kernel != "splash", row_multiple=4)
  layout = attention.Layout(*(batch[n] for n in attention.Layout._fields))
  keys = jax.random.split(jax.random.key(0), 3)
  rows = batch["tokens"].shape
  q = jax.random.normal(keys[0], (*rows, 4, 8))
  k, v = (jax.random.normal(key, (*rows, 2, 8)) for key in keys[1:])
  real = (layout.segment_ids > 0)[..., None, None]

  def total(fn, q, k, v, layout):
    out = fn(q, k, v, layout, window=None, scale=0.3)
    return jnp.sum(jnp.where(real, jnp.sin(out), 0.0))

  def grad(fn):
    return jax.grad(functools.partial(total, fn), argnums=(0, 1, 2))

  want = jax.jit(grad(attention.ATTENTION["xla"]))(q, k, v, layout)
  mesh = mesh_lib.make(config_dict.ConfigDict(MESH))
  heads = NamedSharding(mesh, P(reduce.ROWS, None, reduce.TENSOR, None))
  placed = jax.device_put((q, k, v), heads)
  placed += (jax.device_put(layout, NamedSharding(mesh, P(reduce.ROWS))),)
  with jax.set_mesh(mesh):
    compiled = jax.jit(grad(KERNELS[kernel])).lower(*placed).compile()
  for collective in ("all-gather", "all-reduce", "collective-permute"):
    assert collective not in compiled.as_text()
  for a, b in zip(compiled(*placed), want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kernel", "name", "shared"),
  [
    ("blockwise", "window", True),
    ("cudnn", "llama", True),
    ("splash", "window", False),
  ],
)
def test_the_model_over_eight_devices_equals_one(
  monkeypatch, kernel, name, shared
):
  monkeypatch.setitem(attention.ATTENTION, "here", KERNELS[kernel])
  batch = worlds.batch(ITEMS, shared=shared, row_multiple=4, extra=3)

  def total(model):
    def fn(params, batch):
      logps = base.token_logps(model.apply, params, batch)
      return jnp.sum(jnp.sin(logps))

    return jax.value_and_grad(fn)

  dense, params = worlds.model(name, attention="xla")
  want = jax.jit(total(dense))(params, batch)
  model, _ = worlds.model(name, attention="here")
  mesh = mesh_lib.make(config_dict.ConfigDict(MESH))
  placed = run.place(params, mesh_lib.shardings(mesh, params, axes.spec))
  compiled = run.forward(total(model), mesh)
  got = compiled(placed, run.place_batch(batch, mesh, "jit"))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  pairs = zip(tree.named(got[1]), tree.named(want[1]), strict=True)
  for (path, a), (_, b) in pairs:
    # f32 sums in another order.
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), path
