"""Settings, random arguments and derivatives for the tests of losses."""

import functools
import inspect
import itertools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.algos import needs
from dpo_jax.ops import losses
from dpo_jax.ops.losses import divergences
from tests.ops import oracles


class Case(NamedTuple):
  """A loss, its fields, and the divergence it is of."""

  name: str
  fields: dict
  divergence: str = "reverse_kl"

  def __str__(self):
    values = "-".join(f"{k}={v}" for k, v in self.fields.items())
    return f"{self.name}-{self.divergence}-{values}"


def of(name, divergence="reverse_kl", **fields):
  """A case with its paper's fields, but for those named."""
  fields = {**losses.LOSSES[name].defaults, **fields}
  return Case(name, fields, divergence)


def grid(**fields):
  """Every combination of the values of each field."""
  values = itertools.product(*fields.values())
  return [dict(zip(fields, value, strict=True)) for value in values]


TWO = ("paper", "trl_1")
FIELDS = {
  "dpo": grid(beta=(0.1, 1.0), label_smoothing=(0.0, 0.2)),
  "robust": grid(beta=(0.1, 1.0), label_smoothing=(0.0, 0.1, 0.4)),
  "ipo": grid(beta=(0.1, 0.7), dialect=("paper", "original")),
  "hinge": grid(beta=(0.05, 0.5)),
  "exo": grid(beta=(0.1, 1.0), label_smoothing=(1e-3, 0.3)),
  "discopop": grid(beta=(0.05, 0.5), temperature=(0.05, 1.0)),
  "chi_po": grid(beta=(0.05, 0.5)),
  "ln_dpo": grid(beta=(0.5, 5.0)),
  "dpop": grid(beta=(0.05, 0.3), penalty=(0.0, 5.0)),
  "r_dpo": grid(beta=(0.1, 1.0), alpha=(0.0, 0.3)),
  "odpo": grid(beta=(0.1, 0.7), alpha=(0.5, 1.0)),
  "tdpo1": grid(beta=(0.1, 1.0)),
  "tdpo2": grid(beta=(0.1, 1.0), alpha=(0.0, 0.5)),
  "sampo": grid(beta=(0.1, 1.0)),
  "ld_dpo": grid(beta=(0.1, 1.0), alpha=(0.0, 0.5, 1.0)),
  "wpo": grid(beta=(0.01, 0.5), dialect=TWO),
  "nca": grid(beta=(0.01, 0.5)),
  "sppo": grid(beta=(0.001, 0.5)),
  "apo_zero": grid(beta=(0.1, 1.0)),
  "apo_down": grid(beta=(0.1, 1.0)),
  "cal_dpo": grid(beta=(0.002, 0.5)),
  "bco": grid(beta=(0.01, 0.5), dialect=TWO),
  "aot": grid(beta=(0.01, 0.5), label_smoothing=(0.0, 0.2)),
  "aot_unpaired": grid(beta=(0.01, 0.5), label_smoothing=(0.0, 0.2)),
  "kto_pair": grid(beta=(0.1, 0.5)),
  "kto": grid(
    beta=(0.1, 0.5), desirable_weight=(1.0, 1.3), undesirable_weight=(0.7,)
  ),
  "bco_unpaired": grid(beta=(0.01, 0.5)),
  "plackett_luce": grid(beta=(0.1, 1.0)),
  "sft": [{}],
  "nll": [{}],
  "unlikelihood": grid(alpha=(0.0, 0.5)),
  "slic": grid(delta=(0.2, 10.0), nll_weight=(0.0, 0.1)),
  "simpo": grid(beta=(2.0, 10.0), gamma=(0.0, 1.0)),
  "alphapo": grid(
    beta=(2.5,), gamma=(0.1,), alpha=(-0.25, 0.0, 1e-6, 1e-3, 0.25)
  ),
  "orpo": grid(odds_weight=(0.1, 1.0)),
  "cpo": grid(beta=(0.1,), alpha=(0.0, 1.0), dialect=TWO),
  "bradley_terry": grid(label_smoothing=(0.0, 0.2), centring=(0.0, 0.01)),
  "bradley_terry_margin": grid(alpha=(0.0, 1.0), centring=(0.0, 0.01)),
  "plackett_luce_reward": grid(centring=(0.0, 0.01)),
}
DIVERGENCES = [
  ("forward_kl", {}),
  ("js", {}),
  *(("alpha", {"divergence_alpha": a}) for a in (0.0, 1.0, 1.5, 0.5)),
]
CASES = [Case(name, f) for name, fields in FIELDS.items() for f in fields] + [
  of(name, divergence, **extra)
  for name, loss in losses.LOSSES.items()
  if loss.of_h
  for divergence, extra in DIVERGENCES
]
# One of each loss and dialect, and DPO of each divergence: no grid of fields.
FEW = list(
  {
    (case.name, case.fields.get("dialect"), case.divergence): case
    for case in CASES
    if case.divergence == "reverse_kl" or case.name == "dpo"
  }.values()
)


