"""What `loss=` in the argument of a config means. Imports no jax.

The losses, their fields and defaults: `dpo-jax losses`, or
dpo_jax/ops/losses.
"""

import re

from ml_collections import config_dict

from dpo_jax import lookup
from dpo_jax.ops import losses


def parse(spec):
  """The terms of a loss: "0.8*dpo + 0.2*bco + nll" as [(weight, name), …].

  Raises: ValueError for an unknown name or a weight that is no number above 0.
  """
  text, terms = spec, []
  if spec in losses.MIXTURES:
    text = losses.MIXTURES[spec].terms
  for part in re.split(r"\s*\+\s*", text.strip()):
    weight, star, name = part.rpartition("*")
    whole = {} if star or "+" in spec else losses.MIXTURES
    lookup.lookup({**losses.LOSSES, **whole}, name.strip(), "loss")
    try:
      weight = float(weight) if star else 1.0
    except ValueError:
      weight = 0.0
    if not 0 < weight < float("inf"):
      raise ValueError(f"loss = {spec!r}: {part!r} must be WEIGHT*NAME or NAME")
    terms.append((weight, name.strip()))
  if len({name for _, name in terms}) < len(terms):
    raise ValueError(f"loss = {spec!r} names a loss twice")
  return terms


def loss(spec, divergence="reverse_kl"):
  """config.loss: the fields of a loss, or of each term of a mixture.

  Args:
    spec: the name of a loss or of a mixture, or terms "0.8*dpo+0.2*bco".
    divergence: "reverse_kl", or one of DIVERGENCES, which needs a loss of h.
  """
  terms = parse(spec)
  extra = {}
  if divergence != "reverse_kl":
    known = {"reverse_kl": None, **losses.DIVERGENCES}
    row = lookup.lookup(known, divergence, "divergence")
    extra = {"divergence": divergence, **row.defaults}
  if len(terms) == 1 and terms[0][0] == 1:
    name = terms[0][1]
    fields = {"name": name, **losses.LOSSES[name].defaults, **extra}
    return config_dict.ConfigDict(fields)
  if extra:
    raise ValueError(
      f"divergence = {divergence!r} is of one loss, not of the mixture {spec!r}"
    )
  own = losses.MIXTURES[spec].defaults if spec in losses.MIXTURES else {}
  parts = {
    name: {
      "weight": weight,
      **losses.LOSSES[name].defaults,
      **own.get(name, {}),
    }
    for weight, name in terms
  }
  return config_dict.ConfigDict({"name": "mixture", **parts})


def needs_reference(spec):
  """Whether any term of a loss reads the reference."""
  return any(losses.LOSSES[name].reference for _, name in parse(spec))


def compared(spec):
  """What a comparison of a loss is: "pairs", "rankings", … or "best" alone."""
  rows = [losses.LOSSES[name] for _, name in parse(spec)]
  kinds = [row.data for row in rows if not row.best_alone]
  return kinds[0] if kinds else "best"
