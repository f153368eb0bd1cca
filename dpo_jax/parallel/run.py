"""Runs one step body over devices: jit over a mesh, or pmap.

The only file that names jit or pmap of a step. Both take and return global
arrays without a device axis, so both share one checkpoint layout.
"""

import collections
import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.ops import reduce

PMAP_AXIS = "data"
MODES = ("jit", "pmap")
# Steps that may be under way when the next is started, at most: what came of
# those before them is there, on every kind of device and in every process.
AHEAD = 2
_TO_FREE = 1e-3  # seconds in which XLA's CPU backend has freed a step's memory


def axis_name(mode):
  """The axis a step sums over by hand: pmap's, or None under jit."""
  return PMAP_AXIS if mode == "pmap" else None


def parallelize(step, mesh, mode, state):
  """Compiles `step(state, batch, hparams) -> (state, metrics)`.

  Args:
    step: the step body, built with `axis_name(mode)`.
    mesh: the mesh; its data axis is all there is under pmap.
    mode: "jit" or "pmap".
    state: the placed state, for its shardings. Every call donates it, but for
      its frozen part, which goes in and does not come out.
  Returns: function of (state, batch placed by `place_batch`, hparams).
  """

  def moving_step(moving, frozen, batch, hparams):
    state, metrics = step(moving.replace(frozen=frozen), batch, hparams)
    return state.replace(frozen={}), metrics

  moving = state.replace(frozen={})
  shardings = jax.tree.map(lambda x: x.sharding, moving)
  out, in_axes = (shardings, _everywhere(mesh)), (None, None, 0, None)
  compiled = _compiled(moving_step, mesh, mode, in_axes, out, donate=0)
  started = _Started(mesh)

  def call(state, batch, hparams):
    moving, frozen = state.replace(frozen={}), state.frozen
    state, metrics = compiled(moving, frozen, batch, hparams)
    started.add(metrics)
    return state.replace(frozen=frozen), metrics

  if mode == "jit":
    call.compiled = compiled.compiled
  return call


class _Started:
  """Keeps the host from starting many steps before the first of them is done.

  A step takes its memory when it is started. An accelerator has work while two
  wait; on a CPU, which is the host itself, they would only hold memory. There
  XLA frees a step's temporary memory a moment after its results are ready: a
  step started in that moment would take as much again, and the heap keeps it.
  """

  def __init__(self, mesh):
    self._cpu = mesh.devices.flat[0].platform == "cpu"
    self._ahead = 0 if self._cpu else AHEAD
    self._results = collections.deque()

  def add(self, results):
    """Waits until at most so many steps are under way, the new one too."""
    self._results.append(results)
    began = time.perf_counter()
    while len(self._results) > self._ahead:
      jax.block_until_ready(self._results.popleft())
    if self._cpu:
      waited = time.perf_counter() - began
      time.sleep(min(_TO_FREE, waited / 50))


def evaluator(fn, mesh, mode):
  """Compiles `fn(state, batch, hparams) -> sums` without donating."""
  compiled = _compiled(fn, mesh, mode, (None, 0, None), _everywhere(mesh))
  started = _Started(mesh)

  def call(state, batch, hparams):
    sums = compiled(state, batch, hparams)
    started.add(sums)
    return sums

  return call


def forward(fn, mesh):
  """Compiles fn(*trees, batch) over a mesh; each process gets all results."""
  return _compiled(fn, mesh, "jit", None, _everywhere(mesh))


def _everywhere(mesh):
  return NamedSharding(mesh, P())


def _compiled(fn, mesh, mode, in_axes, out_shardings, donate=()):
  """`fn` over the mesh; `in_axes` are pmap's, `out_shardings` jit's."""
  if mode == "pmap":
    # No device axis on the state, in or out: one checkpoint layout for both.
    return jax.pmap(
      fn,
      axis_name=PMAP_AXIS,
      in_axes=in_axes,
      out_axes=None,
      devices=list(mesh.devices.flat),
      donate_argnums=donate,
    )
  compiled = jax.jit(fn, donate_argnums=donate, out_shardings=out_shardings)

  def call(*args):
    with jax.set_mesh(mesh):
      return compiled(*args)

  call.compiled = compiled
  return call


def place(values, shardings):
  """Puts a tree on the mesh as copies that may be donated."""
  values = jax.device_put(values, shardings)  # from whatever devices
  copy = functools.partial(jax.tree.map, jnp.copy)
  return jax.jit(copy, out_shardings=shardings)(values)


def jitted(fn, like):
  """`fn` compiled so that its result is born sharded as a tree of arrays is."""
  return jax.jit(fn, out_shardings=jax.tree.map(lambda x: x.sharding, like))


def place_batch(batch, mesh, mode):
  """This process's rows (numpy) as global arrays, ready for the step.

  Under pmap a leading device axis is added: [R, …] -> [devices, R/devices, …].
  """
  if mode == "pmap":
    devices = mesh.local_mesh.devices.size
    batch = jax.tree.map(
      lambda x: x.reshape(devices, len(x) // devices, *x.shape[1:]), batch
    )
    spec = P(mesh.axis_names)
  else:
    spec = P(reduce.ROWS)
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
