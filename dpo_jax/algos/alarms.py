"""What deserves a look in a run that learns from its own samples.

A reward that rises says little by itself: a policy that went astray has one
too (arXiv:2307.04964).
"""

_MOST_KL = 50.0  # nats: at that no text of the reference is left


def of_rollouts(first, now, *, target=None):
  """{name: a line} of what went astray since a run began.

  Args:
    first, now: {metric: value} of the first steps logged, and of the last.
    target: sequence KL in nats that the run aims at, or None.
  """
  alarms = {}

  def alarm(name, when, text):
    value, began = now.get(name), first.get(name)
    if value is not None and began is not None and when(value, began):
      alarms[name] = f"{name} {value:.3g}, {text.format(began=began)}"

  most = _MOST_KL if target is None else 3 * target
  alarm(
    "objective/kl",
    lambda kl, _: kl > most,
    f"above {most:.3g} nats: the policy has left its reference; raise "
    "loss.beta, or lower the learning rate",
  )
  alarm(
    "objective/length",
    lambda length, began: not began / 2 <= length <= 2 * began,
    "{began:.3g} at first: the reward may be one of length; look at samples",
  )
  alarm(
    "objective/ended",
    lambda ended, began: ended < began / 2,
    "{began:.3g} at first: completions run to their limit; see "
    "rollout.missing_end",
  )
  alarm(
    "policy/entropy",
    lambda entropy, began: entropy < began / 3,
    "{began:.3g} at first: the policy writes the same again and again",
  )
  return alarms
