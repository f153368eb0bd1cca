"""What came of a judging, as text."""

_NONE = "–"


def text(result):
  """Lines about the content of a judge.json, without a break at the end."""
  heads = (
    *("samples", "T", "judged", "win rate", "wilson", "bootstrap"),
    *("at equal length", "ties", "flips", "malformed", "characters"),
  )
  results = sorted(result["results"], key=_temperature)
  body = [_line(each) for each in results]
  widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
  lines = [
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
    for line in (heads, *body)
  ]
  prompts, seed = result["prompts"], result["config"]["judge"]["seed"]
  head = (
    f"win rate against {result['against']}, by {result['judge']}, over "
    f"{prompts:,} prompt{'s' * (prompts != 1)} (a tie counts ½; intervals of "
    f"95 %, seed {seed}):"
  )
  out = [head, *(line.rstrip() for line in lines), *_notes(result)]
  return "\n".join(out)


def _temperature(each):
  """Sorts by temperature; files of none come last, as they were named."""
  temperature = each["temperature"]
  return (temperature is None, temperature or 0.0)


def _line(each):
  if each["at_equal_length"] is None:
    equal = _NONE
  else:
    equal = _share(each["at_equal_length"])
    equal += f" {_range(each['at_equal_length_bootstrap'])}"
  temperature, count = each["temperature"], each["why"].get("malformed", 0)
  ours_theirs = each["lengths"] or ()
  return (
    each["samples"],
    _NONE if temperature is None else f"{temperature:g}",
    f"{each['judged']:,} of {each['pairs']:,}",
    _share(each["win_rate"]),
    _range(each["wilson"]),
    _range(each["bootstrap"]),
    equal,
    _share(each["tie_rate"]),
    _share(each["flip_rate"]),
    f"{count:,}",
    " : ".join(f"{length:.0f}" for length in ours_theirs) or _NONE,
  )


def _notes(result):
  """Lines below the table."""
  for each in result["results"]:
    for why in ("malformed", "failed", "not asked"):
      count = each["why"].get(why, 0)
      if count:
        pairs = f"{count:,} pair{'s' * (count != 1)}"
        yield f"{each['samples']}: {pairs} without a verdict: {why}"
    first = each["first_rate"]
    if first is not None:
      yield f"{each['samples']}: the text shown first won {first:.3f}"
  for each in result["differences"]:
    if each["difference"] is not None:
      yield (
        f"{each['samples']} − {result['results'][0]['samples']}: "
        f"{each['difference']:+.3f} {_range(each['bootstrap'])}, paired over "
        f"{each['prompts']:,} prompts"
      )
  for each in result["agreement"]:
    yield (
      f"with {each['file']}: agree on {_share(each['agree'])} of "
      f"{each['pairs']:,} pairs, Cohen's κ {_share(each['kappa'])}; on "
      f"{_share(each['agree_decided'])} of {each['decided']:,} that both decide"
    )


def _share(value):
  return _NONE if value is None else f"{value:.3f}"


def _range(ends):
  return _NONE if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"
