"""The form of a row with several completions, and what compares them."""

import math

from dpo_jax.data.read import fields

MOST_RANKED = 256  # completions
MOST_PAIRS = math.comb(MOST_RANKED, 2)  # of one record: 32,640


def completions(row):
  """The prompt and the completions of the form with K of them."""
  prompt = fields.prompt(row)
  values = fields.field(row, "completions", list)
  if not values:
    raise fields.BadRecord("empty", "field 'completions' is empty")
  out = []
  for k, value in enumerate(values):
    where = f"'completions'[{k}]"
    if not isinstance(prompt, str):
      out.append(fields.reply(fields.check_messages(value, where), where))
      continue
    if not isinstance(value, str) or not value:
      raise fields.BadRecord(
        "empty" if value == "" else "wrong type",
        f"{where} must be a non-empty string, not {value!r:.40}",
      )
    fields.check_text(value, where)
    out.append(value)
  return prompt, tuple(out)


def tokens(row, completions):
  """Ids of each completion, which must be text."""
  lists = fields.field(row, "tokens", list)
  good = len(lists) == len(completions) and isinstance(completions[0], str)
  good = good and all(isinstance(ids, list) and ids for ids in lists)
  if not good or any(type(i) is not int or i < 0 for ids in lists for i in ids):
    raise fields.BadRecord(
      "bad tokens",
      "'tokens' must hold a non-empty list of ids for each of "
      f"{len(completions)} completions that are text",
    )
  return tuple(lists)


def pairs(row, completions):
  """(winner, loser) of each comparison, indices into the completions."""
  pairs = fields.field(row, "pairs", list)
  if not pairs:
    raise fields.BadRecord("empty", "field 'pairs' is empty")
  if len(pairs) > MOST_PAIRS:
    raise fields.BadRecord(
      "bad pair",
      f"field 'pairs' has {len(pairs):,} comparisons, a record at most "
      f"{MOST_PAIRS:,}: they are computed at once; split it into records",
    )
  count = len(completions)
  for pair in pairs:
    good = isinstance(pair, list) and len(pair) == 2
    good = good and all(type(k) is int and 0 <= k < count for k in pair)
    if not good or pair[0] == pair[1]:
      raise fields.BadRecord(
        "bad pair",
        f"'pairs' holds {pair!r}; each must be [winner, loser], two different "
        f"indices below {count}",
      )
  check_different(pairs, completions)
  return tuple(map(tuple, pairs))


def probabilities(row, pairs):
  """For each comparison, that its winner is better; None if it is not said."""
  if "probabilities" not in row:
    return None
  return _each(row, "probabilities", fields.share, len(pairs), "'pairs'")


def best(row, completions):
  """The index of the completion that no other is better than, by the row.

  The first of those, and of all where nothing compares them.
  """
  if "ranking" in row:
    return ranking(row, completions)[0]
  compared = pairs(row, completions) if "pairs" in row else ()
  losers = {loser for _, loser in compared}
  winners = [winner for winner, _ in compared if winner not in losers]
  return min(winners, default=compared[0][0] if compared else 0)


def check_different(pairs, completions):
  """Raises BadRecord for a pair of completions that say the same."""
  for one, other in pairs:
    if fields.essence(completions[one]) == fields.essence(completions[other]):
      raise fields.BadRecord(
        "identical pair", f"completions of {[one, other]} are the same text"
      )


def ranking(row, completions):
  """All completions by their indices, best first."""
  ranking = fields.field(row, "ranking", list)
  whole = all(type(k) is int for k in ranking)
  if not whole or sorted(ranking) != list(range(len(completions))):
    raise fields.BadRecord(
      "bad ranking",
      f"'ranking' = {ranking!r:.60} must name each of the {len(completions)} "
      "completions once, best first",
    )
  if not 2 <= len(ranking) <= MOST_RANKED:
    raise fields.BadRecord(
      "bad ranking",
      f"a ranking is of 2 to {MOST_RANKED} completions, not {len(ranking):,}: "
      "each is compared with each; name the comparisons in 'pairs'",
    )
  return tuple(ranking)


def scores(row, completions):
  """A finite number for each completion."""
  return _each(row, "scores", fields.number, len(completions), "completions")


def _each(row, name, read, count, of):
  """The numbers of a list, one for each of `count` things."""
  values = fields.field(row, name, list)
  if len(values) != count:
    raise fields.BadRecord(
      f"bad {name}", f"{name!r} has {len(values)} numbers for {count} {of}"
    )
  named = {f"{name}[{k}]": value for k, value in enumerate(values)}
  return tuple(read(named, key) for key in named)
