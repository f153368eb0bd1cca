"""What config.judge may say."""

import re
import urllib.parse

from dpo_jax.eval.judge import question

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# Fields that are None unless they are set, by the judge that reads them.
_OWN = {
  "form_key": "form",
  **dict.fromkeys(
    ("cache", "price_in", "price_out", "budget", "budget_tokens"), "openai"
  ),
}


def check(options):
  """Refuses what no judge can do, and fields that would have no effect.

  No message repeats what may be a key.

  Args:
    options: the fields of config.judge.
  Raises: ValueError naming the field.
  """
  for obeyed, otherwise in _rules(options):
    if not obeyed:
      raise ValueError(otherwise)
  question.check(options.template, options.verdict)


def _rules(o):
  """Yields (whether the options obey, what to say if not)."""
  yield (
    len(o.samples) > 0,
    "judge.samples names no file: give what policies wrote, "
    "--config.judge.samples=runs/mine/completions.jsonl",
  )
  for field in ("samples", "agree_with"):
    yield (
      len(set(o[field])) == len(o[field]),
      f"judge.{field} = {o[field]} names a file twice: leave one out",
    )
  yield (
    o.against is not None,
    "judge.against is not set: give another sample file, or data with the "
    "answers to compare with, --config.judge.against=held_out.jsonl",
  )
  yield (
    o.by is not None,
    "judge.by is not set: name the judge, openai:MODEL, form:FILE, or a scorer "
    "of eval/rewards.py such as vader or reward:runs/reward",
  )
  kind, _, argument = o.by.partition(":")
  yield (
    argument or kind not in ("openai", "form"),
    f"judge.by = {o.by!r} is written {kind}:…, with the name of a model or of "
    "a file",
  )
  for field, owner in _OWN.items():
    yield (
      o[field] is None or kind == owner,
      f"judge.{field} = {o[field]!r} has no effect with judge.by = {o.by!r}: "
      f"it is of {owner}:…; set it to None",
    )
  yield (
    (o.price_in is None) == (o.price_out is None),
    "judge.price_in and judge.price_out go together: set both, or neither",
  )
  yield (
    o.budget is None or o.price_in is not None,
    f"judge.budget = {o.budget} is a cost: set judge.price_in and "
    "judge.price_out, of a million tokens, or take judge.budget_tokens",
  )
  yield from _rules_of_endpoint(o)


def _rules_of_endpoint(o):
  yield (
    o.key_from is None or _VARIABLE.fullmatch(o.key_from) is not None,
    "judge.key_from is the name of an environment variable, such as "
    "OPENAI_API_KEY; what it is set to (not shown: it may be a key) is none. "
    "Put the key in a variable and its name here",
  )
  parts = urllib.parse.urlsplit(o.base_url)
  bare = not (parts.username or parts.password or parts.query or parts.fragment)
  yield (
    bare,
    "judge.base_url must have no name, password or query in it (not shown: "
    "they may be keys): put the key in the variable of judge.key_from",
  )
  yield (
    parts.scheme in ("http", "https") and bool(parts.hostname),
    f"judge.base_url = {o.base_url!r} is no address: write it as "
    "http://localhost:8000/v1",
  )
