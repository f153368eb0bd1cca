"""dpo_jax's sampler, as scripts/bench/sampling.py asks for it."""

import time

import numpy as np

from dpo_jax import host
from scripts.bench import protocol

_BYTES = 2**29  # that are read to time it: more than any cache


def main():
  channel = protocol.Channel()
  job = channel.job
  host.keep_pages()
  import jax
  import jax.numpy as jnp

  from dpo_jax.models import decoder, hf, sample

  checkpoint = hf.open_folder(job["model"])
  model = decoder.build(checkpoint.config, checkpoint.vocab_size)
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  params = hf.load(checkpoint, abstract, "float32")
  lengths = np.asarray([len(prompt) for prompt in job["prompts"]], np.int32)
  prompts = np.zeros((len(lengths), max(lengths)), np.int32)
  for row, prompt in zip(prompts, job["prompts"], strict=True):
    row[: len(prompt)] = prompt
  compiled, ids = sample.compiled(model), np.arange(len(lengths))
  ones, total = jnp.ones(_BYTES // 4), jax.jit(jnp.sum)
  total(ones).block_until_ready()
  channel.ready(("jax", "jaxlib"))

  def run_steps(count):
    for number in range(count):
      out = compiled(
        params,
        prompts,
        lengths,
        ids.astype(np.int32),
        jax.random.key(number),
        max_new_tokens=job["tokens"],
        temperature=1.0,
        top_p=job["top_p"],
        end_ids=(),
      )
      jax.block_until_ready(out)
    assert out.tokens.shape == (len(lengths), job["tokens"])
    return read

  def read():
    """[bytes a second]"""
    begin = time.perf_counter()
    total(ones).block_until_ready()
    return [_BYTES / (time.perf_counter() - begin)]

  channel.serve(run_steps)


if __name__ == "__main__":
  main()
