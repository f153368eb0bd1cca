"""What a data set gives to train on, looked at before any model is built.

Records go the way they go in training (data/read, data/tokens), but none stops
the audit: those that training would refuse are counted as skipped. counts.py
counts, text.py writes the report for people.
"""

import collections

from dpo_jax.data.audit import counts
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import comparisons, tokenize

_CONTEXT = 8  # tokens in front of one that its text is looked up behind
_PART = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes of a character


def audit(name, options, limits, kind, with_scores):
  """The reports of data.train and, where it is set, data.eval: plain values.

  Args:
    name: of the tokenizer.
    options: the fields of config.data.
    limits: the fields of config.audit.
    kind, with_scores: what the loss compares, see comparisons.arrange.
  Returns: list of {"tokenizer", "field", "spec", "shown": examples token by
    token, "parts": [`counts.summary` with "source", for each part of a mixture,
    then for all if there are several], "checks": see `counts.checks`}.
  Raises: ValueError for what is wrong with a file, or with the config.
  """
  if kind not in comparisons.FORMS:
    raise ValueError(
      f"audit looks at completions, and data.train = {options.train!r} is of "
      "prompts alone, which the policy answers; audit what it was trained on "
      "before, with that config"
    )
  tokenizer = tokenize.load(name)
  written = tokenizer.specials
  about = {
    "name": name,
    "size": tokenizer.vocab_size,
    "bos": (tokenizer.bos_id, written.get(tokenizer.bos_id)),
    "eos": (tokenizer.eos_id, written.get(tokenizer.eos_id)),
    "template": tokenizer.apply_template is not None,
  }
  specs = {"data.train": options.train}
  if options.eval is not None:
    specs["data.eval"] = options.eval
  comparing = kind, with_scores
  return [
    {
      "tokenizer": about,
      **_report(spec, field, tokenizer, options, limits, *comparing),
    }
    for field, spec in specs.items()
  ]


def _report(spec, field, tokenizer, options, limits, kind, with_scores):
  """What `audit` returns of a source, but for the tokenizer."""
  parts, shown = [], []
  every, skipped, first = [], collections.Counter(), {}
  for _, source in sources.parse(spec, field):
    policy, facts, seen = sources.Policy("skip"), [], set()
    items = sources.read_part(source, comparisons.FORMS[kind], field)
    records = list(policy.usable(items))
    each = tokenize.encode_each(records, tokenizer, options)
    for record, encoded in zip(records, each, strict=True):
      error = encoded.error or comparisons.problem(
        encoded.example, kind, with_scores
      )
      if error is not None:
        policy.bad(error)
        continue
      encoded.changed.update(counts.repeated(encoded.example, seen))
      facts.append(counts.facts_of(record, encoded, tokenizer))
      if len(shown) < limits.show:
        shown.append(_show(record, encoded, tokenizer))
    summary = counts.summary(facts, policy.skipped, policy.first)
    parts.append({"source": source, **summary})
    every += facts
    skipped += policy.skipped
    first = policy.first | first
  checks = counts.checks(parts, limits)
  if len(parts) > 1:
    parts.append({"source": "all", **counts.summary(every, skipped, first)})
  return {
    "field": field,
    "spec": spec,
    "shown": shown,
    "parts": parts,
    "checks": checks,
  }


def _show(record, encoded, tokenizer):
  """An example as plain values: its tokens are (id, text or None, special)."""
  example = encoded.example
  prompt, count = example.prompt, len(example.completions)
  names = [f"completion {k}" for k in range(count)]
  if count == 1:
    names = ["completion"]
  elif count == 2 and len(record.pairs) == 1:
    ((winner, loser),) = record.pairs
    names[winner], names[loser] = "chosen", "rejected"
  return {
    "origin": record.origin,
    "changed": dict(encoded.changed),
    "prompt": _tokens([], prompt, tokenizer),
    "completions": [
      {"name": name, "tokens": _tokens(prompt, ids, tokenizer)}
      for name, ids in zip(names, example.completions, strict=True)
    ],
    "pairs": list(record.pairs),
  }


def _tokens(before, ids, tokenizer):
  """[(id, its text, whether it is special)] of ids that follow others.

  Of tokens that share a character the last has the text, the others None.
  """
  out, line = [], [*before[-_CONTEXT:], *ids]
  start = len(line) - len(ids)
  for k in range(start, len(line)):
    if line[k] in tokenizer.specials:
      out.append((line[k], tokenizer.specials[line[k]], True))
      start = k + 1
      continue
    head = line[max(0, start - _CONTEXT) : start]
    word = tokenize.continuation(tokenizer, head, line[start : k + 1])
    whole = _PART not in word or k - start == 3  # of at most four bytes
    out.append((line[k], word if whole else None, False))
    if whole:
      start = k + 1
  return out
