"""Best-of-N: what the highest ranked of N draws of a prompt is worth.

One scorer ranks the draws, another (or the same) measures the one chosen: the
ground truth r*. Every N comes from one set of M ≥ N draws a prompt, by the mean
over all C(M, N) subsets, which no one needs to list:

    E[r* of the chosen] = Σ_j w_j r*_j
    w_j = C(j − 1, N − 1) / C(M, N)       j = 1 … M in the order of the ranking

w_j is the chance that draw j is in a random subset and ranks above the rest of
it. Draws that rank alike share their weights evenly, as if the subset's winner
were drawn among them. The mean is unbiased for N fresh draws, since a subset of
independent draws is N independent draws.

How far from the policy π that is drawn from. The chosen draw's distribution is

    π_N(y) = π(y) (F(y)^N − F(<y)^N) / p(y)

with F the share of π that ranks no higher than y, F(<y) lower, and p = F − F(<)
that ranks alike. Where no two texts rank alike

    KL(π_N ‖ π) = log N − (N − 1)/N

whatever the reward; where some do, that is an upper bound. The log-ratio of the
chosen draw between two models cannot measure this KL: its policy and reference
are one model, and the ratio 0. What can be measured is how the draws tie, which
is all that the KL depends on beside N: `kl` estimates it from them. A share of
π that is so small that no two of M draws tie in it counts as continuous, so the
estimate is between the KL and the bound, up to the noise of F. From another
reference than π, the KL has a second part, which is an ordinary mean:

    KL(π_N ‖ π_ref) = KL(π_N ‖ π) + E_{π_N}[log π − log π_ref]

Source: arXiv:2305.18290 section 6 and appendix D.1 (the method);
arXiv:2107.03374 Eq. 1 (the mean over subsets, of pass@k); arXiv:2009.01325
appendix G.3 (the KL); arXiv:2401.01879 (a bound, not tight where texts rank
alike).
"""

import collections
import math

import numpy as np

from dpo_jax.eval import statistics


def weights(scores, n):
  """The chance of each draw to be the best of n of them, f64[M]; they sum to 1.

  By a running product from the best draw down, w_M = n / M and
  w_{j−1} = w_j (j − n) / (j − 1): no binomial is ever formed.

  Args:
    scores: f[M] by which draws are ranked, finite; the highest is the best.
    n: in 1 … M.
  """
  count = len(scores)
  assert 1 <= n <= count, (n, count)
  below = np.arange(count, 1, -1)  # j, of the steps from w_j to w_{j−1}
  steps = np.maximum(below - n, 0) / (below - 1)
  ranked = n / count * np.cumprod([1.0, *steps])[::-1]
  _, place, alike = np.unique(
    np.asarray(scores, np.float64), return_inverse=True, return_counts=True
  )
  shared = np.add.reduceat(ranked, np.cumsum(alike) - alike) / alike
  return shared[place]


def bound(n):
  """log n − (n − 1)/n in nats: KL(π_N ‖ π), or more where texts rank alike."""
  return math.log(n) - (n - 1) / n


def kl(scores, n):
  """KL(π_N ‖ π) in nats as the ties among the draws tell it, see above.

  Draws that rank alike are an atom of their share p of π, on (a, b] of F:

      (bᴺ − aᴺ) log((bᴺ − aᴺ) / p)

  and a draw that ranks like no other is a stretch of a continuous reward:

      ∫_a^b N uᴺ⁻¹ log(N uᴺ⁻¹) du

  Args: as `weights`.
  Returns: float, at most bound(n); that exactly if no draws tie.
  """
  _, alike = np.unique(np.asarray(scores, np.float64), return_counts=True)
  above = np.cumsum(alike)
  high, low = above / above[-1], (above - alike) / above[-1]
  gain = high**n - low**n
  smooth = np.log(n) * gain + (n - 1) * (_moment(high, n) - _moment(low, n))
  safe = np.where(gain > 0, gain, 1.0)  # the worst of many are never chosen
  atom = gain * np.log(safe / (high - low))
  return float(np.sum(np.where(alike == 1, smooth, atom)))


def _moment(u, n):
  """∫_0^u log v d(vⁿ)."""
  log = np.log(np.where(u > 0, u, 1.0))
  return u**n * (log - 1 / n)


def measure(rows, counts, ranking):
  """Best-of-N of some samples, for every N.

  Args:
    rows: dicts of samples, see completions.describe; those of a prompt have one
      "id" and there are at least max(counts) of them. With "log_ratio" in all
      of them, they are measured against a reference too.
    counts: the N.
    ranking: key of the reward by which draws are ranked.
  Returns: {"ranking", "prompts", "draws", "best_of"}; the last is a list of
    {"n", "bound", "means"}: the bound of the KL from what is drawn from, in
    nats; and {"mean", "se"} over prompts, of the chosen draw, of every
    "reward/NAME", of "length" in tokens, of "kl" from what is drawn from, as
    ties tell it, and, against a reference, of "kl_from_reference": the bound
    and the log-ratio of the chosen draw together.
  Raises: ValueError for a reward that is not finite.
  """
  names = [key for key in rows[0] if key.startswith("reward/")]
  names += ["length", *(["log_ratio"] if "log_ratio" in rows[0] else [])]
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row["id"]].append([row[name] for name in names])
  values = {name: [] for name in names}  # an array of its draws a prompt
  for group in groups.values():
    for name, column in zip(names, np.asarray(group, float).T, strict=True):
      values[name].append(column)
  for name in names:
    bad = sum(int(np.sum(~np.isfinite(x))) for x in values[name])
    if bad:
      raise ValueError(
        f"sample.best_of: {name} of {bad} of {len(rows)} draws is not a finite "
        "number, so that they cannot be ranked or measured; mend its scorer"
      )
  scores = values[ranking]
  return {
    "ranking": ranking,
    "prompts": len(scores),
    "draws": min(map(len, scores)),
    "best_of": [_of(values, scores, n) for n in counts],
  }


def _of(values, scores, n):
  """An item of "best_of", see `measure`."""
  shares = [weights(x, n) for x in scores]
  means = {
    name: [w @ x for w, x in zip(shares, columns, strict=True)]
    for name, columns in values.items()
  }
  means["kl"] = [kl(x, n) for x in scores]
  if "log_ratio" in means:
    away = np.asarray(means.pop("log_ratio"))
    means["kl_from_reference"] = bound(n) + away
  return {
    "n": n,
    "bound": bound(n),
    "means": {k: statistics.over_prompts(v) for k, v in means.items()},
  }


def table(result):
  """What `measure` returned as lines of text, a line an N.

  Returns: str without a line break at its end.
  """
  items = result["best_of"]
  heads, body = ["N"], [[str(item["n"])] for item in items]
  for name in items[0]["means"]:
    heads.append(name.removeprefix("reward/").replace("_", " "))
    for line, item in zip(body, items, strict=True):
      line.append(_cell(item["means"][name]))
    if name == "kl":
      heads[-1:] = ["KL ≤", "KL by ties"]
      for line, item in zip(body, items, strict=True):
        line.insert(-1, f"{item['bound']:.3f}")
  widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
  lines = [
    "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True))
    for line in (heads, *body)
  ]
  name = result["ranking"].removeprefix("reward/")
  head = (
    f"best of N of {result['draws']} draws of {result['prompts']:,} prompts, "
    f"ranked by {name}:"
  )
  return "\n".join([head, *lines])


def _cell(value):
  se = value["se"]
  if se is None or math.isnan(se):
    return f"{value['mean']:.3f}"
  return f"{value['mean']:.3f} ± {se:.3f}"
