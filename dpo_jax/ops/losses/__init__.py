"""Preference losses: pure functions of completion log-probs.

Every loss is `f(policy_logps, ref_logps, *, ...) -> dict` with "loss" and the
reward metrics per comparison. Notation: Δ = log π − log π_ref of a completion,
h = Δ_w − Δ_l, ε the label smoothing, σ the logistic function, sg stop-gradient.
A numeric field of `config.loss` is traced and may change without recompiling; a
text field (a dialect) is static. `dpo-jax losses` prints the table.
"""

from dpo_jax.ops.losses import (
  divergences,
  free,
  margin,
  ranking,
  ratios,
  tokens,
)
from dpo_jax.ops.losses.base import Loss

DIVERGENCES, under = divergences.DIVERGENCES, divergences.under
bradley_terry, nll = ranking.bradley_terry, free.nll

LOSSES = {
  # Of the margin h.
  "dpo": Loss(margin.dpo, of_h=True),
  "robust": Loss(margin.robust, of_h=True),
  "ipo": Loss(
    margin.ipo, needs=("lengths",), dialects=("paper", "original"), of_h=True
  ),
  "hinge": Loss(margin.hinge, of_h=True),
  "exo": Loss(margin.exo, of_h=True),
  "discopop": Loss(margin.discopop, of_h=True),
  "chi_po": Loss(margin.chi_po),
  "ln_dpo": Loss(tokens.ln_dpo, needs=("lengths",)),
  "dpop": Loss(margin.dpop),
  "r_dpo": Loss(tokens.r_dpo, needs=("lengths",), of_h=True),
  "odpo": Loss(margin.odpo, needs=("scores",), of_h=True),
  "tdpo1": Loss(tokens.tdpo1, needs=("sequence_kl",)),
  "tdpo2": Loss(tokens.tdpo2, needs=("sequence_kl",)),
  "sampo": Loss(tokens.sampo, needs=("common_logps", "ref_common_logps")),
  "ld_dpo": Loss(tokens.ld_dpo, needs=("prefix_logps", "ref_prefix_logps")),
  "wpo": Loss(
    tokens.wpo, needs=("lengths", "sum_sq_probs"), dialects=("paper", "trl_1")
  ),
  # Of Δ_w and Δ_l apart.
  "nca": Loss(ratios.nca),
  "sppo": Loss(ratios.sppo),
  "apo_zero": Loss(ratios.apo_zero),
  "apo_down": Loss(ratios.apo_down),
  "cal_dpo": Loss(ratios.cal_dpo),
  "bco": Loss(
    ratios.bco,
    needs=("weights", "running"),
    batch_level=True,
    dialects=("paper", "trl_1"),
  ),
  "aot": Loss(ratios.aot, needs=("weights",), batch_level=True),
  "aot_unpaired": Loss(
    ratios.aot_unpaired, needs=("weights",), batch_level=True
  ),
  "kto_pair": Loss(ratios.kto_pair, needs=("weights",), batch_level=True),
  # Of single completions with labels.
  "kto": Loss(
    ratios.kto,
    needs=("labels", "weights"),
    batch_level=True,
    data="mismatched",
  ),
  "bco_unpaired": Loss(
    ratios.bco_unpaired,
    needs=("labels", "weights", "running"),
    batch_level=True,
    data="labels",
  ),
  # Of rankings.
  "plackett_luce": Loss(
    ranking.plackett_luce, needs=("present",), data="rankings"
  ),
  # Without a reference.
  "sft": Loss(free.sft, reference=False),
  "nll": Loss(free.nll, needs=("lengths",), reference=False),
  "unlikelihood": Loss(free.unlikelihood, reference=False),
  "slic": Loss(free.slic, reference=False),
  "simpo": Loss(free.simpo, needs=("lengths",), reference=False),
  "alphapo": Loss(free.alphapo, needs=("lengths",), reference=False),
  "orpo": Loss(free.orpo, needs=("lengths",), reference=False),
  "cpo": Loss(
    free.cpo, needs=("lengths",), reference=False, dialects=("paper", "trl_1")
  ),
  # Of reward models.
  "bradley_terry": Loss(bradley_terry, data="rewards", reference=False),
}
