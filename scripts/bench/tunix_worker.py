"""Tunix's own `DPOTrainer.train()` on this model, held between batches.

Its model must be an nnx.Module: dpo_jax's parameters as nnx.Param, applied with
plain dense attention; prompts are padded on the left and completions on the
right, to what the data may have, as Tunix wants them.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.sft.dpo import dpo_trainer

from scripts.bench import jax_side, padded, protocol


class Policy(nnx.Module):
  """Logits of a dpo_jax model, as Tunix calls it."""

  def __init__(self, model, params):
    self.model = model
    self.params = nnx.data(jax.tree.map(nnx.Param, params))

  def __call__(self, tokens, positions, cache, attention_mask):
    from dpo_jax.ops import logprobs

    del cache
    # Causal inside what is no padding: all of the mask is in its diagonal.
    valid = jnp.diagonal(attention_mask, axis1=1, axis2=2).astype(jnp.int32)
    params = jax.tree.map(
      lambda leaf: leaf[...],
      self.params,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )
    batch = {
      "tokens": tokens,
      "positions": positions,
      "segment_ids": valid,
      "branch_ids": jnp.zeros_like(tokens),
      "example_index": positions[:, None],
    }
    return logprobs.logits(*self.model.apply(params, batch)), None


class Trainer(dpo_trainer.DPOTrainer):
  """Keeps the loss of each step, on the device."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.with_loss_fn(_loss_and_itself, has_aux=True)
    self.losses = []

  def _post_process_train_step(self, aux):
    self.losses.append(aux.pop("loss"))
    super()._post_process_train_step(aux)


@functools.wraps(dpo_trainer.dpo_loss_fn)  # nnx reads the signature
def _loss_and_itself(*args, **kwargs):
  loss, aux = dpo_trainer.dpo_loss_fn(*args, **kwargs)
  return loss, {**aux, "loss": loss}


def load(job):
  """Policy with the weights of the job's checkpoint."""
  from dpo_jax.models import decoder, hf
  from dpo_jax.parallel import mesh as mesh_lib

  there = hf.open_folder(job["model"])
  config = dataclasses.replace(there.config, attention="xla")
  model = decoder.build(config, there.vocab_size)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  everywhere = jax.sharding.NamedSharding(
    mesh_lib.of_devices(jax.devices()[:1]), jax.sharding.PartitionSpec()
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    shapes,
  )
  params = hf.load(there, abstract, "float32")
  # Off the mesh and bound to no device, as the optimiser's state is: else the
  # second step would compile anew.
  return Policy(
    model, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
  )


def side(sequences, length, left):
  """(tokens, mask) i32[B, length], padded on one side."""
  tokens = np.zeros((len(sequences), length), np.int32)
  mask = np.zeros_like(tokens)
  for row, ids in enumerate(sequences):
    at = slice(length - len(ids), None) if left else slice(len(ids))
    tokens[row, at], mask[row, at] = ids, 1
  return tokens, mask


def gated(channel, trainer, job, compilations):
  """Yields Tunix's batches; between them answers the driver."""
  left, compiled = 0, None
  for pairs in protocol.batches(job):
    if left == 0:
      left, begin = channel.steps(), time.perf_counter()
    prompts, chosen, rejected = zip(*pairs, strict=True)
    yield dpo_trainer.TrainingInput(
      *side(prompts, job["max_prompt"], left=True),
      *side(chosen, job["max_completion"], left=False),
      *side(rejected, job["max_completion"], left=False),
    )
    left -= 1
    if left == 0:
      jax.block_until_ready(nnx.state(trainer.model))
      seconds = time.perf_counter() - begin
      losses = [float(loss) for loss in trainer.losses]
      trainer.losses.clear()
      if compiled not in (None, compilations.large):
        raise RuntimeError("something was compiled while timed")
      compiled = compilations.large
      channel.reply(
        seconds=seconds,
        losses=losses,
        compile_seconds=compilations.seconds,
        compilations=compilations.large,
      )


def main():
  channel = protocol.Channel()
  job = channel.job
  if job["lora"] or job["ref"] != "frozen":
    raise SystemExit("Tunix runs with all parameters and a frozen reference")
  config = dpo_trainer.DPOTrainingConfig(
    eval_every_n_steps=10**9, max_steps=job["steps"], beta=job["beta"]
  )
  trainer = Trainer(load(job), load(job), padded.optimizer(job), config)
  compilations = jax_side.Compilations()
  channel.ready(("google-tunix", "jax", "jaxlib", "flax", "optax"))
  trainer.train(gated(channel, trainer, job, compilations))
  channel.steps()


if __name__ == "__main__":
  main()
