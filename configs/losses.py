"""The fields of every loss, with its paper's defaults. Imports no jax."""

import re

from ml_collections import config_dict

from dpo_jax import lookup

# What each computes: `dpo-jax losses`, or dpo_jax/ops/losses.
LOSSES = {
  "dpo": {"beta": 0.1, "label_smoothing": 0.0},
  "robust": {"beta": 0.1, "label_smoothing": 0.1},
  "ipo": {"beta": 0.1, "dialect": "paper"},
  "hinge": {"beta": 0.05},
  "exo": {"beta": 0.1, "label_smoothing": 1e-3},
  "discopop": {"beta": 0.05, "temperature": 0.05},
  "chi_po": {"beta": 0.05},
  "ln_dpo": {"beta": 5.0},
  "dpop": {"beta": 0.3, "penalty": 50.0},
  "r_dpo": {"beta": 0.1, "alpha": 0.1},
  "odpo": {"beta": 0.1, "alpha": 1.0},
  "tdpo1": {"beta": 0.1},
  "tdpo2": {"beta": 0.1, "alpha": 0.5},
  "sampo": {"beta": 0.1},
  "ld_dpo": {"beta": 0.1, "alpha": 0.5},
  "wpo": {"beta": 0.01, "dialect": "paper"},
  "nca": {"beta": 0.01},
  "sppo": {"beta": 0.001},
  "apo_zero": {"beta": 0.1},
  "apo_down": {"beta": 0.1},
  "cal_dpo": {"beta": 0.002},
  "bco": {"beta": 0.01, "dialect": "paper"},
  "aot": {"beta": 0.01, "label_smoothing": 0.0},
  "aot_unpaired": {"beta": 0.01, "label_smoothing": 0.0},
  "kto_pair": {"beta": 0.1},
  "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
  "bco_unpaired": {"beta": 0.01},
  "plackett_luce": {"beta": 0.1},
  "sft": {},
  "nll": {},
  "unlikelihood": {"alpha": 0.5},
  "slic": {"delta": 1.0, "nll_weight": 0.1},
  "simpo": {"beta": 2.0, "gamma": 1.0},
  "alphapo": {"beta": 2.5, "gamma": 0.1, "alpha": 0.25},
  "orpo": {"odds_weight": 0.1},
  "cpo": {"beta": 0.1, "alpha": 1.0, "dialect": "paper"},
  "bradley_terry": {},
}

# Published mixtures (arXiv:2404.19733, arXiv:2411.10442), and where a term has
# another default in them.
MIXTURES = {"rpo": "dpo+nll", "mpo": "0.8*dpo+0.2*bco+nll"}
_IN_MIXTURES = {"mpo": {"bco": {"beta": 0.1}}}

WITHOUT_REFERENCE = (
  *("sft", "nll", "unlikelihood", "slic", "simpo", "alphapo", "orpo", "cpo"),
  "bradley_terry",
)

# f-divergences of f-DPO, and the fields that each adds to its loss.
DIVERGENCES = {
  "reverse_kl": {},
  "forward_kl": {},
  "js": {},
  "alpha": {"divergence_alpha": 0.5},
}


def parse(spec):
  """The terms of a loss: "0.8*dpo + 0.2*bco + nll" as [(weight, name), …].

  Raises: ValueError for an unknown name or a weight that is no number above 0.
  """
  terms = []
  for part in re.split(r"\s*\+\s*", MIXTURES.get(spec, spec).strip()):
    weight, star, name = part.rpartition("*")
    known = LOSSES if star or "+" in spec else {**LOSSES, **MIXTURES}
    lookup.lookup(known, name.strip(), "loss")
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
    divergence: of DIVERGENCES; another than the reverse KL needs a loss of h.
  """
  terms = parse(spec)
  extra = lookup.lookup(DIVERGENCES, divergence, "divergence")
  if divergence != "reverse_kl":
    extra = {"divergence": divergence, **extra}
  if len(terms) == 1 and terms[0][0] == 1:
    name = terms[0][1]
    return config_dict.ConfigDict({"name": name, **LOSSES[name], **extra})
  if extra:
    raise ValueError(
      f"divergence = {divergence!r} is of one loss, not of the mixture {spec!r}"
    )
  own = _IN_MIXTURES.get(spec, {})
  parts = {
    name: {"weight": weight, **LOSSES[name], **own.get(name, {})}
    for weight, name in terms
  }
  return config_dict.ConfigDict({"name": "mixture", **parts})


def needs_reference(spec):
  """Whether any term of a loss reads the reference."""
  return any(name not in WITHOUT_REFERENCE for _, name in parse(spec))
