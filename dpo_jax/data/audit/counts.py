"""What there is to count of examples, and the limits it is held against."""

import collections
import hashlib
from typing import NamedTuple

import numpy as np

from dpo_jax.data.read import fields

# What to do where a limit of config.audit is exceeded.
CHECKS = {
  "skipped": (
    "mend them or take them out: with data.bad_records='error' training stops "
    "at the first"
  ),
  "boundary_merges": (
    "end prompts without white space and begin completions with it; these "
    "completions are encoded alone, as sampling continues a prompt"
  ),
  "cut": (
    "raise data.max_prompt_length or data.max_completion_length, or take the "
    "longest out: a completion that is cut does not teach to stop"
  ),
  "double_bos": (
    "take it out of the text, of the chat template or of the tokens drawn: one "
    "is put in front of text in any case"
  ),
  "special_tokens": (
    "take them out of the text; if it was written by a chat template, give "
    "the messages instead"
  ),
  "empty": "take them out: there is nothing to score but the end",
  "other_end": (
    "make the template end a turn in one token of its own: text that a sample "
    "may hold elsewhere cannot stop it"
  ),
}


# What tokenize.encode counts that is in `Facts.found`, by the names there.
_CHANGED = {
  "boundary_merges": "boundary merge",
  "prompt_cut": "prompt cut",
  "completion_cut": "completion cut",
  "other_end": "end of turn at which no sample stops",
}


class Facts(NamedTuple):
  """What there is to count of an example.

  Attributes:
    origin: "file:line".
    found: names of what it has, most of them those of CHECKS.
    remarks: how it was read and what of it was not, each with its count.
    bos: BOS in its prompt and one completion, the most.
    eos: EOS in each completion.
    prompt: tokens.
    completions: tokens of each.
    pairs: (winner, loser).
  """

  origin: str
  found: frozenset[str]
  remarks: collections.Counter
  bos: int
  eos: tuple[int, ...]
  prompt: int
  completions: tuple[int, ...]
  pairs: tuple[tuple[int, int], ...]


def facts_of(record, encoded, tokenizer):
  """The Facts of a record, by its tokenize.Encoded that has an example."""
  example, changed = encoded.example, encoded.changed
  bos = count_bos(example, tokenizer)
  found = {
    **{name: changed[what] for name, what in _CHANGED.items()},
    "cut": changed["prompt cut"] or changed["completion cut"],
    "double_bos": bos > 1,
    "special_tokens": _writes_specials(record, example, tokenizer),
    "empty": any(
      all(i in tokenizer.specials for i in ids) for ids in example.completions
    ),
  }
  remarks = collections.Counter(changed)
  for what in _CHANGED.values():
    del remarks[what]
  return Facts(
    origin=record.origin,
    found=frozenset(name for name, there in found.items() if there),
    remarks=remarks,
    bos=bos,
    eos=tuple(ids.count(tokenizer.eos_id) for ids in example.completions),
    prompt=len(example.prompt),
    completions=tuple(map(len, example.completions)),
    pairs=record.pairs,
  )


def repeated(example, seen):
  """Counter of comparisons that an earlier example has, or has turned round.

  Args:
    example: comparisons.Example.
    seen: set of comparisons so far, to which these are added.
  """
  texts = [_digest(example.prompt), *map(_digest, example.completions)]
  prompt, *completions = texts
  pairs = {
    (prompt, completions[winner], completions[loser])
    for winner, loser, _ in example.pairs
  }
  out = collections.Counter()
  for prompt, winner, loser in pairs:
    if (prompt, winner, loser) in seen:
      out["comparison that an earlier record has"] += 1
    if (prompt, loser, winner) in seen:
      out["comparison that an earlier record has the other way round"] += 1
  seen |= pairs
  return out


def _digest(ids):
  return hashlib.blake2b(repr(list(ids)).encode(), digest_size=12).digest()


