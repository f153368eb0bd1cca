"""Tunix's own GRPO and PPO learners on its Llama, held between iterations.

Their defaults with the rollout that runs on CPUs, `vanilla`, but for what all
systems share. Its PPO draws once for each prompt, so it is given prompts as
often as the others draw for them; its critic is a copy of the model.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

from scripts.bench import jax_side, padded, protocol


def load(job, mesh):
  """Tunix's Llama with the weights of the job's checkpoint."""
  raw = json.loads((pathlib.Path(job["model"]) / "config.json").read_text())
  if raw["model_type"] != "llama":
    raise SystemExit(f"Tunix has no model of the type {raw['model_type']}")
  config = llama.ModelConfig(
    num_layers=raw["num_hidden_layers"],
    vocab_size=raw["vocab_size"],
    embed_dim=raw["hidden_size"],
    hidden_dim=raw["intermediate_size"],
    num_heads=raw["num_attention_heads"],
    head_dim=raw["hidden_size"] // raw["num_attention_heads"],
    num_kv_heads=raw["num_key_value_heads"],
    # `apply_rope` of its Llama takes its own default instead: the same work.
    rope_theta=int((raw.get("rope_parameters") or raw)["rope_theta"]),
    norm_eps=raw["rms_norm_eps"],
    weight_tying=raw["tie_word_embeddings"],
  )
  return llama_params.create_model_from_safe_tensors(
    job["model"], config, mesh, jnp.float32
  )


class Critic(nnx.Module):
  """A copy of a Llama with a value head, as Tunix's PPO calls it.

  Its own maker of critics wants an untied head, and its Llama does not take the
  segments that it is called with, of which there is one.
  """

  def __init__(self, model):
    graph, state = nnx.split(model)
    self.model = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    self.model.config = dataclasses.replace(model.config, weight_tying=False)
    self.model.lm_head = nnx.Linear(
      model.config.embed_dim, 1, use_bias=False, rngs=nnx.Rngs(0)
    )

  def __call__(
    self, tokens, positions, cache, attention_mask, segment_ids=None
  ):
    del segment_ids
    return self.model(tokens, positions, cache, attention_mask)


def watched(tx):
  """An optimiser whose state begins with the norm of the gradient."""

  def init(params):
    return jnp.zeros(()), tx.init(params)

  def update(grads, state, params=None):
    updates, inner = tx.update(grads, state[1], params)
    return updates, (optax.global_norm(grads), inner)

  return optax.GradientTransformation(init, update)


def cluster_of(job, mesh):
  """The models, where they are and what they do."""
  roles = rl_cluster.Role
  tx = watched(padded.optimizer(job))
  ppo = job["task"] == "ppo"
  config = rl_cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys(roles, mesh),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=job["max_completion"],
      max_prompt_length=job["max_prompt"],
      kv_cache_size=job["max_length"],
      temperature=1.0,
      top_p=1.0,
      eos_tokens=[job["vocab_size"]],  # no token: all draw the same count
    ),
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=tx,
      critic_optimizer=watched(padded.optimizer(job)) if ppo else None,
      eval_every_n_steps=10**9,
      max_steps=10**9,
    ),
  )
  model = load(job, mesh)
  return rl_cluster.RLCluster(
    actor=model,
    reference=load(job, mesh),
    critic=Critic(model) if ppo else None,
    tokenizer=transformers.AutoTokenizer.from_pretrained(job["model"]),
    cluster_config=config,
  )


def learner_of(job, cluster, reward):
  """The learner of a job's task."""
  same = {"beta": job["beta"], "epsilon": job["clip"]}
  if job["task"] == "ppo":
    config = ppo_learner.PPOConfig(kl_method="kl", **same)
    return ppo_learner.PPOLearner(cluster, config, reward)
  config = grpo_learner.GRPOConfig(num_generations=job["draws"], **same)
  return grpo_learner.GRPOLearner(cluster, config, reward)


def gated(channel, cluster, scores, parts, compilations):
  """Yields the prompts of each iteration; between them answers the driver."""
  job = channel.job
  lines = pathlib.Path(job["in_order"]).read_text().splitlines()
  prompts = [json.loads(line)["prompt"] for line in lines]
  times = job["draws"] if job["task"] == "ppo" else 1
  trainers = [cluster.actor_trainer]
  if job["task"] == "ppo":
    trainers.append(cluster.critic_trainer)
  left, compiled, norms, begin = 0, None, [], None
  for start in range(0, len(prompts) + 1, job["batch"]):
    if begin is not None:
      jax.block_until_ready([nnx.state(x.model) for x in trainers])
      norms.append(float(jax.tree.leaves(_state(trainers[0]))[0]))
      left -= 1
    if left == 0:
      if begin is not None:
        seconds = time.perf_counter() - begin
        if compiled not in (None, compilations.large):
          raise RuntimeError("something was compiled while timed")
        compiled = compilations.large
        channel.reply(
          seconds=seconds,
          losses=[],
          norms=norms[:],
          scores=scores.means[:],
          parts=[parts.take()],
          compile_seconds=compilations.seconds,
          compilations=compilations.large,
        )
        norms.clear()
        scores.means.clear()
      left, begin = channel.steps(), time.perf_counter()
    here = prompts[start : start + job["batch"]]
    yield {"prompts": np.repeat(here, times)}


def _state(trainer):
  return nnx.state(trainer.optimizer, nnx.optimizer.OptState)


def main():
  channel = protocol.Channel()
  job = channel.job
  if job["lora"] or job["task"] not in ("grpo", "ppo"):
    raise SystemExit("Tunix runs GRPO and PPO with all parameters")
  mesh = jax.sharding.Mesh(
    np.reshape(jax.devices()[:1], (1, 1)), ("fsdp", "tp")
  )
  parts, scores = protocol.Parts(), protocol.Scores(job)
  compilations = jax_side.Compilations()

  def words(prompts, completions, **_):
    return scores(prompts, completions)

  with mesh:
    cluster = cluster_of(job, mesh)
    learner = learner_of(job, cluster, parts.of("score", words))
    cluster.rollout.generate = parts.of("sample", cluster.rollout.generate)
    channel.ready(("google-tunix", "jax", "jaxlib", "flax", "optax"))
    learner.train(gated(channel, cluster, scores, parts, compilations))


if __name__ == "__main__":
  main()
