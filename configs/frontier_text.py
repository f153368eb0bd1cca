"""The paper's comparison of methods on real text, for two cores.

    dpo-jax train --config frontier_text
    dpo-jax report --workdir runs/frontier_text

The quickstart's task with all of the paper's methods and three seeds: of each
its own SFT policy, comparisons and reward model. Every policy is sampled on its
way, and the report draws reward over KL (arXiv:2305.18290, figure 2 left).
Stages that are done are skipped: after Ctrl-C the same command goes on.
`:stage=NAME,seed=0` is the config of one, `:smoke` all of it in small.
"""

from dpo_jax.configs import common, losses, paper, ppo, quickstart, reward

SEEDS = (0, 1, 2)
STEPS = 75  # of training on pairs, one pass
POINTS = 6  # checkpoints of a run
# What each method is swept over. Each β has its own rate: quickstart.py.
AXES = {
  "dpo": (":beta", quickstart.BETAS),
  "ppo": ("rollout.kl_target", (3.0, 9.0)),  # nats
  "ppo_gt": ("rollout.kl_target", (3.0, 9.0)),
  "unlikelihood": ("loss.alpha", (0.1, 1.0)),
  "preferred_ft": ("optim.learning_rate", (5e-4,)),
}


def get_config(arg=None):
  a = common.parse_arg(
    arg,
    stage="all",
    root="runs/frontier_text",
    seed=0,
    beta=quickstart.BETAS[1],
    smoke=False,
  )
  if a.stage == "all":
    return whole(a)
  c = common.choose(a.stage, STAGES)(a)
  if a.smoke and "model" in c:
    paper.smoke(c)
    c.checkpoint.every = 1
    if a.stage == "sft":
      c.data.eval = None
  return c


def whole(a):
  """All seeds at once, which leaves no core idle, and how they are compared."""
  seeds = SEEDS[: 1 if a.smoke else None]
  compared = common.compared(
    method="dpo",
    against=(*list(AXES)[1:], "best_of"),
    seeds=seeds,
    folder="seed={seed}/{method}",
    trend="loss.beta",
  )
  return common.stages(
    a.root,
    ("train", "tokenizer"),
    *(("together", f"seed,seed={seed}") for seed in seeds),
    compared=compared,
    root=a.root,
    smoke=a.smoke,
  )


def one_seed(a):
  """All stages of a seed."""
  of = f"seed={a.seed}"
  return common.stages(
    inside(a),
    ("train", f"sft,{of}"),
    ("sample", f"pairs,{of}"),
    ("sample", f"held_out,{of}"),
    ("train", f"reward,{of}"),
    *(
      ("sweep", f"{name},{of}", paper.axis(*axis, a))
      for name, axis in AXES.items()
    ),
    ("sample", f"best_of,{of}"),
    root=a.root,
    smoke=a.smoke,
  )


def inside(a):
  """The folder of a seed."""
  return f"{a.root}/seed={a.seed}"


def tokenizer(a):
  return quickstart.tokenizer(a.root, quick=False)


def sft(a):
  c = _own(quickstart.sft(inside(a), quick=False), a)
  c.init_seed = a.seed
  return c


def pairs(a):
  c = _own(quickstart.pairs(inside(a), quick=False), a)
  c.sample.seed = 3 * a.seed  # of seed 0 all is as in the quickstart
  return c


def held_out(a):
  c = _own(quickstart.held_out(inside(a), quick=False), a)
  c.sample.seed = 3 * a.seed + 1
  return c


def reward_model(a):
  return _own(reward.on_reviews(inside(a), f"{inside(a)}/reward"), a)


def offline(a, name):
  c = quickstart.dpo(inside(a), quick=False)
  c.train.steps = STEPS
  return _checkpoints(c, a, name)


def dpo(a):
  return quickstart.at_beta(offline(a, "dpo"), a.beta)


def unlikelihood(a):
  c = offline(a, "unlikelihood")
  c.ref, c.loss = "none", losses.loss("unlikelihood")
  c.optim.learning_rate = 2e-4
  return c


def preferred_ft(a):
  """SFT on the winner of every pair."""
  c = offline(a, "preferred_ft")
  c.ref, c.loss = "none", losses.loss("sft")
  return c


def on_policy(a, name, scorer):
  c = ppo.on_reviews(inside(a), None, scorer)
  c.rollout.seed = a.seed
  return _checkpoints(c, a, name)


def ppo_learned(a):
  return on_policy(a, "ppo", f"reward:{inside(a)}/reward")


def ppo_gt(a):
  """On r* itself."""
  return on_policy(a, "ppo_gt", quickstart.TRUTH)


def best_of(a):
  """Best of N of the SFT policy, by the learned reward; r* tells its worth."""
  c = _own(quickstart.measured(quickstart.policy(inside(a), False)), a)
  c.workdir, c.init_from = f"{inside(a)}/best_of", f"{inside(a)}/sft"
  c.sample.draws = 16
  c.sample.best_of = (1, 4, 16)
  c.sample.rank_by = f"reward:{inside(a)}/reward"
  c.sample.scorers = (*c.sample.scorers, c.sample.rank_by)
  return c


def _own(c, a):
  """With the tokenizer of all seeds, and this one's seed."""
  c.tokenizer = f"{a.root}/tokenizer"
  c.data.seed = a.seed
  return c


def _checkpoints(c, a, name):
  """Sampled on its way, too."""
  c.workdir = f"{inside(a)}/{name}"
  c.checkpoint.every = -(-c.train.steps // POINTS)
  c.checkpoint.keep = 2 * POINTS  # one more where a run is stopped
  c.sample.checkpoints = True
  return _own(c, a)


STAGES = {
  "seed": one_seed,
  "tokenizer": tokenizer,
  "sft": sft,
  "pairs": pairs,
  "held_out": held_out,
  "reward": reward_model,
  "dpo": dpo,
  "unlikelihood": unlikelihood,
  "preferred_ft": preferred_ft,
  "ppo": ppo_learned,
  "ppo_gt": ppo_gt,
  "best_of": best_of,
}
