"""Several points of a sweep in one program: equal to each of them alone."""

import contextlib

import jax
import numpy as np
import pytest

from configs import common
from dpo_jax import loop, sweeps, tree
from dpo_jax.config import load as load_lib
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import build, forward, together, trained
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib
from tests import conftest

slow = pytest.mark.slow
STEPS = 3
# All that may differ between points of one program.
POINTS = (
  {"loss.beta": 0.1, "init_seed": 0, "optim.learning_rate": 1e-2},
  {"loss.beta": 0.5, "init_seed": 1, "loss.label_smoothing": 0.1},
  {"loss.beta": 1.0, "init_seed": 1, "optim.learning_rate": 1e-3},
  {"loss.beta": 0.1, "init_seed": 2, "loss.label_smoothing": 0.2},
)


def without(field):
  return [{k: v for k, v in p.items() if k != field} for p in POINTS]


def load(spec, *overrides):
  """A config whose updates do not enlarge rounding, as RMSprop's would."""
  config = load_lib.load_config(
    str(conftest.ROOT / "configs" / spec), ()
  ).unlock()
  config.optim = common.optim("sgd")
  config.optim.warmup = 0
  for override in ("train.steps=4", "model.layers=1", *overrides):
    field, _, value = override.partition("=")
    config = load_lib.at(config, {field: load_lib._guess(value)}).unlock()
  return config.lock()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A run folder to start from: so points share their first parameters."""
  folder = tmp_path_factory.mktemp("start")
  config = load("sft.py:smoke")
  params = trained.initial(build.prepare_model(config))
  zero = np.zeros((), np.int32)
  state = state_lib.TrainState(zero, params, {}, {}, {}, zero)
  with checkpoint.Checkpointer(folder, keep=2) as checkpoints:
    checkpoints.save(state, config.to_dict(), wait=True)
  (folder / "config.json").write_text(config.to_json())
  return f"init_from={folder}"


@contextlib.contextmanager
def one_device(yes):
  """The mesh has the first of the eight fake devices alone."""
  with pytest.MonkeyPatch.context() as patch:
    if yes:
      mesh = mesh_lib.of_devices(jax.devices()[:1])
      patch.setattr(mesh_lib, "make", lambda options: mesh)
    yield


def alone(run, workdir):
  """(metrics of each step, parameters) of one point by itself."""
  params = trained.initial(run.setup)
  if run.reference.cached:
    store = workdir / "ref_logps"
    forward.attach_reference(run.setup, params, run.feed.loader, store)
  state = build.initial_state(run, params)
  step = run.step
  found, state = steps(run, state, step, run.hparams)
  return found, tree.named(state.params)


def steps(run, state, step, hparams):
  found = []
  for number in range(STEPS):
    batch, _ = run.feed.batch(number, None)
    state, metrics = step(state, batch, hparams)
    found.append(metrics)
  return jax.device_get(found), state


# Metrics that jump where a margin changes its sign. At the first step policy =
# reference, and the margins are 0 but for rounding.
JUMPS = ("accuracies", "calibration", "overconfidence", "displaced")


def assert_equal_up_to_rounding(got, want):
  for number, (there, here) in enumerate(zip(got[0], want[0], strict=True)):
    assert there.keys() == here.keys()
    for name, value in here.items():
      if number == 0 and any(part in name for part in JUMPS):
        continue
      # Rewards are β times a difference of log-probs of about 100 nats.
      tight = name in ("loss", "grad_norm", "learning_rate", "skipped")
      tolerance = {"rtol": 1e-5, "atol": 1e-6 if tight else 1e-4}
      np.testing.assert_allclose(
        there[name], value, **tolerance, err_msg=name, equal_nan=True
      )
  for (path, a), (_, b) in zip(got[1], want[1], strict=True):
    size = max(np.linalg.norm(b), 1e-6)
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * size, path


MESH = ("mesh.fsdp=2", "mesh.tensor=2")
LORA, FULL = "dpo.py:smoke,lora", "dpo.py:smoke"
# Config, what it starts from, points, one device or eight, further fields.
CASES = {
  "adapters of one base": (LORA, True, POINTS, True, ()),
  "adapters of one base, cached, mesh": (
    LORA,
    True,
    POINTS,
    False,
    ("ref=cached", *MESH),
  ),
  "models of other seeds, mesh": (FULL, False, POINTS, False, MESH),
  "models, one start": (FULL, True, without("init_seed"), True, ()),
  "adapters of other bases": (LORA, False, POINTS, True, ()),
  "adapters, rows over devices": (LORA, True, POINTS, False, ()),
  "adapters, pmap": (LORA, True, POINTS, False, ("mesh.mode=pmap",)),
  "adapters, accumulation, chunked head": (
    LORA,
    True,
    POINTS,
    True,
    ("train.accumulation=2", "model.head_chunk=16"),
  ),
  "models, cached": (
    FULL,
    False,
    without("init_seed"),
    False,
    ("ref=cached",),
  ),
  "a loss that couples the batch": (
    "dpo.py:smoke,lora,loss=kto",
    True,
    [{"loss.beta": b, "init_seed": s} for b, s in ((0.1, 0), (0.5, 1))],
    False,
    (),
  ),
  "a reference that follows": (
    "dpo.py:smoke,ref=ema",
    True,
    without("init_seed")[:2],
    True,
    ("ref_every=2",),
  ),
}
FAST = ("models of other seeds, mesh",)


@pytest.mark.parametrize(
  "case", [c if c in FAST else pytest.param(c, marks=slow) for c in CASES]
)
def test_points_in_one_program_equal_each_of_them_alone(case, start, tmp_path):
  spec, starts, chosen, single, fields = CASES[case]
  config = load(spec, *fields, *([start] if starts else []))
  with one_device(single):
    configs = [load_lib.at(config, point) for point in chosen]
    assert len(sweeps.groups(configs, len(configs))) == 1
    runs = sweeps.beside(configs, build.prepare(configs[0]))
    begun = [loop.begin(run, tmp_path) for run in runs]
    program = together.program(runs, [state for _, state in begun])
    del begun
    found, state = steps(runs[0], program.state, program.step, program.hparams)
    for index, part in enumerate(program.parts(state)):
      got = [step[index] for step in found], tree.named(part.params)
      assert_equal_up_to_rounding(got, alone(runs[index], tmp_path))
      assert int(part.step) == STEPS


def flops(count, ref, start):
  """FLOPs of the step of `count` adapters, before the compiler sees it."""
  config = load(LORA, f"ref={ref}", start)
  configs = [load_lib.at(config, point) for point in POINTS[:count]]
  runs = sweeps.beside(configs, build.prepare(config))
  states = [build.initial_state(r, trained.initial(r.setup)) for r in runs]
  batch, _ = runs[0].feed.batch(0, None)
  if ref == "cached":
    logps = np.zeros(batch["target_index"].shape, np.float32)
    batch = {**batch, "ref_token_logps": logps}
  if count == 1:
    (state,), hparams = states, runs[0].hparams
    step = runs[0].step
  else:
    step, state, hparams, _ = together.program(runs, states)
  args = state.replace(frozen={}), state.frozen, batch, hparams
  with jax.set_mesh(runs[0].setup.mesh):
    return step.compiled.lower(*args).cost_analysis()["flops"]


def test_the_reference_is_computed_once_for_all_points(start):
  ours, theirs = (
    flops(count, "base", start) - flops(count, "cached", start)
    for count in (4, 1)
  )
  assert theirs > 0
  assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(
  ("made", "fields", "expected"),
  [
    (POINTS, (), [[0, 1, 2, 3]]),
    (POINTS, ("sweep.together=1",), [[0], [1], [2], [3]]),
    (
      [{"loss.beta": b, "data.seed": s} for b in (1.0, 2.0) for s in (0, 1)],
      (),
      [[0, 2], [1, 3]],
    ),
    (POINTS, ("ref=cached",), [[0], [1, 2], [3]]),
    # The metrics of a mixture are those of its heaviest term.
    (
      [{"loss.bco.weight": weight} for weight in (0.5, 0.7, 2.0)],
      ("loss.dpo.weight=1.0",),
      [[0, 1], [2]],
    ),
  ],
)
def test_points_share_a_program_where_they_compile_to_the_same(
  made, fields, expected
):
  mixed = any(name.startswith("loss.dpo") for name in fields)
  spec = f"{LORA},loss=dpo+bco" if mixed else LORA
  config = load(spec, "sweep.together=4", *fields)
  configs = [load_lib.at(config, point) for point in made]
  assert sweeps.groups(configs, config.sweep.together) == expected


@pytest.mark.parametrize(
  ("made", "fields", "message"),
  [
    (POINTS[:1], (), "no effect: there is one point; set it to 1"),
    (
      [{"data.seed": 0}, {"data.seed": 1, "loss.beta": 2.0}],
      (),
      "the points differ in data.seed, which is compiled in",
    ),
    (
      [{"init_seed": 0}, {"init_seed": 1}],
      ("ref=cached",),
      "each init_seed has a reference of its own, and ref = 'cached'",
    ),
    (POINTS, ("log.wandb=mine",), "log.wandb = 'mine' follows one run"),
  ],
)
def test_points_that_cannot_share_a_program_are_refused(
  made, fields, message, tmp_path
):
  config = load(LORA, "sweep.together=4", *fields)
  with pytest.raises(ValueError, match=message):
    sweeps.sweep(config, made, tmp_path)
  assert not list(tmp_path.iterdir())
