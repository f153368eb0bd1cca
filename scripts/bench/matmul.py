"""What the machine gives: a square f32 matmul through XLA, again and again."""

import jax
import jax.numpy as jnp

from scripts.bench import protocol

SIZE = 2048
FLOPS = 2 * SIZE**3
REPEATS = 20  # a step


def main():
  channel = protocol.Channel()
  x = jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.float32)
  x /= SIZE**0.5  # so that the products stay of order 1
  matmul = jax.jit(jnp.dot)
  matmul(x, x).block_until_ready()
  channel.ready(("jax", "jaxlib"), flops=FLOPS * REPEATS)

  def run_steps(count):
    y = x
    for _ in range(count * REPEATS):
      y = matmul(y, x)
    y.block_until_ready()
    return list

  channel.serve(run_steps)


if __name__ == "__main__":
  main()
