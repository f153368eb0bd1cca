"""RL fine-tuning on a reward: PPO, and RLOO, GRPO and REINFORCE.

    dpo-jax train --config ppo --config.init_from=runs/sft \\
      --config.data.train=prompts.jsonl --workdir runs/ppo \\
      --config.rollout.scorer=reward:runs/rm

`ppo:loss=rloo` takes another estimator with its own defaults, `:model=…`,
`:optim=…` and `:lora` are those of configs/dpo.py; `:quickstart` is PPO on the
quickstart's film reviews, from its SFT policy, with the reward model of
`reward:quickstart` (with --config.rollout.scorer=sentiment:reviews:train on the
ground truth itself); `:smoke` two steps of a micro model.
"""

from dpo_jax.configs import base, common, quickstart


def sweep():
  for target in (3.0, 6.0, 9.0, 12.0):  # arXiv:2305.18290 section 6
    yield {"rollout.kl_target": target, "rollout.kl_horizon": 10_000}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    loss="ppo",
    model="tiny",
    optim="adamw",
    lora=False,
    quickstart=False,
    quick=False,
    smoke=False,
  )
  if arg.quickstart:
    root = f"runs/quickstart{'-quick' if arg.quick else ''}"
    workdir, scorer = f"{root}-{arg.loss}", f"reward:{root}-reward"
    return on_reviews(root, workdir, scorer, arg.quick, arg.loss)
  c = base.get_config()
  common.select_model(c, arg.model)
  common.select_optim(c, arg.optim, learning_rate=3e-5)
  policy_gradient(c, arg.loss)
  if arg.lora:
    c.lora, c.ref = common.lora(), "base"
  return smoke(c) if arg.smoke else c


def policy_gradient(c, loss):
  """Gives a config the algorithm, its loss and its rollouts."""
  c.algo = "policy_gradient"
  c.loss, c.rollout = common.policy_gradient(loss), common.rollout(loss)
  c.data.packed = False
  c.data.batch_size = 16
  if "eps" in c.optim:
    c.optim.eps = 1e-5
  return c


def on_reviews(root, workdir, scorer, quick=False, loss="ppo"):
  """On beginnings of the quickstart's reviews, four completions of each."""
  c = policy_gradient(quickstart.policy(root, quick), loss)
  quickstart.on_policy(c, root, scorer)
  c.workdir = workdir
  if c.rollout.draws == 1:  # nothing compares the completions of a prompt
    # A critic that begins at 0 would take a mean above that for merit, the more
    # so the nearer a token is to the end, and completions would shrink.
    c.rollout.draws, c.rollout.centre = 4, "prompt"
  c.rollout.prompts, c.rollout.epochs = 64, 2
  c.rollout.kl_target, c.rollout.kl_horizon = 4.0, 1000
  c.train.steps = 40
  c.optim.learning_rate = 5e-4
  c.optim.warmup = 5
  return c


def smoke(c):
  c = common.smoke(c)
  c.data.eval = None
  c.data.batch_size = 4
  c.data.max_completion_length = 8
  c.rollout.prompts = 8
  c.rollout.scorer = "vader"
  c.train.steps = 2 * c.rollout.epochs
  return c
