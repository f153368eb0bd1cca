"""Time and memory of a train step as one size grows. See growth.py.

A model of 4 layers and D = 256 with a vocabulary of 8,192, in f32; each point
compiles the real step once and times it (the least of three).
"""

import json
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

VOCABULARY = 8192
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

  from dpo_jax import host
  from dpo_jax.config import load
  from dpo_jax.run import build, trained

  host.keep_pages()
  with tempfile.TemporaryDirectory(prefix="growth-") as folder:
    write(folder, length, examples)
    config = load.load_config(
      "configs/dpo.py",
      (
        *(f"data.train={folder}/data.jsonl", f"tokenizer=hf:{folder}"),
        *(f"data.batch_size={examples}", "data.max_shapes=1"),
        *(f"data.max_prompt_length={length}", "data.shape_multiple=32"),
        *(f"data.max_completion_length={length}", "train.steps=10"),
        *(f"model.layers={layers}", "model.embed=256", "model.heads=4"),
        *("model.kv_heads=4", "model.head_dim=64", "model.mlp=1024"),
        *(f"model.max_positions={2 * length}", "model.rotary_dim=64"),
      ),
    )
    run = build.prepare(config)
  setup, step, model = run.setup, run.step, run.setup.model.config
  state = build.initial_state(run, trained.initial(setup))
  batch, stats = run.feed.batch(0, state)
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
    "how": f"remat {model.remat}, head chunk {model.head_chunk}",
  }


def write(folder, length, examples):
  """Writes a tokenizer of VOCABULARY words, and data.jsonl of such words."""
  import numpy as np

  from scripts.bench import inputs

  inputs.tokenizer(folder, VOCABULARY)
  rng = np.random.default_rng(0)

  def words(count):
    return " ".join(map(str, rng.integers(1, VOCABULARY, count)))

  quarter = length // 4
  with open(f"{folder}/data.jsonl", "w") as file:
    for _ in range(examples):
      # The end of a completion is a token too.
      chosen, rejected = (" " + words(quarter - 1) for _ in range(2))
      row = {"chosen": chosen, "rejected": rejected}
      file.write(json.dumps({"prompt": words(2 * quarter), **row}) + "\n")


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
