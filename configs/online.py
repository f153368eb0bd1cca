"""Online DPO: what the policy samples is compared by a scorer.

Any preference loss learns from it.

    dpo-jax train --config online --config.init_from=runs/sft \\
      --config.data.train=prompts.jsonl --workdir runs/online \\
      --config.rollout.scorer=reward:runs/rm

`online:loss=ipo` takes another loss of pairs, or plackett_luce, with its own
defaults; `loss=nll` trains on the best of the completions alone (expert
iteration); `:round=8` makes the policy the reference after every 8 iterations.
`:divergence=…`, `:model=…`, `:optim=…` and `:lora` are those of configs/dpo.py;
`:quickstart` is online DPO on the ground truth of the quickstart's film
reviews, from its SFT policy; `:smoke` two steps of a micro model. With
--config.rollout.scorer=implicit:FOLDER the run of that folder, trained on
comparisons, is the judge. data.eval may name held-out comparisons.
"""

from dpo_jax.configs import base, common, losses, quickstart


def sweep():
  for beta in (0.05, 0.1, 1.0, 5.0):
    yield {"loss.beta": beta}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    loss="dpo",
    divergence="reverse_kl",
    round=0,
    model="tiny",
    optim="adamw",
    lora=False,
    quickstart=False,
    quick=False,
    smoke=False,
  )
  if arg.quickstart:
    return in_rounds(on_reviews(arg), arg.round)
  c = base.get_config()
  common.select_model(c, arg.model)
  common.select_optim(c, arg.optim, learning_rate=3e-5)
  online(c, arg)
  if arg.smoke:
    smoke(c)
  return in_rounds(c, arg.round)


def online(c, arg):
  """Gives a config the algorithm, its loss and its rollouts."""
  c.algo = "online"
  c.loss = losses.loss(arg.loss, arg.divergence)
  c.rollout = common.rollout_of_comparisons(arg.loss)
  c.ref = "base" if arg.lora else "frozen"
  if not losses.needs_reference(arg.loss):
    c.ref = "none"
  if arg.lora:
    c.lora = common.lora()
  c.data.packed = False
  c.data.batch_size = 16
  return c


def in_rounds(c, iterations):
  """Moves the reference to the policy after every so many iterations."""
  if iterations:
    per_iteration = c.rollout.epochs * (c.rollout.prompts // c.data.batch_size)
    c.ref, c.ref_mix, c.ref_every = "ema", 1.0, iterations * per_iteration
  return c


def on_reviews(arg):
  """On beginnings of the quickstart's reviews, with its r* as the scorer."""
  root = f"runs/quickstart{'-quick' if arg.quick else ''}"
  c = online(quickstart.policy(root, arg.quick), arg)
  quickstart.on_policy(c, root, quickstart.TRUTH)
  c.workdir = f"{root}-online-{arg.loss}"
  c.train.steps = 100
  c.optim.learning_rate = 5e-4
  c.optim.schedule = "linear"
  c.optim.warmup = 10
  return c


def smoke(c):
  c = common.smoke(c)
  c.data.eval = "toy:8"
  c.data.batch_size = 4
  c.data.max_completion_length = 8
  c.rollout.prompts = 8
  c.rollout.scorer = "vader"
  c.train.steps = 4
  return c
