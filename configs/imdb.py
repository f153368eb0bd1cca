"""The paper's controlled sentiment: reward over KL on film reviews.

    dpo-jax train --config imdb

gpt2-large continues beginnings of IMDb's reviews; the true reward r* is what a
sentiment classifier says of them (arXiv:2305.18290 section 6.1). The stages,
each skipped where it is done: SFT, four continuations of each of 25,000
beginnings, compared by r*; a reward model; the methods, each a sweep whose
points are sampled every 100 steps (`:every=`); Best-of-128. A plan of tokens,
FLOPs, memory and hours is printed first. `:stage=NAME` is the config of one
stage; `:model=`, `:data=` and `:scorer=` take another model, another folder or
data set of the columns text and label with the splits train, test and
unsupervised, and another r*; `:fsdp=4` splits the parameters over four devices;
`:smoke` runs all stages in small, without the network.

Not measured: it takes an accelerator. The paper does not say how long
completions are; 60 tokens follow from its KL per token and per sequence.
"""

from dpo_jax.configs import common, losses, paper

MODEL = "hf:openai-community/gpt2-large"
DATA = "hf:stanfordnlp/imdb"
TRUTH = "probability:siebert/sentiment-roberta-large-english"
PREFIX = (2, 8)  # tokens of a beginning
DRAWS = 4  # completions of each, 6 pairs
LENGTH = 60  # tokens of a completion
EPOCHS = (1.0, 2.0, 3.0)  # of the reward model, at most three
TARGETS = (3.0, 6.0, 9.0, 12.0)  # of PPO, nats a sequence
BETAS = (0.05, 0.1, 1.0, 5.0)
BEST_OF = (1, 4, 16, 64, 128)
ALPHAS = (0.05, 0.1, 0.5, 1.0)


def get_config(arg=None):
  a = paper.arguments(
    *(arg, {"model": "micro", "data": "toy", "scorer": "vader"}),
    root="runs/imdb",
    fsdp=1,
    model=MODEL,
    data=DATA,
    scorer=TRUTH,
    every=100,
  )
  targets = paper.axis("rollout.kl_target", TARGETS, a)
  steps = (
    ("train", "sft"),
    ("sample", "pairs"),
    ("sample", "held_out"),
    ("sweep", "reward", paper.axis("train.epochs", EPOCHS, a)),
    ("sweep", "dpo", paper.axis("loss.beta", BETAS, a)),
    ("sweep", "unlikelihood", paper.axis("loss.alpha", ALPHAS, a)),
    ("sweep", "preferred", paper.axis("data.seed", (0, 1), a)),
    ("sweep", "ppo", targets),
    ("sweep", "ppo_gt", targets),
    ("sweep", "ppo_gt_trl", targets),
    *paper.best_of_each((1.0,), a),
  )
  plan = common.planned(
    a.fsdp,
    # Records, and mean tokens of gpt2's (about; reviews cut at 511).
    (paper.split(DATA, "train"), 25_000, 1, 265),
    (paper.split(DATA, "test"), 25_000, 1, 265),
    (paper.split(DATA, "unsupervised"), 50_000, 1, 265),
  )
  return paper.task(a, STAGES, steps, plan, "data", "scorer", "every")


def policy(a, folder):
  c = paper.policy(a, folder)
  c.data.long_prompt = "keep_start"
  c.eval.every = a.every
  c.sample.prefix = PREFIX
  c.sample.max_new_tokens = LENGTH
  c.sample.scorers = (a.scorer,)
  return c


def sft(a):
  """One epoch of reviews; an empty prompt is one token of 512."""
  c = paper.sft(policy(a, "sft"))
  c.data.max_prompt_length, c.data.max_completion_length = 1, 511
  c.data.train = paper.split(a.data, "train")
  return c


def pairs(a):
  """25,000 beginnings: there are not as many different ones in train alone."""
  c = paper.after(policy(a, "pairs"), a, "sft")
  splits = ("train", "unsupervised")
  parts = dict.fromkeys(paper.split(a.data, name) for name in splits)
  c.sample.prompts = " + ".join(parts)
  c.sample.count = 25_000
  c.sample.draws = DRAWS
  c.sample.labels = "deterministic"
  return c