def count_bos(example, tokenizer):
  """BOS that a model reads in the prompt and one completion, the most."""
  bos, prompt = tokenizer.bos_id, example.prompt
  if bos == tokenizer.eos_id:  # elsewhere it is an end
    return next((n for n, i in enumerate(prompt) if i != bos), len(prompt))
  return prompt.count(bos) + max(ids.count(bos) for ids in example.completions)


def _writes_specials(record, example, tokenizer):
  """Whether text holds a special token, but for the BOS: it is counted."""
  if isinstance(record.prompt, str):
    prompt = example.prompt
    if prompt[0] == tokenizer.bos_id or prompt == [tokenizer.eos_id]:
      prompt = prompt[1:]
    # A chat template may have written the prompt, of samples too.
    texts = [prompt] if record.bos and not record.tokens else []
    for ids in example.completions:
      texts.append(ids[:-1] if ids[-1] in tokenizer.end_ids else ids)
  else:
    messages = [*record.prompt, *(m for (m,) in record.completions)]
    said = [text for message in messages for text in fields.texts(message)]
    texts = tokenizer.encode(said)
  bad = set(tokenizer.specials)
  if tokenizer.bos_id != tokenizer.eos_id:
    bad.discard(tokenizer.bos_id)
  return any(i in bad for ids in texts for i in ids)


def summary(facts, skipped, first):
  """The numbers of a source: of its Facts, Policy.skipped and Policy.first.

  Returns: dict; "found" counts examples, "bos" examples and "eos" completions
    by how many they have (2: or more), "remarks" what is counted of records on
    the way, "first" holds an origin for each name in "found", "lengths" are in
    tokens.
  """
  found, origins = collections.Counter(), {}
  bos, eos = collections.Counter(), collections.Counter()
  for fact in facts:
    found.update(fact.found)
    for name in fact.found:
      origins.setdefault(name, fact.origin)
    bos[min(fact.bos, 2)] += 1
    eos.update(min(count, 2) for count in fact.eos)
  return {
    "records": len(facts) + sum(skipped.values()),
    "examples": len(facts),
    "completions": sum(len(fact.completions) for fact in facts),
    "comparisons": sum(len(fact.pairs) for fact in facts),
    "skipped": dict(skipped),
    "why": dict(first),
    "found": dict(found),
    "remarks": dict(sum((f.remarks for f in facts), collections.Counter())),
    "first": origins,
    "bos": dict(bos),
    "eos": dict(eos),
    **_lengths(facts),
  }


def _lengths(facts):
  """{"lengths", "longer"}: of each kind of text, and chosen over rejected."""
  lengths = {"prompt": [fact.prompt for fact in facts]}
  pairs = [
    (fact.completions[winner], fact.completions[loser])
    for fact in facts
    for winner, loser in fact.pairs
  ]
  if not pairs:
    lengths["completion"] = [n for fact in facts for n in fact.completions]
  else:
    lengths["chosen"], lengths["rejected"] = zip(*pairs, strict=True)
  out = {
    "lengths": {
      name: {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(np.max(values)),
      }
      for name, values in lengths.items()
      if values
    },
    "longer": None,
  }
  if pairs:
    gap = np.subtract(*np.transpose(pairs))
    out["longer"] = {
      "share": float(np.mean(gap > 0)),
      "equal": float(np.mean(gap == 0)),
      "difference": float(np.mean(gap)),
    }
  return out


def checks(parts, limits):
  """Every limit of config.audit against every `summary` with its "source".

  Returns: list of {"name", "source", "count", "of", "limit", "failed"}. A
    source of which nothing is left fails by "skipped", whatever its limit.
  """
  out = []
  for name in CHECKS:
    for part in parts:
      count, of = part["found"].get(name, 0), part["examples"]
      if name == "skipped":
        count, of = sum(part["skipped"].values()), part["records"]
      limit = limits[name]
      above = limit is not None and count > limit * of
      out.append(
        {
          "name": name,
          "source": part["source"],
          "count": count,
          "of": of,
          "limit": limit,
          "failed": above or (name == "skipped" and not part["examples"]),
        }
      )
  return out
