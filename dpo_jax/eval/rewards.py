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
completion given the prompt. A text is scored whole: one that is longer than a
model can read is an error, as a reward of part of a text is another's.
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
from dpo_jax.data.tokens import tokenize, vocabulary
from dpo_jax.run import build, forward, trained


class Scorer(NamedTuple):
  """A reward.

  Attributes:
    name: short, for tables: the part of the spec before the colon.
    score: (prompts, completions), lists of str -> f64[n], higher is better. If
      it has an attribute `of_draws`, that takes a list of generate.Draw; if
      `check`, that takes prompts and raises ValueError for those that are too
      long for it, whatever is drawn behind them.
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
  """A sequence classifier of the hub, or of a local folder.

  Texts of the same length make a batch, so nothing is padded: what a text gets
  does not depend on others, nor on whether the model knows a token to pad with.
  """
  try:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=False
    )
    # In f32: what bf16 rounds depends on how many texts are scored at once.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
      name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    ).eval()
  except Exception as error:  # the hub, a damaged file, no torch: anything
    raise ValueError(
      f"scorer {name}: cannot be loaded ({vocabulary.why(error)}). It needs "
      "torch, and the hub's name of a sequence classifier or its local folder, "
      "with safetensors and without code of its own"
    ) from error
  limit = _longest(tokenizer, model)
  # Without a padding token causal models refuse more texts than one.
  pad = model.config.get_text_config().pad_token_id
  size = 1 if pad is None else 32

  def score(prompts, completions):
    texts = _joined(prompts, completions)
    encoded = [_encoded(tokenizer, text) for text in texts]
    lengths = collections.defaultdict(list)
    for i, inputs in enumerate(encoded):
      lengths[len(inputs["input_ids"])].append(i)
    _refuse_long(name, {n: len(same) for n, same in lengths.items()}, limit)
    out = np.zeros(len(texts))
    for same in lengths.values():
      for start in range(0, len(same), size):
        rows = same[start : start + size]
        inputs = {
          key: torch.tensor([encoded[i][key] for i in rows])
          for key in encoded[rows[0]]
        }
        with torch.no_grad():
          logits = model(**inputs).logits.double().numpy()
        out[rows] = logits_to_score(logits)
    return out

  def check(prompts):
    encoded = (_encoded(tokenizer, text)["input_ids"] for text in prompts)
    _refuse_long(name, collections.Counter(map(len, encoded)), limit)

  score.check = check
  try:  # what cannot score is found before anything is drawn
    score(["Is", "Is it", "Is it"], [" so?", " so?", " so."])
  except Exception as error:  # of a model's own code: anything
    raise ValueError(f"scorer {name}: cannot score ({error})") from error
  return score


def _encoded(tokenizer, text):
  """{name: list} of the inputs of a text, with one BOS at most.

  A chat template writes one, and many tokenizers another in front. An empty
  text is a BOS or EOS, as an empty prompt is in training.
  """
  inputs = tokenizer(text, truncation=False, padding=False, verbose=False)
  ids, bos = inputs["input_ids"], tokenizer.bos_token_id
  if not ids:
    first = tokenizer.eos_token_id if bos is None else bos
    lone = {"input_ids": first or 0, "attention_mask": 1, "token_type_ids": 0}
    return {key: [lone[key]] for key in inputs}
  twice = bos is not None and ids[:2] == [bos, bos]
  return {key: values[twice:] for key, values in inputs.items()}


def _refuse_long(name, counts, limit):
  """Raises ValueError for texts beyond a limit, of {length: how many}."""
  long = sum(count for length, count in counts.items() if length > limit)
  if long:
    raise ValueError(
      f"scorer {name}: {long} texts are longer than its model can read: "
      f"{limit} tokens of prompt and completion, the longest has "
      f"{max(counts)}; lower sample.max_new_tokens or data.max_prompt_length, "
      "or take another scorer"
    )


def _longest(tokenizer, model):
  """Tokens of the longest text that a model can read; inf if nothing says."""
  config = model.config.get_text_config()
  told = getattr(config, "max_position_embeddings", None)
  limits = [tokenizer.model_max_length, told]
  for name, module in model.named_modules():
    if name.endswith("position_embeddings") and hasattr(module, "padding_idx"):
      # RoBERTa counts its positions from behind that of padding.
      unused = -1 if module.padding_idx is None else module.padding_idx
      limits.append(module.num_embeddings - unused - 1)
  return min((n for n in limits if n is not None and n > 0), default=math.inf)


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
  # As much as the model can read.
  room = setup.model.config.max_positions - setup.data.max_prompt_length
  limits = setup.data._replace(max_completion_length=room)
  ref = trained.initial(setup)
  params = trained.restored(setup, ref, folder)
  policy = setup.trained.model(ref, params)

  def score(prompts, completions):
    texts = enumerate(zip(prompts, completions, strict=True))
    return of([sources.Record(p, (c,), (), f"text {i}") for i, (p, c) in texts])

  def of_draws(draws):
    """Of the tokens as drawn: a template's prompt may have no BOS, a turn may
    end in another token than the EOS, and a draw at its limit has no end."""
    tokenizer = setup.tokenizer
    if any(
      tokenize.continuation(tokenizer, d.prompt_ids, d.ids) != d.completion
      for d in draws
    ):  # they are another tokenizer's
      return score([d.prompt for d in draws], [d.completion for d in draws])
    return of(
      [
        sources.Record(
          *(d.prompt, (d.completion,), (), f"draw {d.id}"),
          tokens=(d.ids,),
          bos=d.prompt_ids[0] == tokenizer.bos_id,
        )
        for d in draws
      ]
    )

  def of(records):
    examples = _encoded_whole(records, setup, limits, folder)
    loader = forward.loader_of(setup, examples)
    ratios = np.zeros(len(examples))
    for params, sign in ((policy, 1.0), (ref, -1.0)):
      with jax.default_matmul_precision(setup.precision):
        for index, logps in forward.token_logps(setup, params, loader):
          ratios[index] += sign * math.fsum(logps)
    return beta * ratios

  def check(prompts):
    bare = sources.Record("", ("",), (), "a prompt", bos=False)
    records = [bare._replace(prompt=prompt) for prompt in prompts]
    _encoded_whole(records, setup, limits, folder)

  score.of_draws, score.check = of_draws, check
  return score


def _encoded_whole(records, setup, limits, folder):
  """The examples of records; raises ValueError for one that would be cut."""
  examples, changed = tokenize.encode(
    records, setup.tokenizer, limits, sources.Policy("error")
  )
  cut = changed["completion cut"] + changed["prompt cut"]
  if cut:
    raise ValueError(
      f"scorer implicit:{folder}: {cut} texts are longer than its model can "
      f"read: {limits.max_prompt_length} tokens of prompt, "
      f"{limits.max_completion_length} after"
    )
  return examples


SCORERS = {
  "tfidf": _tfidf,
  "vader": _vader,
  "classifier": lambda name: _hugging_face(name, _log_odds),
  "model": lambda name: _hugging_face(name, _only_logit),
  "implicit": _implicit,
}
