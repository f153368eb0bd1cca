"""The paper's comparison of methods in a language where all is exact.

    dpo-jax sweep --config frontier_exact
    dpo-jax report --workdir runs/frontier_exact

Four words of eight behind a prompt: all answers can be listed, so E[r], the KL,
the optimum and the frontier are sums and no estimates. A small transformer
learns the language, answers are compared by r*, and every method starts from
the same policy and comparisons: ten seeds, both labellings, learning rates
chosen on two seeds of their own, by the same rule for every method. Which
claims are tested, how, and what would count against them, is `study.claims`,
fixed before the run. `:smoke` is two seeds and a few steps.
"""

from ml_collections import config_dict

from dpo_jax.configs import base, common

# As many settings of each method, over the same KLs.
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
TARGETS = (0.5, 1.0, 1.5, 2.0, 3.0)  # nats
ALPHAS = (0.05, 0.1, 0.25, 0.5, 1.0)
# What each method is swept over.
POINTS = {
  "dpo": [{"loss.beta": beta} for beta in BETAS],
  "ipo": [{"loss.beta": beta} for beta in BETAS],
  "cdpo": [{"loss.beta": beta} for beta in BETAS],
  "unlikelihood": [{"loss.alpha": alpha} for alpha in ALPHAS],
  "preferred_ft": [{}],
  "ppo": [{"rollout.kl_target": kl} for kl in TARGETS],
  "ppo_gt": [{"rollout.kl_target": kl} for kl in TARGETS],
  "rloo": [{"rollout.kl_target": kl} for kl in TARGETS],
}


def sweep():
  for name, points in POINTS.items():
    for point in points:
      yield {"arg": f"method={name}", **point}


def get_config(arg=None):
  arg = common.parse_arg(arg, method="dpo", smoke=False)
  c = base.get_config()
  c.workdir = "runs/frontier_exact"
  c.language, c.study = language(), study()
  c.model = common.model("micro")
  c.model.unroll = c.model.layers
  c.model.attention = "xla"
  c.optim = common.optim("adamw")
  c.optim.schedule, c.optim.warmup, c.optim.clip_norm = "linear", 10, 1.0
  c.optim.learning_rate = 3e-3
  c.data.packed = False
  c.data.batch_size = 12  # groups, of six comparisons each
  c.train.steps = 600  # updates of every method
  common.choose(arg.method, METHODS)(c)
  return smoke(c) if arg.smoke else c


def language():
  o = config_dict.ConfigDict()
  o.words, o.length, o.prompts = 8, 4, 2
  o.seed = 0  # of r* and of the demonstrations' language
  return o


def study():
  o = config_dict.ConfigDict()
  # The least p of n seeds is 2⁻ⁿ, and Holm multiplies it by the number of
  # comparisons: with eight of these, nine seeds could show nothing.
  o.seeds = tuple(range(10))
  o.tuning_seeds = (100, 101)
  # Learning rates that are tried of a method. Each has four, moved on the
  # tuning seeds until the best of them was not the first or the last.
  o.rates = (1e-4, 3e-4, 1e-3, 3e-3)
  o.labels = ("bradley_terry", "deterministic")
  o.label_scale = 8.0  # κ: i beats j with probability σ(κ (r*_i − r*_j))
  o.groups = 1000  # of answers that are compared with one another
  o.draws = 4  # answers of a group
  o.best_of = (1, 4, 16, 64, 128)
  o.checkpoints = 28  # of a run, at steps that grow by a factor
  o.lanes = 10  # runs in one program
  o.workers = 2  # programs at once: such small ones keep one core busy
  o.claims = claims()
  return o


def claims():
  """What is asked of the results (PAPER section 6 and its review)."""
  o = config_dict.ConfigDict()
  # A method's envelope at a KL is its best reward until there; its gap is the
  # mean distance to the exact frontier over these KLs (nats).
  o.grid = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
  o.near = 0.1  # both methods must have a checkpoint within this share of a KL
  o.method = "dpo"
  o.against = (
    *("ppo", "ppo_gt", "rloo", "unlikelihood", "preferred_ft"),
    *("best_of", "ipo", "cdpo"),
  )
  o.level = 0.01  # of the sign-flip tests, after Holm
  o.margin = 0.01  # reward within which two methods are on par
  o.resamples = 10_000  # of the bootstrap, over seeds
  o.seed = 0  # of the bootstrap
  o.trend = "dpo"  # the method whose final KL must fall with β
  return o


def preference(name, **fields):
  def apply(c):
    c.algo, c.ref, c.loss = "preference", "cached", common.loss(name)
    c.loss.update(fields)
    if name == "unlikelihood":
      c.ref = "none"

  return apply


def reference(c):
  """What all methods start from: fitted to demonstrations."""
  c.algo, c.ref, c.loss = "sft", "none", common.loss("sft")
  c.data.batch_size = 16
  c.train.steps = 500


def preferred_ft(c):
  c.algo, c.ref, c.loss = "sft", "none", common.loss("sft")
  c.study.rates = (1e-3, 3e-3, 1e-2, 3e-2)


def reward(c):
  """The reward model, from the reference (three epochs)."""
  c.algo, c.ref, c.loss = "reward", "none", common.loss("bradley_terry")
  c.train.steps = 250
  c.optim.eps = 1e-5  # arXiv:2403.17031


def policy_gradient(name, scorer):
  def apply(c):
    c.algo = "policy_gradient"
    c.loss, c.rollout = common.policy_gradient(name), common.rollout(name)
    c.loss.beta = 0.2
    c.rollout.scorer = scorer
    c.rollout.prompts = c.data.batch_size = 32
    c.rollout.draws, c.rollout.epochs = 4, 4
    c.rollout.kl_target, c.rollout.kl_horizon = 1.0, 800
    c.optim.eps = 1e-5

  return apply


METHODS = {
  "reference": reference,
  "reward": reward,
  "dpo": preference("dpo"),
  "ipo": preference("ipo"),
  "cdpo": preference("dpo", label_smoothing=0.1),
  "unlikelihood": preference("unlikelihood"),
  "preferred_ft": preferred_ft,
  "ppo": policy_gradient("ppo", "learned"),
  "ppo_gt": policy_gradient("ppo", "true"),
  "rloo": policy_gradient("rloo", "learned"),
}


def smoke(c):
  c.study.seeds, c.study.tuning_seeds = (0, 1), (100,)
  c.study.rates = (1e-3, 3e-3)
  c.study.groups, c.study.checkpoints, c.study.lanes = 64, 3, 4
  c.language.words, c.language.length = 4, 3
  c.train.steps = 24
  return c
