"""Scorers of text: the ground-truth reward r* of an experiment, and others.

A spec names a scorer and what it is made from:

    tfidf:SOURCE        log-odds of a TF-IDF 1–2-gram logistic regression,
                        trained on a labelled source: tfidf:reviews:train
    vader               compound sentiment of the VADER lexicon, in [−1, 1]
    classifier:NAME     log-odds of the last label of a Hugging Face classifier,
                        e.g. classifier:siebert/sentiment-roberta-large-english
                        (the paper's; needs torch)
    model:NAME          output of a Hugging Face reward model with one label
                        (needs torch)
    implicit:FOLDER     β·(log π − log π_ref) of a run trained here: the reward
                        model that a preference-trained policy is

All read prompt and completion as one text, but for `implicit`, which scores the
completion given the prompt.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax import lookup
from dpo_jax.config import saved
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import tokenize
from dpo_jax.run import build, forward, trained


class Scorer(NamedTuple):
  """A reward.

  Attributes:
    name: short, for tables: the part of the spec before the colon.
    score: (prompts, completions), lists of str -> f64[n], higher is better.
  """

  name: str
  score: Callable


@functools.lru_cache(maxsize=8)
def load(spec):
  """The Scorer of a spec, see the module docstring.

  Raises: ValueError for an unknown name, or naming the package to install.
  """
  name, _, argument = spec.partition(":")
  make = lookup.lookup(SCORERS, name, "scorer")
  if (argument == "") != (name == "vader"):
    raise ValueError(f"scorer {spec!r}: see the forms in eval/rewards.py")
  return Scorer(name, make(argument))


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
  texts, labels = labelled(spec)
  lines = []
  for scorer in scorers:
    value = auc(scorer.score([""] * len(texts), texts), labels)
    lines.append(
      f"{scorer.name}: AUC {value:.3f} on the {len(texts):,} texts of {spec}"
    )
  return lines


def labelled(spec):
  """(texts, labels f64[n]) of a labelled source."""
  field = "a scorer's source, or sample.labelled"
  records = sources.load(spec, "label", sources.Policy("error"), field)
  sources.refuse_messages(records, field)
  texts = [r.prompt + text for r in records for text in r.completions]
  return texts, np.asarray([v for r in records for v in r.labels])


def _joined(prompts, completions):
  return [p + c for p, c in zip(prompts, completions, strict=True)]


def _tfidf(source):
  try:
    from sklearn import feature_extraction, linear_model, pipeline
  except ImportError as error:
    raise ValueError(
      "scorer tfidf needs scikit-learn: pip install 'dpo_jax[examples]'"
    ) from error
  texts, labels = labelled(source)
  if len(set(labels > 0)) < 2:
    raise ValueError(f"scorer tfidf:{source}: all labels are the same")
  model = pipeline.make_pipeline(
    feature_extraction.text.TfidfVectorizer(
      ngram_range=(1, 2),
      min_df=2,
      sublinear_tf=True,
      token_pattern=r"\b\w+\b",  # one-letter words too
    ),
    linear_model.LogisticRegression(C=10, max_iter=1000),
  ).fit(texts, labels > 0)
  return lambda prompts, completions: model.decision_function(
    _joined(prompts, completions)
  )


def _vader(_):
  try:
    from vaderSentiment import vaderSentiment
  except ImportError as error:
    raise ValueError(
      "scorer vader needs vaderSentiment: pip install 'dpo_jax[examples]'"
    ) from error
  analyzer = vaderSentiment.SentimentIntensityAnalyzer()
  return lambda prompts, completions: np.asarray(
    [
      analyzer.polarity_scores(text)["compound"]
      for text in _joined(prompts, completions)
    ]
  )


def _hugging_face(name, logits_to_score):
  """A sequence classifier of the hub, or of a local folder, in batches."""
  try:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
      name
    ).eval()
  except Exception as error:  # the hub, a damaged file, no torch: anything
    raise ValueError(
      f"scorer {name}: cannot be loaded ({error}). It needs torch, and the "
      "hub's name of a sequence classifier or its local folder"
    ) from error

  def score(prompts, completions):
    texts, out = _joined(prompts, completions), []
    for start in range(0, len(texts), 32):
      inputs = tokenizer(
        texts[start : start + 32],
        padding=True,
        truncation=True,
        max_length=512,
        return_tensors="pt",
      )
      with torch.no_grad():
        out.append(logits_to_score(model(**inputs).logits.double().numpy()))
    return np.concatenate(out)

  return score


def _log_odds(logits):
  """log p(last label) − log(1 − p)."""
  if logits.shape[1] < 2:
    raise ValueError("a classifier has two labels or more; use model:NAME")
  return logits[:, -1] - np.logaddexp.reduce(logits[:, :-1], axis=1)


def _only_logit(logits):
  if logits.shape[1] != 1:
    raise ValueError("a reward model has one label; use classifier:NAME")
  return logits[:, 0]


def _implicit(folder):
  config = saved.saved_config(folder).lock()
  ours = jax.config.jax_default_matmul_precision
  setup = build.prepare_model(config)
  jax.config.update("jax_default_matmul_precision", ours)
  beta = setup.asked["loss"].get("beta")
  if beta is None:
    raise ValueError(f"scorer implicit:{folder}: its loss has no β")
  # As much as the model can read: a reward of part of a text is another's.
  room = setup.model.config.max_positions - setup.data.max_prompt_length
  limits = setup.data._replace(max_completion_length=room)
  ref = trained.initial(setup)
  params = trained.restored(setup, ref, folder)
  policy = setup.trained.model(ref, params)

  def score(prompts, completions):
    records = [
      sources.Record(p, (c,), (), f"text {i}")
      for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]
    examples, changed = tokenize.encode(
      records, setup.tokenizer, limits, sources.Policy("error")
    )
    cut = changed["completion cut"] + changed["prompt cut"]
    if cut:
      raise ValueError(
        f"scorer implicit:{folder}: {cut} texts are longer than its model can "
        f"read: {limits.max_prompt_length} tokens of prompt, {room} after"
      )
    loader = forward.loader_of(setup, examples)
    ratios = np.zeros(len(examples))
    for params, sign in ((policy, 1.0), (ref, -1.0)):
      with jax.default_matmul_precision(setup.precision):
        for index, logps in forward.token_logps(setup, params, loader):
          ratios[index] += sign * math.fsum(logps)
    return beta * ratios

  return score


SCORERS = {
  "tfidf": _tfidf,
  "vader": _vader,
  "classifier": lambda name: _hugging_face(name, _log_odds),
  "model": lambda name: _hugging_face(name, _only_logit),
  "implicit": _implicit,
}
