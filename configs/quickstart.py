"""The first experiment of the DPO paper in small, on real text, on two cores.

    bash scripts/quickstart.sh

Sentences of film reviews; the reward r* is the probability of praise by a
sentiment classifier of reviews of other films. A small decoder learns to write
reviews and samples four continuations of each beginning; of two the one of
higher r* wins, and DPO trains on the pairs at four β (arXiv:2305.18290 section
6, IMDb). `:stage=NAME` is the config of one stage; without it, of DPO, whose β
is `:beta=`. configs/frontier_text.py adds the other methods and seeds.

Measured on a 2-core CPU: mean r* of 512 samples 0.595 before, then 0.881,
0.872, 0.636, 0.606 (± 0.007 to 0.013) at β = 0.05, 0.1, 1, 5; sequence KL 11.8,
7.8, 0.14, 0.01 nats (scripts/results/quickstart.json).
"""

from ml_collections import config_dict

from dpo_jax.configs import base, common

TRUTH = "sentiment:reviews:train"  # r*, a probability
LENGTH = 48  # tokens of a completion
BETAS = (0.05, 0.1, 1.0, 5.0)


def at_beta(c, beta):
  """Gives DPO a β, and the learning rate that goes with it.

  The loss sees β times the noise of the log-ratios: at one rate for all, a
  large β ends with a held-out loss above log 2.
  """
  c.loss.beta = beta
  c.optim.learning_rate = min(5e-4, 1e-4 / beta)
  return c


def sweep():
  for beta in BETAS:
    yield {"arg": f"beta={beta}"}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    stage="dpo",
    root="runs/quickstart",
    beta=BETAS[1],
    quick=False,
    smoke=False,
  )
  c = common.choose(arg.stage, STAGES)(arg.root, arg.quick)
  if arg.stage == "dpo":
    at_beta(c, arg.beta)
  return common.smoke(c) if arg.smoke else c


def tokenizer(root, quick):
  del quick
  return config_dict.ConfigDict(
    {
      "algo": "tokenizer",
      "workdir": f"{root}/tokenizer",
      "data": {"train": "reviews:train"},
      "vocab_size": 2048,
    }
  )


def policy(root, quick):
  """What all stages that hold a policy share."""
  c = base.get_config()
  c.tokenizer = f"{root}/tokenizer"
  c.model = common.model("tiny")
  # Half as many heads, twice as wide: attention is what costs most here.
  c.model.heads = c.model.kv_heads = 2
  c.model.head_dim = c.model.rotary_dim = 64
  if quick:
    c.model.layers = 2
  c.model.unroll = c.model.layers
  c.optim = common.optim("adamw")
  c.optim.clip_norm = 1.0
  c.data.max_prompt_length = 16
  c.data.max_completion_length = LENGTH
  c.data.shape_multiple = 8
  c.data.max_shapes = 2
  c.data.long_prompt = "keep_start"
  c.sample.prefix = (2, 8)
  c.sample.max_new_tokens = LENGTH
  c.sample.scorers = (TRUTH, "vader")
  c.log.every = 20
  return c


def sft(root, quick):
  c = policy(root, quick)
  c.workdir = f"{root}/sft"
  c.algo, c.ref, c.loss = "sft", "none", common.loss("sft")
  c.data.train, c.data.eval = "reviews:train", "reviews:validation"
  c.data.max_completion_length = 64
  c.data.batch_size = 32
  c.train.epochs = 1.0 if quick else 2.0
  c.optim.learning_rate = 3e-3
  c.optim.schedule = "cosine"
  c.optim.warmup = 40
  c.eval.every = 400
  return c


def pairs(root, quick):
  """Four continuations of beginnings of training films' reviews, compared."""
  c = policy(root, quick)
  c.workdir = f"{root}/pairs"
  c.init_from = f"{root}/sft"
  c.sample.prompts = "reviews:train"
  c.sample.count = 500 if quick else 2400
  c.sample.draws = 4
  c.sample.labels = "deterministic"
  return c


def held_out(root, quick):
  """The same for films that neither the policy nor r* was trained on."""
  c = pairs(root, quick)
  c.workdir = f"{root}/held_out"
  c.sample.prompts = "reviews:validation"
  c.sample.count = 64 if quick else 256
  c.sample.seed = 1
  return c


def on_pairs(c, root):
  """From the SFT policy, on the pairs."""
  c.init_from = f"{root}/sft"
  c.data.train = f"{root}/pairs/pairs.jsonl"
  c.data.eval = f"{root}/held_out/pairs.jsonl"
  c.data.batch_size = 32  # prompts, of six comparisons each
  c.optim.schedule = "linear"
  c.optim.warmup = 10
  c.log.every = 5
  c.eval.every = 1000
  return c


def measured(c):
  """Samples for beginnings of other films' reviews."""
  c.sample.prompts = "reviews:test"
  c.sample.labelled = "reviews:test"
  c.sample.seed = 2  # of every policy: samples differ by the policy alone
  c.sample.count = 512
  return c


def dpo(root, quick):
  c = measured(on_pairs(policy(root, quick), root))
  c.workdir = root
  c.ref, c.loss = "cached", common.loss("dpo")
  c.train.epochs = 3.0 if quick else 1.0
  return at_beta(c, BETAS[1])


def on_policy(c, root, scorer):
  """Gives a config of rollouts the beginnings of reviews, from the SFT policy.

  32 in a step; samples as those of `dpo`.
  """
  measured(c).init_from = f"{root}/sft"
  c.data.train = "reviews:train"
  c.data.batch_size = 32
  c.rollout.prefix = (2, 8)
  c.rollout.scorer = scorer
  c.rollout.prompts = 128
  c.rollout.batch_size = 512
  c.log.every = 4
  return c


STAGES = {
  "tokenizer": tokenizer,
  "sft": sft,
  "pairs": pairs,
  "held_out": held_out,
  "dpo": dpo,
}
