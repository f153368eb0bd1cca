"""Minimisers in float64, of one small function a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize


def minimise(f, start, *data, steps=60):
  """Newton's method with backtracking, for each prompt apart.

  Directions without curvature (the shift of all logits) are left alone, those
  of negative curvature are walked down.

  Args:
    f: (z f64[K], *data of a prompt) -> f64 scalar.
    start: z f64[X, K].
    *data: trees of f64[X, …].
  Returns: (z, f(z)).
  """
  with jax.enable_x64(True):

    def local(z, *data):
      def slope(z):
        value, gradient = jax.value_and_grad(f)(z, *data)
        return gradient, (value, gradient)

      hessian, first = jax.jacfwd(slope, has_aux=True)(z)
      return *first, hessian

    compiled = jax.jit(jax.vmap(local))

    def at(z):
      return tuple(map(np.asarray, compiled(z, *data)))

    z = np.asarray(start)
    value, gradient, hessian = at(z)
    for _ in range(steps):
      move, slope = _newton(gradient, hessian)
      z, new, gradient, hessian = _line_search(at, z, value, move, slope)
      still = np.all(new >= value - 1e-16) and np.abs(move).max() < 1e-13
      value = new
      if still:
        break
  return z, value


def _newton(gradient, hessian):
  """(move f64[X, K], slope along it f64[X]): downhill along every axis."""
  curvature, axes = np.linalg.eigh(hessian)
  size = np.abs(curvature)
  flat = size < 1e-13 * size.max(-1, keepdims=True)
  along = np.einsum("xij,xi->xj", axes, gradient)
  move = np.where(flat, 0.0, -along / np.where(flat, 1.0, size))
  return np.einsum("xij,xj->xi", axes, move), np.sum(move * along, axis=-1)


def _line_search(at, z, value, move, slope):
  """z and `at` of it, after the longest of the steps 1, ½, ¼, … downhill."""
  length = np.ones(len(z))
  rounding = 1e-15 * np.abs(value)
  for _ in range(40):
    there = z + length[:, None] * move
    found = at(there)
    good = found[0] <= value + 1e-4 * length * slope + rounding
    if good.all():
      return there, *found
    length = np.where(good, length, length / 2)
  there = np.where(good[:, None], there, z)
  return there, *at(there)


def search(f, *data, widest=50.0):
  """The best margin z_0 − z_1 of two answers: f64[X], for losses with kinks.

  Args: as of `objective`'s data.
  """
  best = []
  with jax.enable_x64(True):
    value_of = jax.jit(lambda m, *row: f(jnp.array([m, 0.0]), *row))
    for x in range(len(data[0].ref)):
      row = jax.tree.map(lambda v, x=x: v[x], data)
      found = scipy.optimize.minimize_scalar(
        lambda m, row=row: float(value_of(m, *row)),
        bounds=(-widest, widest),
        method="bounded",
        options={"xatol": 1e-10},
      )
      best.append(found.x)
  return np.array(best)
