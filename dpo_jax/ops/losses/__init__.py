"""Preference losses: pure functions of completion log-probs.

Every loss is `f(policy_logps, ref_logps, *, ...) -> dict` with "loss" and the
reward metrics per comparison. Notation: Δ = log π − log π_ref of a completion,
h = Δ_w − Δ_l, ε the label smoothing, σ the logistic function, sg stop-gradient.
A numeric field of `config.loss` is traced and may change without recompiling; a
text field (a dialect) is static. `dpo-jax losses` prints the table.

All that is known of a loss stands in its row here. The functions are imported
when they are first used, so that a config needs no jax.
"""

from dpo_jax.ops.losses import facts
from dpo_jax.ops.losses.facts import Divergence, Loss, Mixture

LOSSES = {
  # Of the margin h.
  "dpo": Loss("margin.dpo", {"beta": 0.1, "label_smoothing": 0.0}, of_h=True),
  "robust": Loss(
    "margin.robust", {"beta": 0.1, "label_smoothing": 0.1}, of_h=True
  ),
  "ipo": Loss(
    "margin.ipo",
    {"beta": 0.1, "dialect": "paper"},
    needs=("lengths",),
    dialects=("paper", "original"),
    of_h=True,
  ),
  "hinge": Loss("margin.hinge", {"beta": 0.05}, of_h=True),
  "exo": Loss(
    "margin.exo",
    {"beta": 0.1, "label_smoothing": 1e-3},
    ranges={
      "label_smoothing": (
        facts.BELOW_HALF,
        facts.Bound(lambda x: x > 0, ": EXO needs it above 0"),
      )
    },
    of_h=True,
  ),
  "discopop": Loss(
    "margin.discopop", {"beta": 0.05, "temperature": 0.05}, of_h=True
  ),
  "chi_po": Loss("margin.chi_po", {"beta": 0.05}),
  "ln_dpo": Loss("tokens.ln_dpo", {"beta": 5.0}, needs=("lengths",)),
  "dpop": Loss("margin.dpop", {"beta": 0.3, "penalty": 50.0}),
  "r_dpo": Loss(
    "tokens.r_dpo", {"beta": 0.1, "alpha": 0.1}, needs=("lengths",), of_h=True
  ),
  "odpo": Loss(
    "margin.odpo", {"beta": 0.1, "alpha": 1.0}, needs=("scores",), of_h=True
  ),
  "tdpo1": Loss("tokens.tdpo1", {"beta": 0.1}, needs=("sequence_kl",)),
  "tdpo2": Loss(
    "tokens.tdpo2", {"beta": 0.1, "alpha": 0.5}, needs=("sequence_kl",)
  ),
  "sampo": Loss(
    "tokens.sampo", {"beta": 0.1}, needs=("common_logps", "ref_common_logps")
  ),
  "ld_dpo": Loss(
    "tokens.ld_dpo",
    {"beta": 0.1, "alpha": 0.5},
    ranges={"alpha": facts.SHARE},
    needs=("prefix_logps", "ref_prefix_logps"),
  ),
  "wpo": Loss(
    "tokens.wpo",
    {"beta": 0.01, "dialect": "paper"},
    needs=("lengths", "sum_sq_probs"),
    dialects=("paper", "trl_1"),
  ),
  # Of Δ_w and Δ_l apart.
  "nca": Loss("ratios.nca", {"beta": 0.01}),
  "sppo": Loss("ratios.sppo", {"beta": 0.001}),
  "apo_zero": Loss("ratios.apo_zero", {"beta": 0.1}),
  "apo_down": Loss("ratios.apo_down", {"beta": 0.1}),
  "cal_dpo": Loss("ratios.cal_dpo", {"beta": 0.002}),
  "bco": Loss(
    "ratios.bco",
    {"beta": 0.01, "dialect": "paper"},
    needs=("weights", "running"),
    batch_level=True,
    dialects=("paper", "trl_1"),
  ),
  "aot": Loss(
    "ratios.aot",
    {"beta": 0.01, "label_smoothing": 0.0},
    needs=("weights",),
    batch_level=True,
  ),
  "aot_unpaired": Loss(
    "ratios.aot_unpaired",
    {"beta": 0.01, "label_smoothing": 0.0},
    needs=("weights",),
    batch_level=True,
  ),
  "kto_pair": Loss(
    "ratios.kto_pair", {"beta": 0.1}, needs=("weights",), batch_level=True
  ),
  # Of single completions with labels.
  "kto": Loss(
    "ratios.kto",
    {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    needs=("labels", "weights"),
    batch_level=True,
    data="mismatched",
  ),
  "bco_unpaired": Loss(
    "ratios.bco_unpaired",
    {"beta": 0.01},
    needs=("labels", "weights", "running"),
    batch_level=True,
    data="labels",
  ),
  # Of rankings.
  "plackett_luce": Loss(
    "ranking.plackett_luce", {"beta": 0.1}, needs=("present",), data="rankings"
  ),
  # Without a reference.
  "sft": Loss("free.sft", best_alone=True, reference=False),
  "nll": Loss("free.nll", needs=("lengths",), best_alone=True, reference=False),
  "unlikelihood": Loss(
    "free.unlikelihood",
    {"alpha": 0.5},
    ranges={"alpha": facts.SHARE},
    reference=False,
  ),
  "slic": Loss("free.slic", {"delta": 1.0, "nll_weight": 0.1}, reference=False),
  "simpo": Loss(
    "free.simpo",
    {"beta": 2.0, "gamma": 1.0},
    needs=("lengths",),
    reference=False,
  ),
  "alphapo": Loss(
    "free.alphapo",
    {"beta": 2.5, "gamma": 0.1, "alpha": 0.25},
    ranges={"alpha": facts.ANY},  # it bends either way
    needs=("lengths",),
    reference=False,
  ),
  "orpo": Loss(
    "free.orpo", {"odds_weight": 0.1}, needs=("lengths",), reference=False
  ),
  "cpo": Loss(
    "free.cpo",
    {"beta": 0.1, "alpha": 1.0, "dialect": "paper"},
    needs=("lengths",),
    reference=False,
    dialects=("paper", "trl_1"),
  ),
  # Of reward models.
  "bradley_terry": Loss(
    "ranking.bradley_terry",
    {"label_smoothing": 0.0, "centring": 0.0},
    data="rewards",
    reference=False,
  ),
  "bradley_terry_margin": Loss(
    "ranking.bradley_terry_margin",
    {"alpha": 1.0, "centring": 0.0},
    needs=("scores",),
    data="rewards",
    reference=False,
  ),
  "plackett_luce_reward": Loss(
    "ranking.plackett_luce_reward",
    {"centring": 0.0},
    needs=("present",),
    data="reward_rankings",
    reference=False,
  ),
}

# What a number may be, by its name, where the row of its loss says nothing.
RANGES = {
  "beta": (facts.ABOVE_ZERO,),
  "desirable_weight": (facts.ABOVE_ZERO,),
  "undesirable_weight": (facts.ABOVE_ZERO,),
  "delta": (facts.ABOVE_ZERO,),
  "weight": (facts.ABOVE_ZERO,),  # of a term of a mixture
  "temperature": (facts.ABOVE_ZERO, facts.AT_MOST_ONE),
  "alpha": (facts.AT_LEAST_ZERO,),
  "gamma": (facts.AT_LEAST_ZERO,),
  "penalty": (facts.AT_LEAST_ZERO,),
  "odds_weight": (facts.AT_LEAST_ZERO,),
  "nll_weight": (facts.AT_LEAST_ZERO,),
  "centring": (facts.AT_LEAST_ZERO,),
  "label_smoothing": (facts.BELOW_HALF,),
}

# f-divergences in the place of the reverse KL, for losses of h.
DIVERGENCES = {
  "forward_kl": Divergence("divergences.forward_kl"),
  "js": Divergence("divergences.jensen_shannon"),
  "alpha": Divergence(
    "divergences.alpha_divergence", {"divergence_alpha": 0.5}
  ),
}

# Published mixtures (arXiv:2404.19733, arXiv:2411.10442).
MIXTURES = {
  "rpo": Mixture("dpo+nll"),
  "mpo": Mixture("0.8*dpo+0.2*bco+nll", {"bco": {"beta": 0.1}}),
}


def check_ranges(name, fields, prefix=""):
  """Refuses a number of a loss, in config.loss, that is out of its range."""
  ranges = LOSSES[name].ranges if name in LOSSES else {}
  for field, value in fields.items():
    for bound in ranges.get(field, RANGES.get(field, ())):
      if not bound.holds(value):
        raise ValueError(f"loss.{prefix}{field} = {value}{bound.words}")
