"""Scorers of text: the ground-truth reward r* of an experiment, and others.

A spec names a scorer and what it is made from:

    tfidf:SOURCE        log-odds of a TF-IDF 1–2-gram logistic regression,
                        trained on a labelled source: tfidf:reviews:train
    sentiment:SOURCE    its probability, in (0, 1)
    vader               compound sentiment of the VADER lexicon, in [−1, 1]
    classifier:NAME     log-odds of the last label of a Hugging Face classifier,
                        e.g. classifier:siebert/sentiment-roberta-large-english
                        (needs torch)
    probability:NAME    p(last label) of it: the paper's r*, in [0, 1]
    model:NAME          output of a Hugging Face reward model with one label
                        (needs torch), of the text as it is
    implicit:FOLDER     β·(log π − log π_ref) of a run trained here: the reward
                        model that a preference-trained policy is
    reward:FOLDER       a reward model trained here (configs/reward.py), with
                        the gain and the bias of its folder; of a sweep's
                        folder the point of the best held-out accuracy
    reward:hf:NAME      a Hugging Face reward model with one label of a family
                        that the decoder here is; without torch. As when
                        training, a text ends in one end token

All read prompt and completion as one text, but for `implicit` and `reward`,
which score the completion given the prompt. A text is scored whole: one that is
longer than a model can read is an error, as a reward of part of a text is
another's.

A notebook adds its own, SCORERS["mine"] = f. What f takes says what it is:

    f(prompts, completions)   scores lists of texts, for the spec "mine"
    f(argument)               makes such a function, for "mine:ARGUMENT"
    f()                       makes it, for "mine"
    Rows(f)                   f(batch) -> f32[R, P, C], traced: rewards of the
                              completions of rows (see data/batch/rows.py), on
                              the devices; for rollout.scorer alone

Scores are checked: one finite number a text, or the run ends with the scorer's
name before anything of them is written.
"""

import collections
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from dpo_jax import lookup
from dpo_jax.eval.scorers import hub, runs, texts

labelled = texts.labelled


class Rows(NamedTuple):
  """An entry of SCORERS that scores rows of tokens, as part of a program.

  Attributes:
    fn: batch, see data.batch.rows -> f32[R, P, C]; traced.
  """

  fn: Callable


class Scorer(NamedTuple):
  """A reward.

  Attributes:
    name: short, for tables: the part of the spec before the colon.
    score: (prompts, completions), lists of str -> f64[n], higher is better. If
      it has an attribute `of_draws`, that takes a list of generate.Draw; if
      `check`, that takes prompts and raises ValueError for those that are too
      long for it, whatever is drawn behind them; if `template`, that is the
      chat template its model knows, see tokenize.Tokenizer, or None.
    rows: of an entry that is Rows its function, and `score` only says so; else
      None.
  """

  name: str
  score: Callable
  rows: Callable | None = None


SCORERS = {
  "tfidf": texts.tfidf,
  "sentiment": texts.sentiment,
  "vader": texts.vader,
  "classifier": hub.classifier,
  "probability": hub.probability,
  "model": hub.model,
  "implicit": runs.implicit,
  "reward": runs.reward,
}
_LOADED = {}  # {spec: (entry, state of its files, Scorer)}, the last few
_KEPT = 8


def load(spec):
  """The Scorer of a spec, see the module docstring.

  It is kept, until SCORERS has another entry or what the spec names on disk
  is another.

  Raises: ValueError for an unknown name, or naming the package to install.
  """
  name, colon, argument = spec.partition(":")
  entry = lookup.lookup(SCORERS, name, "scorer")
  takes = _parameters(entry, name)
  if (takes == 1) != bool(argument) or (colon and not argument):
    form = name if takes != 1 else f"{name}:…"
    raise ValueError(
      f"scorer {spec!r}: see the forms in eval/rewards.py; this one is written "
      f"{form!r}"
    )
  state = _state(argument)
  kept = _LOADED.pop(spec, None)
  if kept is None or kept[0] is not entry or kept[1] != state:
    kept = entry, state, _made(spec, entry, takes, argument)
  _LOADED[spec] = kept
  while len(_LOADED) > _KEPT:
    del _LOADED[next(iter(_LOADED))]
  return kept[2]