def held_out(a):
  """The same of other films, to measure a reward model's accuracy on."""
  c = pairs(a)
  c.workdir = f"{a.root}/held_out"
  c.sample.prompts = paper.split(a.data, "test")
  c.sample.count = 1000
  c.sample.seed = 1
  return c


def method(a, folder):
  """From the SFT policy, on the pairs."""
  c = paper.after(policy(a, folder), a, "sft")
  c.data.train = f"{a.root}/pairs/pairs.jsonl"
  c.data.eval = f"{a.root}/held_out/pairs.jsonl"
  c.data.batch_size = 11  # prompts of six pairs: 66, the nearest to 64
  return c


def measured(c, a):
  """Reward and KL on beginnings of test, every so many steps of the run.

  A checkpoint takes 6 GiB of disk (9 with AdamW), and all are kept: about 20 of
  each of the 22 runs, 60 of TRL's PPO.
  """
  c.sample.prompts = paper.split(a.data, "test")
  c.sample.seed = 2
  c.sample.checkpoints = True
  c.checkpoint.every, c.checkpoint.keep = a.every, 1000
  return c


def reward(a):
  """Three epochs, of which the one of the best validation accuracy is kept.

  Each is a point of a sweep, and "reward:FOLDER" takes the best of them. Its
  rate is constant behind the warm-up, so that two epochs begin as three do.
  """
  return paper.reward(method(a, "reward"), EPOCHS[-1])


def dpo(a):
  return measured(paper.dpo(method(a, "dpo"), BETAS[1], max(BETAS)), a)


def unlikelihood(a):
  c = measured(method(a, "unlikelihood"), a)
  c.ref, c.loss = "none", losses.loss("unlikelihood")
  return c


def preferred(a):
  """SFT on the winner of every pair."""
  c = measured(method(a, "preferred"), a)
  c.ref, c.loss = "none", losses.loss("sft")
  return c


def on_policy(a, folder, scorer):
  c = measured(paper.ppo(method(a, folder), scorer, TARGETS[1]), a)
  c.data.train, c.data.eval = paper.split(a.data, "train"), None
  c.data.batch_size = 64
  c.data.max_completion_length = LENGTH
  c.rollout.prefix = PREFIX
  c.rollout.batch_size = 512
  return c


def ppo(a):
  return on_policy(a, "ppo", f"reward:{a.root}/reward")


def ppo_gt(a):
  """PPO on r* itself, with the changes that the authors made: rewards too are
  normalised, and an iteration has 1,024 samples."""
  c = on_policy(a, "ppo_gt", a.scorer)
  c.loss.whiten = "both"
  return c


def ppo_gt_trl(a):
  """PPO on r* with the constants of TRL 0.4.1, off the shelf."""
  c = on_policy(a, "ppo_gt_trl", a.scorer)
  c.optim = common.optim("adamw")
  c.optim.learning_rate = 1.41e-5
  c.optim.warmup, c.optim.clip_norm = 0, None
  c.loss.beta = 0.2
  c.data.batch_size = 16
  c.rollout.prompts = 256
  return c


def best_of(a):
  """Best of N of the SFT policy, by the learned reward; r* tells its worth."""
  c = paper.best_of(policy, a, "sft", BEST_OF)
  c.sample.prompts = paper.split(a.data, "test")
  c.sample.scorers = (a.scorer, *c.sample.scorers)
  c.sample.rank_by = c.sample.scorers[-1]
  c.sample.seed = 2
  return c


STAGES = {
  "sft": sft,
  "pairs": pairs,
  "held_out": held_out,
  "reward": reward,
  "dpo": dpo,
  "unlikelihood": unlikelihood,
  "preferred": preferred,
  "ppo": ppo,
  "ppo_gt": ppo_gt,
  "ppo_gt_trl": ppo_gt_trl,
  "best_of": best_of,
}
