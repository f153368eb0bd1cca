"""Judges by name, as judge.by has them: NAME:ARGUMENT.

    openai:MODEL   a model behind an endpoint that speaks OpenAI's API
    form:FILE      people, who fill in a form
    …              any scorer of eval/rewards.py: the higher score wins

A notebook adds its own, JUDGES["mine"] = f, where f(argument, pairs, options)
returns (verdicts, plain dict about them, lines that tell of it); or a scorer.
"""

from dpo_jax import lookup
from dpo_jax.eval.judge import endpoint, form, verdicts

JUDGES = {"openai": endpoint.judge, "form": form.judge}


def decide(pairs, options):
  """What judge.by says of pairs.

  Args:
    pairs: list of matched.Pair.
    options: the fields of config.judge.
  Returns: (list of verdicts.Verdict, or None where none were given yet; plain
    dict about them; iterable of lines).
  Raises: ValueError for an unknown judge, or one that cannot judge.
  """
  name, _, argument = options.by.partition(":")
  if name not in JUDGES:
    return _scored(options.by, pairs)
  return JUDGES[name](argument, pairs, options)


def _scored(spec, pairs):
  """The higher score of a scorer wins; each text is scored once."""
  from dpo_jax.eval import rewards  # what follows is jax

  name = spec.partition(":")[0]
  lookup.lookup({*JUDGES, *rewards.SCORERS}, name, "judge.by")
  texts = dict.fromkeys(
    (pair.prompt, text) for pair in pairs for text in (pair.ours, pair.theirs)
  )
  given = [list(side) for side in zip(*texts, strict=True)]
  scores = dict(zip(texts, rewards.load(spec).score(*given), strict=True))
  out = [
    verdicts.identical(pair)
    if pair.ours == pair.theirs
    else verdicts.of_scores(
      *(scores[pair.prompt, text] for text in (pair.ours, pair.theirs))
    )
    for pair in pairs
  ]
  return out, {"scored": len(texts)}, []
