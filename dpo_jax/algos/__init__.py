"""The algorithms, by the name that `config.algo` takes."""

from dpo_jax.algos import preference, sft

ALGOS = {"preference": preference.make, "sft": sft.make}
