"""The algorithms, by the name that `config.algo` takes."""

from dpo_jax import lookup
from dpo_jax.algos import online, policy_gradient, preference, reward, sft
from dpo_jax.config import code

ALGOS = {
  "preference": preference.make,
  "sft": sft.make,
  "policy_gradient": policy_gradient.make,
  "reward": reward.make,
  "online": online.make,
}


def make(config, apply):
  """The Algorithm that `config.algo` names, of all parameters of a policy.

  Args:
    config: locked ConfigDict.
    apply: (params, batch) -> (hidden, Head); None where only what the
      algorithm needs is asked for.
  Raises: ValueError for what the algorithm cannot do.
  """
  make_one = lookup.lookup(ALGOS, config.algo, "algo")
  algorithm, own = make_one(config, apply), code.digest(make_one)
  if config.reward.centred and reward.HEAD not in algorithm.heads:
    raise ValueError(
      f"reward.centred = True has no effect with algo = {config.algo!r}, which "
      "trains no reward model: set it to False"
    )
  if own is None:
    return algorithm
  more = {f"ALGOS[{config.algo!r}]": own}
  return algorithm._replace(code=algorithm.code | more)