def numeric(case):
  """The fields that are traced."""
  return {k: v for k, v in case.fields.items() if not isinstance(v, str)}


def arguments(case):
  """Names of the arrays that the loss of a case takes."""
  loss = losses.LOSSES[case.name]
  first = ("policy_logps", "ref_logps", "rewards")
  taken = inspect.signature(loss.fn).parameters
  return (*(name for name in first if name in taken), *loss.needs)


def moving(case):
  """The arguments through which the loss is differentiated."""
  wanted = (*needs.MOVING, "rewards")
  return [name for name in arguments(case) if name in wanted]


def width(case):
  """Completions of a comparison."""
  data = losses.LOSSES[case.name].compares
  return {"rankings": 4, "labels": 1}.get(data, 2)


def values_of(case, seed, spread=3.0):
  """Random arguments, of 2 rows of 3 comparisons, in float64.

  The numbers are bf16's, so that no cast rounds them.

  Args:
    spread: of log π − log π_ref in nats.
  """
  rng = np.random.default_rng(seed)
  shape = (2, 3)
  logps = (*shape, width(case))
  lengths = rng.integers(2, 20, logps).astype(float)
  policy = -lengths * rng.uniform(0.3, 2.0, logps)
  # Mostly below the policy: means of Δ above 0, so that KTO's z moves.
  ref = policy - rng.normal(spread / 3, spread, logps)
  low, part = rng.normal(size=shape), rng.uniform(0.3, 0.9, logps)
  weights, present = np.ones(shape), np.ones(logps, bool)
  if losses.LOSSES[case.name].batch_level:
    weights[0, 1] = 0.0
    weights[1, 2] = 1.0 if case.name.startswith("aot") else 0.5
  present[0, 0, 3:] = present[1, 1, 2:] = False
  values = {
    "policy_logps": policy,
    "ref_logps": ref,
    "rewards": rng.normal(0.0, spread, logps),
    "lengths": lengths,
    "scores": np.stack([low + rng.uniform(0.2, 3.0, shape), low], axis=-1),
    "prefix_logps": part * policy,
    "ref_prefix_logps": part * ref,
    "common_logps": part * policy,
    "ref_common_logps": part * ref,
    "sum_sq_probs": -lengths * rng.uniform(0.5, 2.0, logps),
    "sequence_kl": rng.uniform(0.1, 5.0, logps),
    "labels": np.float64([[1, 0, 1], [0, 1, 0]]),
    "weights": weights,
    "present": present,
    "running": {"mean": np.float64(0.25), "count": np.float64(2.0)},
  }
  return jax.tree.map(as_bf16, {k: values[k] for k in arguments(case)})


def extremes_of(case):
  """Arguments at the ends of what a run may meet, in float64.

  Δ from −1e4 to 1e4, probabilities of 1, one token or 1e4, and padding. Five
  batches of the shape of `values_of`, so that one program serves both: of
  padding and of five comparisons, in which either side meets every end.
  """
  ends = np.array((0.0, 1e4, -1e4, 50.0, -50.0))
  first = np.tile(np.arange(5), 5)
  delta = ends[np.stack([first, (first + np.repeat(np.arange(5), 5)) % 5], -1)]
  delta = np.concatenate([delta, delta[::-1]], axis=-1)[:, : width(case)]
  # Apart by more than what differences move: no ties among what is sorted.
  delta -= 0.25 * np.arange(delta.size).reshape(delta.shape)
  lengths = np.where(np.arange(delta.size) % 3, 1.0, 1e4).reshape(delta.shape)
  policy, ref = np.minimum(delta, 0.0), np.minimum(-delta, 0.0)
  gap, count = np.geomspace(1e-4, 1e4, len(delta)), np.arange(len(delta))
  values = {
    "policy_logps": policy,
    "ref_logps": ref,
    "rewards": delta,
    "lengths": lengths,
    "scores": np.stack([gap, np.zeros_like(gap)], axis=-1),
    "prefix_logps": policy / 2,
    "ref_prefix_logps": ref,
    "common_logps": policy,
    "ref_common_logps": ref / 2,
    # π(y)² ≤ Σ_v π(v)², and a vocabulary of e^10.
    "sum_sq_probs": np.maximum(1.5 * policy, -10 * lengths),
    "sequence_kl": np.abs(delta[:, ::-1]),
    "labels": (count % 2).astype(float),
    "weights": np.ones_like(gap),
    "present": np.ones(delta.shape, bool),
  }

  def batch(part):
    def of(value):
      real = value.reshape(5, 5, *value.shape[1:])[part]
      padded = np.concatenate([np.zeros_like(real[:1]), real])
      return padded.reshape(2, 3, *real.shape[1:])

    every = {name: of(value) for name, value in values.items()}
    every["running"] = {"mean": np.float64(0.0), "count": np.float64(0.0)}
    return {name: every[name] for name in arguments(case)}

  return [batch(part) for part in range(5)]


