"""Sampling against transformers' generate, by turns on the same work.

    python -m scripts.bench.sampling             32 prompts × 64 tokens
    python -m scripts.bench.sampling --top-p=0.9 --rounds=5

Both have the same random weights, prompts of the same lengths and as many
tokens to draw, none of which ends a text. The bound is the time in which the
weights are read once a token, at the rate of a sum, and the products done, at
the rate of a large matmul; both rates are of the same round.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile

import numpy as np

from dpo_jax.models import config as model_config
from scripts.bench import cases, client, driver, inputs

SYSTEMS = ("sampler", "generate", "matmul")


def parser():
  """The options."""
  p = argparse.ArgumentParser("sampling", description=__doc__.split("\n")[0])
  p.add_argument("--model", default="smollm2-135m", choices=cases.VOCABULARY)
  p.add_argument("--prompts", type=int, default=32)
  p.add_argument("--tokens", type=int, default=64, help="drawn of each")
  p.add_argument("--length", type=int, default=16, help="mean of the prompts")
  p.add_argument("--longest", type=int, default=32)
  p.add_argument("--top-p", type=float, default=1.0)
  p.add_argument("--rounds", type=int, default=3)
  p.add_argument("--threads", type=int, default=2)
  return p


def job(options, folder):
  """What the workers are told, as plain values."""
  vocab_size = cases.VOCABULARY[options.model]
  model = folder / options.model
  model.mkdir()
  inputs.write_model(model, options.model, vocab_size)
  rng, count = np.random.default_rng(0), options.prompts
  lengths = inputs.lengths(rng, options.length, options.longest, count)
  return {
    "model": str(model),
    "preset": options.model,
    "vocab_size": vocab_size,
    "prompts": [rng.integers(1, vocab_size, n).tolist() for n in lengths],
    "tokens": options.tokens,
    "top_p": options.top_p,
  }


def work(options, lengths):
  """(FLOPs, bytes) needed: of all tokens; of the weights, for each of them."""
  config = model_config.PRESETS[options.model]
  vocab_size = cases.VOCABULARY[options.model]
  drawn = options.tokens - 1  # the last is drawn and not read
  tokens = sum(lengths) + len(lengths) * drawn
  visible = sum(n * (n + 1) // 2 for n in lengths)
  visible += sum(n + i + 1 for n in lengths for i in range(drawn))
  flops = model_config.matmul_flops(
    config,
    vocab_size,
    tokens,
    len(lengths) * options.tokens,
    config.layers * visible,
  )
  once, _ = model_config.matmul_flops(config, vocab_size, 1, 1, 0)
  return sum(flops), 4 * once / 2 * options.tokens


def measure(options):
  """{system: seconds of each round}, with "read": bytes a second."""
  with tempfile.TemporaryDirectory(prefix="sampling-") as name:
    folder, seconds = pathlib.Path(name), {"read": []}
    told = job(options, folder)
    with contextlib.ExitStack() as stack:
      workers = []
      for system in SYSTEMS:
        worker = client.Worker(
          system, told, folder, driver.cpus(options.threads)
        )
        stack.callback(worker.stop)
        worker.steps(1)
        workers.append(worker)
        seconds[system] = []
        print(f"{system} ready", flush=True)
      for number in range(options.rounds):
        shift = number % len(workers)
        for worker in workers[shift:] + workers[:shift]:
          answer = worker.steps(1)
          seconds[worker.name].append(answer["seconds"])
          if worker.name == "sampler":
            seconds["read"] += answer["losses"]
        print(json.dumps({k: v[-1] for k, v in seconds.items()}), flush=True)
    flops = workers[-1].ready["facts"]["flops"]
  lengths = [len(prompt) for prompt in told["prompts"]]
  return {name: np.asarray(x) for name, x in seconds.items()}, flops, lengths


def main(argv=None):
  options = parser().parse_args(argv)
  seconds, matmul, lengths = measure(options)
  flops, read = work(options, lengths)
  ours, theirs = seconds["sampler"], seconds["generate"]
  products = flops / matmul * seconds["matmul"]
  reads = read / seconds["read"]
  ratio, distance = theirs / ours, ours / (products + reads)
  print(
    f"{options.prompts} prompts of {np.mean(lengths):.0f} tokens on average × "
    f"{options.tokens} tokens of {options.model}, medians of {len(ours)} rounds"
  )
  print(
    f"ours {np.median(ours):.2f} s, generate {np.median(theirs):.2f} s: "
    f"× {np.median(ratio):.2f} ({ratio.min():.2f}–{ratio.max():.2f})"
  )
  print(
    f"bound: {np.median(products):.2f} s for {flops / 1e9:,.0f} GFLOP and "
    f"{np.median(reads):.2f} s for {read / 1e9:,.0f} GB; ours takes × "
    f"{np.median(distance):.2f} ({distance.min():.2f}–{distance.max():.2f})"
  )


if __name__ == "__main__":
  sys.exit(main())
