"""What torch makes of the machine: the matmul of matmul.py."""

import os

import torch

from scripts.bench import protocol

SIZE, REPEATS = 2048, 10  # as in matmul.py, half as often


def main():
  channel = protocol.Channel()
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  x = torch.randn(SIZE, SIZE) / SIZE**0.5
  channel.ready(("torch",), flops=2 * SIZE**3 * REPEATS)

  def run_steps(count):
    y = x
    for _ in range(count * REPEATS):
      y = y @ x
    return list

  channel.serve(run_steps)


if __name__ == "__main__":
  main()
