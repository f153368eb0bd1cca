"""What the compiled 2×2×2 step communicates, read from its HLO."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import config_dict

from dpo_jax.algos import preference
from dpo_jax.models import axes
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run
from dpo_jax.train import step as step_lib
from tests import worlds
from tests.parallel import test_topology as topology

_COLLECTIVE = re.compile(
  r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
  r"|collective-permute)(-start)?\("
)


@functools.cache
def compiled(name, accumulation=1):
  """(compiled step, batch, params) with a chunked head on the mesh."""
  model, params = worlds.model(name, head_chunk=7)
  algorithm = preference.make(topology.config_of(), model.apply)
  options = config_dict.ConfigDict({**topology.MESH, "context": 1})
  mesh = mesh_lib.make(options)
  state = topology.make_state(params)
  state = run.place(state, mesh_lib.shardings(mesh, state, axes.spec))
  # Two rows a device, so that local and global sizes differ everywhere.
  batch = worlds.batch(topology.ITEMS, row_multiple=8 * accumulation)
  step = step_lib.make(
    algorithm,
    topology.recording_sgd(),
    accumulation=accumulation,
    axis_name=None,
  )
  call = run.parallelize(step, mesh, "jit", state)
  placed = run.place_batch(batch, mesh, "jit")
  with jax.set_mesh(mesh):
    moving, frozen = state.replace(frozen={}), state.frozen
    lowered = call.compiled.lower(moving, frozen, placed, topology.HPARAMS)
    return lowered.compile(), batch, params


def collectives(*args):
  """[(kind, [dims, …], op_name, inside a while body)]."""
  text = compiled(*args)[0].as_text()
  bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
  found, computation = [], None
  for line in text.splitlines():
    start = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if start:
      computation = start.group(1)
    match = _COLLECTIVE.search(line)
    if match:
      dims = re.findall(r"\w+\[([\d,]*)\]", match["shape"])
      shapes = [tuple(map(int, filter(None, d.split(",")))) for d in dims]
      op_name = re.search(r'op_name="([^"]*)"', line)
      source = op_name.group(1) if op_name else ""
      found.append((match["kind"], shapes, source, computation in bodies))
  return found


# An untied head with a bias here; tied ones, and other norms, in --all.
NAMES = [
  "neox",
  *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2")),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_head_loop_communicates_nothing(name):
  """Its collectives stand before and after it, on [R, S] statistics and on
  gradients already summed over the chunks."""
  inside = [c for c in collectives(name) if c[3]]
  assert inside  # the layer loops do communicate: the parser sees them
  foreign = [c for c in inside if "Decoder" not in c[2]]
  assert not foreign, foreign


@pytest.mark.parametrize("name", NAMES)
def test_loops_over_layers_move_parameters_and_tensor_sums_only(name):
  """Per layer: its weights are gathered over fsdp, their gradients summed,
  and activations summed over tensor (never gathered)."""
  _, batch, params = compiled(name)
  length = batch["tokens"].shape[1]
  weights = {
    shape[1:] for shape in (x.shape for x in jax.tree.leaves(params["layers"]))
  }

  def part_of_a_weight(shape):
    return any(
      len(shape) == len(w)
      and all(b % a == 0 for a, b in zip(shape, w, strict=True))
      for w in weights | {(1, *w) for w in weights}
    )

  for kind, shapes, source, inside in collectives(name):
    if not inside:
      continue
    for shape in shapes:
      activation = length in shape
      assert kind in ("all-reduce", "all-gather", "reduce-scatter"), source
      assert activation or part_of_a_weight(shape), (kind, shape, source)
      assert not (activation and kind != "all-reduce"), (kind, shape, source)


@pytest.mark.parametrize(
  "args",
  [
    ("neox",),
    ("llama", 2),
    pytest.param(("llama",), marks=pytest.mark.slow),
    pytest.param(("gpt2",), marks=pytest.mark.slow),
  ],
)
def test_no_activation_is_gathered_or_moved_anywhere(args):
  """With accumulation too: each device's rows are in every microbatch."""
  _, batch, _ = compiled(*args)
  lengths = {batch["tokens"].shape[1], batch["target_index"].shape[1]}
  for kind, shapes, source, _ in collectives(*args):
    if kind != "all-reduce":
      for shape in shapes:
        assert not lengths & set(shape), (kind, shape, source)


def test_the_state_is_donated():
  program, _, params = compiled("neox")
  memory = program.memory_analysis()
  metrics = memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert 0 < metrics < 1024  # all outputs but the metrics reuse their input
  assert memory.alias_size_in_bytes > sum(
    x.nbytes // 4 for x in jax.tree.leaves(params)
  )


def test_denominators_cost_no_forward_pass():
  """The pass that finds them is dead code but for the weights."""
  model, params = worlds.model("llama")
  algorithm = preference.make(topology.config_of(), model.apply)
  state = topology.make_state(params)
  batch = worlds.batch(topology.ITEMS)
  step = step_lib.make(
    algorithm, topology.recording_sgd(), accumulation=1, axis_name=None
  )

  def bare(state, batch, hparams):
    def loss(params):
      prepared = algorithm.prepare(batch, state.frozen, {})
      terms = algorithm.objective(params, state.frozen, prepared, hparams)
      values, weights = terms.losses["dpo"]
      return jnp.sum(values * weights) / jnp.sum(weights)

    return jax.grad(loss)(state.params)

  def dots(fn):
    text = jax.jit(fn).lower(state, batch, topology.HPARAMS).compile().as_text()
    return len(re.findall(r"op_name=\"[^\"]*dot_general", text))

  assert dots(step) == dots(bare)
