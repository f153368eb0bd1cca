"""Scorers of text by its words: what was learned of labels, a lexicon."""

import numpy as np
from scipy import special

from dpo_jax.data.read import sources


def labelled(spec):
  """(texts, labels f64[n]) of a labelled source."""
  field = "a scorer's source, or sample.labelled"
  records = sources.load(spec, "label", sources.Policy("error"), field)
  sources.refuse_messages(records, field)
  texts = [r.prompt + text for r in records for text in r.completions]
  return texts, np.asarray([v for r in records for v in r.labels])


def joined(prompts, completions):
  return [p + c for p, c in zip(prompts, completions, strict=True)]


def tfidf(source):
  """Log-odds of a label above 0."""
  return _log_odds("tfidf", source)


def sentiment(source):
  """P(label above 0), in (0, 1) as the reward of the paper's IMDb task."""
  log_odds = _log_odds("sentiment", source)
  return lambda prompts, completions: special.expit(
    log_odds(prompts, completions)
  )


def _log_odds(name, source):
  try:
    from sklearn import feature_extraction, linear_model, pipeline
  except ImportError as error:
    raise ValueError(
      f"scorer {name} needs scikit-learn: pip install 'dpo_jax[examples]'"
    ) from error
  texts, labels = labelled(source)
  if len(set(labels > 0)) < 2:
    raise ValueError(f"scorer {name}:{source}: all labels are the same")
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
    joined(prompts, completions)
  )


def vader():
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
      for text in joined(prompts, completions)
    ]
  )
