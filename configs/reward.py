"""A reward model on pairs of text, or on rankings.

    dpo-jax train --config reward \\
      --config.data.train=my.jsonl --workdir runs/reward

trains a scalar head and the model below it (arXiv:2305.18290 Eq. 2). Its run
folder is a scorer, `sample.scorers=reward:runs/reward`. `:loss=` takes
bradley_terry, bradley_terry_margin (of data with scores) or
plackett_luce_reward (of rankings); `:model=hf:NAME` starts from a pre-trained
model, `--config.init_from=runs/sft` from a run; `:optim=rmsprop` takes another
optimiser, `:lora` trains an adapter and the head, `:quickstart` is the reward
model of the quickstart's pairs, from its SFT policy, `:smoke` two steps of a
micro model on generated pairs.
"""

from dpo_jax.configs import base, common, quickstart


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    loss="bradley_terry",
    model="tiny",
    optim="adamw",
    lora=False,
    quickstart=False,
    quick=False,
    smoke=False,
  )
  if arg.quickstart:
    root = f"runs/quickstart{'-quick' if arg.quick else ''}"
    return on_reviews(root, f"{root}-reward", arg.quick, arg.loss)
  c = base.get_config()
  c.algo = "reward"
  c.loss = common.loss(arg.loss)
  c.ref = "none"
  c.reward.centred, c.reward.count = True, 1024
  common.select_model(c, arg.model)
  common.select_optim(c, arg.optim, learning_rate=3e-4)
  if arg.optim == "adamw":
    c.optim.eps = 1e-5  # arXiv:2403.17031
  if arg.lora:
    c.lora = common.lora()
  if arg.smoke:
    c = common.smoke(c)
  return c


def on_reviews(root, workdir, quick=False, loss="bradley_terry"):
  """On the quickstart's pairs of film reviews; r* labelled them."""
  c = quickstart.on_pairs(quickstart.policy(root, quick), root)
  c.workdir = workdir
  c.algo, c.ref, c.loss = "reward", "none", common.loss(loss)
  c.reward.centred = c.reward.unit = True
  c.train.epochs = 2.0
  c.optim.learning_rate = 1e-3
  c.optim.eps = 1e-5
  return c
