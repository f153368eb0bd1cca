"""Time and memory of a train step as one size grows. See growth.py.

A model of 4 layers and D = 256 with a vocabulary of 8,192, in f32; each point
compiles the real step once and times it (the least of three).
"""

import os
import time

BASE = {"length": 512, "examples": 8, "layers": 4, "devices": 1}
GROW = {
  "length": (256, 512, 1024, 2048, 4096, 8192),
  "packed": (1, 2, 4, 8, 16, 32),
  "layers": (2, 4, 8, 16),
  "devices": (1, 2, 4, 8),
}


def measure(length, examples, layers, devices):
  """{"seconds", "tokens", "fixed", "moving", "compile"} of one step.

  Args:
    length: tokens of an example: half of them prompt, a quarter each of two
      completions.
    examples: of a batch, packed into as few rows as there are devices.
    layers, devices: of them.
  """
  length, examples, layers, devices = map(
    int, (length, examples, layers, devices)
  )
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  import jax
  import numpy as np

  from dpo_jax import host
  from dpo_jax.config import load
  from dpo_jax.data.batch import loader as loader_lib
  from dpo_jax.data.batch import rows
  from dpo_jax.data.tokens import comparisons
  from dpo_jax.models import decoder
  from dpo_jax.parallel import mesh as mesh_lib
  from dpo_jax.run import build, memory, trained
  from dpo_jax.train import optim

  host.keep_pages()
  config = load.load_config(
    "configs/dpo.py",
    (
      *("data.train=toy", f"data.batch_size={examples}", "train.steps=10"),
      *(f"model.layers={layers}", "model.embed=256", "model.heads=4"),
      *("model.kv_heads=4", "model.head_dim=64", "model.mlp=1024"),
      *("model.max_positions=8192", "model.rotary_dim=64"),
    ),
  )
  setup = build.prepare_model(config)
  model = decoder.build(setup.model.config, 8192)
  setup = setup._replace(model=model)
  rng = np.random.default_rng(0)

  def tokens(count):
    return rng.integers(1, 8192, count).tolist()

  quarter = length // 4
  items = [
    comparisons.Example(
      *(i, 0, tokens(2 * quarter), (tokens(quarter), tokens(quarter))),
      ((0, 1, 1.0),),
    )
    for i in range(examples)
  ]
  loader = loader_lib.Loader(
    items,
    rows.Layout(True, True, mesh_lib.row_parallelism(setup.mesh), None),
    batch_size=examples,
    seed=0,
    budget=1,
    multiple=32,
  )
  optimizer = optim.make(config.optim, 10)
  setup, choice = memory.fitted(setup, optimizer, loader.shapes[-1], 1)
  run = build.Run(
    *(setup, loader, "", 10, build.trained_algorithm(setup), optimizer),
    *(build.hyper_params(config), {}),
  )
  state = build.initial_state(run, trained.initial(setup))
  step = run.step
  batch, stats = build.place_batch(setup, loader, 0)
  moving, frozen = state.replace(frozen={}), state.frozen
  begin = time.perf_counter()
  with jax.set_mesh(setup.mesh):
    program = step.compiled.lower(moving, frozen, batch, run.hparams).compile()
  compiled = time.perf_counter() - begin
  sizes = program.memory_analysis()
  times = []
  for _ in range(4):
    begin = time.perf_counter()
    state, metrics = step(state, batch, run.hparams)
    jax.block_until_ready((state, metrics))
    times.append(time.perf_counter() - begin)
  return {
    "seconds": min(times[1:]),
    "tokens": stats.tokens,
    "fixed": sizes.argument_size_in_bytes / 2**20,
    "moving": sizes.temp_size_in_bytes / 2**20,
    "compile": compiled,
    "how": f"remat {choice.remat}, head chunk {choice.head_chunk}",
  }


def points(what):
  """[(name of the size, arguments of `measure`)] of a key of GROW."""
  for size in GROW[what]:
    changed = dict(BASE)
    if what == "length":
      changed |= {"length": size, "examples": 1}
    elif what == "packed":
      changed |= {"length": 256, "examples": size}
    else:
      changed[what] = size
    yield size, changed


def row(what, size, found):
  """A row of the table of `what`."""
  return {
    what: f"{size:,}",
    "tokens": f"{found['tokens']:,}",
    "ms a step": round(1000 * found["seconds"]),
    "µs a token": round(1e6 * found["seconds"] / found["tokens"]),
    "state MiB a device": round(found["fixed"]),
    "temporary MiB a device": round(found["moving"]),
    "compile s": f"{found['compile']:.1f}",
  }
