"""The algorithms, by the name that `config.algo` takes."""

from dpo_jax.algos import preference, sft, terms

ALGOS = {"preference": preference.make, "sft": sft.make}


def kind_of(config):
  """What the examples of a config are made of: "sft", or losses.Loss.data."""
  if config.algo == "sft":
    return "sft"
  return terms.kind_of(config.loss)


def needs_of(config):
  """The names that the losses of a config need, see losses.Loss.needs."""
  if config.algo == "sft":
    return set()
  return {n for p in terms.of(config.loss) for n in p.loss.needs}
