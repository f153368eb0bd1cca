"""What config.rollout must satisfy, and what goes with it."""

from dpo_jax import lookup
from dpo_jax.ops import rl
from dpo_jax.run import checks

MISSING_END = ("keep", "replace", "subtract")
CENTRES = ("none", "prompt")
CRITICS = ("head", "copy", "none")
LABELS = checks.LABELS[1:]
COMPARE = ("all", "best_worst")
# Fields that not all rollouts have, by Algorithm.compares.
OWN = {
  None: (
    *("kl_target", "kl_horizon", "kl_stop"),
    *("centre", "critic", "critic_from", "warmup"),
  ),
  "pairs": ("labels", "label_scale", "compare"),
  "rankings": ("labels", "label_scale"),
  "best": (),
}


def check(config, algorithm):
  """Refuses rollouts that no run can have, and those without effect.

  Args:
    algorithm: base.Algorithm of the config.
  """
  rollout, algo = config.rollout, config.algo
  if algorithm.data != "prompts":
    if rollout is not None:
      raise ValueError(
        f"rollout has no effect with algo = {algo!r}, which samples nothing "
        "while it trains: set it to None"
      )
    return
  if rollout is None:
    raise ValueError(
      f"algo = {algo!r} samples its own completions: set config.rollout = "
      "common.rollout(), as configs/ppo.py does, or that of configs/online.py"
    )
  _check_fields(config, algorithm.compares)
  lookup.lookup(MISSING_END, rollout.missing_end, "rollout.missing_end")
  rules = [*_rules(config, rollout)]
  if algorithm.compares is None:
    lookup.lookup(CRITICS, rollout.critic, "rollout.critic")
    lookup.lookup(CENTRES, rollout.centre, "rollout.centre")
    rules += _rules_of_gradients(config, rollout)
  else:
    rules += _rules_of_comparisons(config, rollout, algorithm)
  for obeyed, otherwise in rules:
    if not obeyed:
      raise ValueError(otherwise)


def _check_fields(config, compares):
  """Refuses fields of config.rollout that are of another algorithm."""
  every = {name for names in OWN.values() for name in names}
  has, takes = every & set(config.rollout), set(OWN[compares])
  if has == takes:
    return
  make = "common.rollout(NAME)"
  if compares is not None:
    make = "common.rollout_of_comparisons(LOSS)"
  raise ValueError(
    f"config.rollout has the fields {sorted(has)} of its own, but algo = "
    f"{config.algo!r} with loss {config.loss.name!r} takes {sorted(takes)}; "
    f"set config.rollout = {make}, or select the loss by the config's argument"
  )


def _rules(c, r):
  """Yields (whether a config obeys, what to say if not)."""
  yield (
    c.data.train is not None,
    f"data.train = None: algo = {c.algo!r} takes its prompts from there",
  )
  yield (
    r.scorer is not None,
    "rollout.scorer = None: completions need a reward, see eval/rewards.py, "
    "for example --config.rollout.scorer=reward:FOLDER",
  )
  yield (
    r.prompts % c.data.batch_size == 0,
    f"rollout.prompts = {r.prompts} of an iteration is no multiple of "
    f"data.batch_size = {c.data.batch_size}, the prompts of a step",
  )
  yield (
    not c.data.packed,
    "data.packed = True: every batch of rollouts has one shape, a row for each "
    "prompt; set it to False",
  )
  yield (
    (r.missing_score is None) == (r.missing_end == "keep"),
    f"rollout.missing_score = {r.missing_score} with rollout.missing_end = "
    f"{r.missing_end!r}: it is of 'replace' and 'subtract', which need it",
  )
  yield checks.prefix(r.prefix, "rollout.prefix")


def _rules_of_gradients(c, r):
  """`_rules` of policy gradients."""
  name, estimator = c.loss.name, rl.ESTIMATORS[c.loss.name]
  yield (
    (r.kl_target is None) == (r.kl_horizon is None),
    f"rollout.kl_target = {r.kl_target}, rollout.kl_horizon = {r.kl_horizon}: "
    "an adaptive coefficient needs both (10,000 completions, say), a fixed one "
    "neither",
  )
  wanted = "frozen" if c.lora is None else "base"
  yield (
    c.ref == wanted,
    f"ref = {c.ref!r}: loss {name!r} needs a reference that stays: set ref = "
    f"{wanted!r}",
  )
  allowed = CRITICS[:2] if estimator.critic else CRITICS[2:]
  yield (
    r.critic in allowed,
    f"rollout.critic = {r.critic!r} with loss {name!r}: it must be "
    f"{' or '.join(map(repr, allowed))}",
  )
  yield (
    r.draws > 1 or not estimator.group,
    f"rollout.draws = {r.draws}: loss {name!r} compares the completions of a "
    "prompt; set it to 2 or more",
  )
  yield (
    r.centre == "none" or r.draws > 1,
    f"rollout.centre = {r.centre!r} with rollout.draws = 1: every score would "
    "be 0; draw 2 or more",
  )
  yield (
    r.centre == "none" or not estimator.group or r.missing_end == "replace",
    f"rollout.centre = {r.centre!r} has no effect with loss {name!r}, which "
    "compares the completions of a prompt already; set it to 'none'",
  )
  yield (
    r.kl_target is None or c.loss.beta > 0,
    f"rollout.kl_target = {r.kl_target} with loss.beta = 0: there is no "
    "coefficient to adapt; start it at 0.05, say",
  )
  yield (
    r.critic_from is None or r.critic == "copy",
    f"rollout.critic_from = {r.critic_from!r} has no effect with "
    f"rollout.critic = {r.critic!r}: set that to 'copy'",
  )
  yield (
    not r.warmup or estimator.critic,
    f"rollout.warmup = {r.warmup} has no effect with loss {name!r}, which has "
    "no critic; set it to 0",
  )


def _rules_of_comparisons(c, r, algorithm):
  """`_rules` of losses that compare the completions of a prompt."""
  name = c.loss.name
  yield (
    r.draws > 1,
    f"rollout.draws = {r.draws}: algo = {c.algo!r} compares the completions of "
    "a prompt; set it to 2 or more",
  )
  yield (
    r.scorer != "implicit",
    "rollout.scorer = 'implicit': the implicit reward is that of another run, "
    "implicit:FOLDER. A policy's own is 0 where it begins, and labels drawn by "
    "it have no expected gradient",
  )
  yield (
    c.ref != "cached",
    f"ref = 'cached' needs completions that are there before the run, and algo "
    f"= {c.algo!r} samples its own: set ref = 'frozen'",
  )
  if "labels" not in r:
    return
  lookup.lookup(LABELS, r.labels, "rollout.labels")
  yield (
    (r.label_scale is None) == (r.labels == "deterministic"),
    f"rollout.label_scale = {r.label_scale} with rollout.labels = "
    f"{r.labels!r}: it is κ of 'bradley_terry', which needs it (1.0); by "
    "'deterministic' set it to None",
  )
  yield (
    "scores" not in algorithm.needs or r.labels == "deterministic",
    f"rollout.labels = {r.labels!r} with loss {name!r}, which needs winners "
    "with the higher score: set it to 'deterministic', and "
    "rollout.label_scale to None",
  )
  if "compare" in r:
    lookup.lookup(COMPARE, r.compare, "rollout.compare")
    yield (
      r.compare == "all" or r.draws > 2,
      f"rollout.compare = {r.compare!r} has no effect with rollout.draws = 2, "
      "which are one pair: set it to 'all', or draw more",
    )