def as_bf16(x):
  """The nearest bf16 numbers, in the dtype of x."""
  return x.astype(jnp.bfloat16).astype(x.dtype)


def cast(values, dtype):
  """JAX's arrays of `dtype`; masks stay masks."""
  return jax.tree.map(
    lambda x: jnp.asarray(x, bool if x.dtype == bool else dtype), values
  )


def out_of(case, values, fields=None):
  """What the loss returns; `fields` in place of the case's."""
  fn = losses.LOSSES[case.name].fn
  if case.divergence != "reverse_kl":
    fn = divergences.under(case.divergence, fn)
  values, fields = dict(values), {**case.fields, **(fields or {})}
  names = ("policy_logps", "ref_logps", "rewards")
  head = [values.pop(name) for name in names if name in values]
  return fn(*head, **values, **fields)


def loss_of(case, values, fields=None):
  """(losses, factors): a loss may bring its factor of the weight."""
  loss = out_of(case, values, fields)["loss"]
  return loss if isinstance(loss, tuple) else (loss, jnp.ones_like(loss))


def space_of(case, values):
  """Arguments and fields as attributes, which the oracles read."""
  fields = {**case.fields, "divergence": case.divergence}
  return types.SimpleNamespace(**values, **fields)


def oracle_of(case, values, held=None):
  """The same of the oracle; `held` for its statistics without gradient."""
  held = values if held is None else held
  oracle = getattr(oracles, case.name)
  loss = oracle(space_of(case, values), space_of(case, held))
  return loss if isinstance(loss, tuple) else (loss, np.ones_like(loss))


def pull(case, values):
  """Random weights for a sum of the losses; 0 where there is no comparison."""
  shape = values[arguments(case)[0]].shape[:-1]
  rng = np.random.default_rng(7)
  signs = rng.choice([-1.0, 1.0], shape)
  real = values["weights"] > 0 if "weights" in values else 1.0
  return as_bf16(signs * rng.uniform(0.5, 2.0, shape)) * real


def value_and_gradients(case, values, scale, dtype):
  """(losses, factors), and autodiff of Σ scale · loss by every float array.

  Args:
    dtype: of the arrays, in which all is computed.
  Returns: the two as numpy arrays.
  """
  numbers = numeric(case)
  texts = tuple(case.fields.items() - numbers.items())
  program = compiled(case.name, case.divergence, texts)
  with jax.enable_x64(dtype == "float64"):
    masks = {k: v for k, v in values.items() if k == "present"}
    floats = {k: v for k, v in values.items() if k not in masks}
    floats, scale = jax.tree.map(lambda x: x.astype(dtype), (floats, scale))
    out = program(floats, masks, numbers, scale)
    return jax.tree.map(np.asarray, out)


@functools.cache
def compiled(name, divergence, texts):
  """The program of `value_and_gradients`, for all numbers of the fields.

  JAX keeps one of it for each dtype and shape.
  """
  case = Case(name, dict(texts), divergence)

  @jax.jit
  def program(floats, masks, fields, scale):
    def total(floats):
      loss, factor = loss_of(case, {**floats, **masks}, fields)
      return jnp.sum(loss * scale), (loss, factor)

    gradients, out = jax.grad(total, has_aux=True)(floats)
    return out, gradients

  return program


def slope_of(case, values, name, scale, frozen=True):
  """Differences of the oracle by one argument, exact to step⁴.

  Args:
    frozen: whether the statistics without gradient stay as they were.
  """
  slopes, step = np.zeros(values[name].shape), 2e-4
  # Comparisons that nothing couples move at once: each cost is of its own.
  coupled = losses.LOSSES[case.name].batch_level
  places = slopes.shape if coupled else slopes.shape[-1:]
  for place in np.ndindex(places):
    at, change = place if coupled else (..., *place), 0.0
    for move, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
      moved = values[name].copy()
      moved[at] += move * step
      moved = {**values, name: moved}
      loss, _ = oracle_of(case, moved, values if frozen else moved)
      change = change + weight * loss
    slope = scale * change / (12 * step)
    slopes[at] = np.sum(slope) if coupled else slope
  return slopes