def _made(spec, entry, takes, argument):
  """The Scorer of an entry of SCORERS."""
  name = spec.partition(":")[0]
  if isinstance(entry, Rows):

    def refused(prompts, completions):
      raise ValueError(
        f"scorer {spec!r} scores rows of tokens while a run samples them; here "
        "texts are scored: take another"
      )

    return Scorer(name, refused, entry.fn)
  score = entry if takes == 2 else entry(*[argument] * takes)
  return Scorer(name, checked(spec, score))


def of_draws(scorer, draws):
  """f64[n] of a list of generate.Draw."""
  score = scorer.score
  if hasattr(score, "of_draws"):
    return score.of_draws(draws)
  return score([d.prompt for d in draws], [d.completion for d in draws])


def _parameters(entry, name):
  """How many parameters without a default a scorer's entry has: 0, 1 or 2."""
  if isinstance(entry, Rows):
    return 0
  try:
    parameters = inspect.signature(entry).parameters.values()
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"SCORERS[{name!r}] = {entry!r:.60} is no function that says what it "
      "takes: (prompts, completions), (argument) or nothing"
    ) from error
  positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
  plain = (inspect.Parameter.POSITIONAL_ONLY, positional)
  names = [
    p.name for p in parameters if p.kind in plain and p.default is p.empty
  ]
  if len(names) > 2:
    raise ValueError(
      f"SCORERS[{name!r}] takes {names}; a scorer takes (prompts, "
      "completions), or it takes (argument) or nothing and makes one"
    )
  return len(names)


def _state(argument):
  """What tells the files that an argument names from what they are later."""
  told = []
  for part in argument.split(" + "):
    path = epath.Path(part.rpartition("*")[2].removeprefix("hf:").strip())
    if not part or not path.exists():
      continue
    files = [path]
    for folder in (path, path / "checkpoints"):  # of a run
      files += folder.iterdir() if folder.is_dir() else ()
    stats = {str(file): file.stat() for file in files}
    told += [(k, stats[k].length, stats[k].mtime) for k in sorted(stats)]
  return told


def checked(spec, score):
  """A score function whose results are one finite number for each text.

  Raises: ValueError naming the scorer, when it is called.
  """
  if not callable(score):
    raise ValueError(
      f"scorer {spec!r} was made as {score!r:.60}, which cannot be called; it "
      "must be a function of (prompts, completions)"
    )

  def of(result, count):
    try:
      values = np.asarray(result, np.float64)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"scorer {spec!r} returned no numbers: {result!r:.60}"
      ) from error
    if values.shape != (count,):
      raise ValueError(
        f"scorer {spec!r} returned scores of shape {list(values.shape)} for "
        f"{count} completions; it must return one number for each"
      )
    return finite(spec, values)

  @functools.wraps(score)
  def whole(prompts, completions):
    return of(score(prompts, completions), len(completions))

  of_draws = getattr(score, "of_draws", None)
  if of_draws is not None:
    whole.of_draws = lambda draws: of(of_draws(draws), len(draws))
  return whole


def finite(spec, values):
  """The scores; ValueError for one that is not finite."""
  bad = np.flatnonzero(~np.isfinite(values))
  if len(bad):
    raise ValueError(
      f"scorer {spec!r} returned {values[bad[0]]} for completion {bad[0]} "
      f"({len(bad)} of {len(values)} are not finite)"
    )
  return values


def load_all(specs):
  """The Scorers of some specs; their names are distinct.

  Raises: ValueError for a spec that is there twice.
  """
  if len(set(specs)) < len(specs):
    raise ValueError(f"sample.scorers names a scorer twice: {tuple(specs)}")
  scorers = [load(spec) for spec in specs]
  count = collections.Counter(scorer.name for scorer in scorers)
  return [
    scorer if count[scorer.name] == 1 else scorer._replace(name=spec)
    for spec, scorer in zip(specs, scorers, strict=True)
  ]


def auc(scores, labels):
  """Probability that a positive example outscores a negative one, ties ½."""
  from sklearn import metrics

  return float(metrics.roc_auc_score(np.asarray(labels) > 0, scores))


def check(scorers, spec):
  """Lines that tell how well scorers tell the labels of a source apart.

  Args:
    scorers: list of Scorer.
    spec: labelled source, not seen in training.
  """
  given, labels = labelled(spec)
  lines = []
  for scorer in scorers:
    value = auc(scorer.score([""] * len(given), given), labels)
    lines.append(
      f"{scorer.name}: AUC {value:.3f} on the {len(given):,} texts of {spec}"
    )
  return lines
