"""Scorers: what each computes, how well on unseen films, what is refused."""

import io
import json
import sys

import jax
import numpy as np
import pytest
from sklearn import linear_model
from sklearn.feature_extraction import text as features

from dpo_jax.config import load as load_lib
from dpo_jax.data.tokens import comparisons
from dpo_jax.eval import completions, generate, rewards
from dpo_jax.run import build, forward
from tests import conftest, folders

BETA = 0.5


def load(spec, *overrides):
  return load_lib.load_config(str(conftest.ROOT / spec), overrides)


@pytest.fixture(scope="module")
def reviews():
  """The scorer that was trained on reviews of the training films."""
  return rewards.load("tfidf:reviews:train")


@pytest.fixture
def labelled(tmp_path):
  """A function that writes a labelled source of (text, label) and names it."""

  def write(rows):
    path = tmp_path / "labelled.jsonl"
    lines = [json.dumps({"text": t, "label": label}) for t, label in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)

  return write


def test_tfidf_tells_kind_reviews_of_unseen_films_from_others(reviews):
  texts, labels = rewards.labelled("reviews:validation")
  assert len(texts) == 1_173
  scores = reviews.score([""] * len(texts), texts)
  assert rewards.auc(scores, labels) > 0.8


def test_tfidf_is_the_log_odds_of_a_logistic_regression(labelled):
  """Of the same built from parts: counts, their logs, weights, the norm."""
  rng = np.random.default_rng(0)
  words = np.asarray(["good", "bad", "a", "film", "plot", "dull", "warm"])
  texts = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(60)]
  labels = [
    int(t.count("good") + t.count("warm") > t.count("bad")) for t in texts
  ]
  source = labelled(zip(texts, labels, strict=True))
  got, probability = (
    rewards.load(f"{name}:{source}").score([""] * 60, texts)
    for name in ("tfidf", "sentiment")
  )

  count = features.CountVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b")
  counts = count.fit_transform(texts).toarray()
  seen = (counts > 0).sum(axis=0)
  counts, seen = counts[:, seen > 1], seen[seen > 1]
  assert 0 < len(seen) < len(count.get_feature_names_out())
  values = np.log(np.maximum(counts, 1)) + (counts > 0)
  values = values * (np.log((1 + 60) / (1 + seen)) + 1)
  values /= np.linalg.norm(values, axis=1, keepdims=True)
  model = linear_model.LogisticRegression(C=10, max_iter=1000)
  p = model.fit(values, labels).predict_proba(values)[:, 1]
  # In f64; where the solver stops may depend on the sums' order.
  np.testing.assert_allclose(got, np.log(p / (1 - p)), atol=1e-6)
  assert np.ptp(got) > 5
  np.testing.assert_allclose(probability, p, atol=1e-6)


@pytest.mark.parametrize("spec", ["tfidf:reviews:train", "vader"])
def test_praise_scores_above_blame(spec, reviews):
  scorer = rewards.load("vader") if spec == "vader" else reviews
  assert scorer.name == spec.partition(":")[0]
  prompts = ["The film is", "The film is", "This"]
  completions = [
    " a warm, funny and moving delight.",
    " a dull, tedious and empty mess.",
    " is one.",
  ]
  kind, unkind, _ = scores = scorer.score(prompts, completions)
  assert kind > 0 > unkind
  # Prompt and completion are one text.
  whole = [p + c for p, c in zip(prompts, completions, strict=True)]
  np.testing.assert_array_equal(scorer.score([""] * 3, whole), scores)


@pytest.mark.parametrize(
  ("scores", "labels", "want"),
  [
    ([1, 2, 2, 3], [0, 1, 0, 1], 3.5 / 4),
    ([0.5, 0.5, 0.5], [1, 0, 1], 0.5),
    ([-2.0, 1.0, 3.0], [1.0, -1.0, -1.0], 0.0),  # labels of any sign
    ([5, 4, 3], [2, 1, 0], 1.0),
  ],
)
def test_auc_counts_the_pairs_in_order_and_half_of_the_ties(
  scores, labels, want
):
  assert rewards.auc(scores, labels) == pytest.approx(want)


def test_a_check_tells_the_auc_of_each_scorer(labelled):
  spec = labelled(
    [("A warm delight.", 1), ("A dull mess.", 0), ("It is long.", 0)]
  )
  blame = rewards.Scorer(
    "blame", lambda p, c: -rewards.load("vader").score(p, c)
  )
  assert rewards.check([rewards.load("vader"), blame], spec) == [
    f"vader: AUC 1.000 on the 3 texts of {spec}",
    f"blame: AUC 0.000 on the 3 texts of {spec}",
  ]


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("tfdif:reviews:train", "scorer = 'tfdif'.*did you mean 'tfidf'"),
    ("tfidf", "scorer 'tfidf': see the forms"),
    ("vader:reviews:train", "scorer 'vader:reviews:train': see the forms"),
    ("implicit:", "scorer 'implicit:': see the forms"),
  ],
)
def test_a_spec_that_names_no_scorer_is_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    rewards.load(spec)


@pytest.mark.parametrize(
  ("package", "spec", "message"),
  [
    ("sklearn", "tfidf:toy", r"pip install 'dpo_jax\[examples\]'"),
    ("vaderSentiment", "vader", r"pip install 'dpo_jax\[examples\]'"),
    ("torch", "classifier:mine", r"scorer mine: .* needs torch"),
  ],
)
def test_a_missing_package_is_named_with_what_installs_it(
  package, spec, message, monkeypatch
):
  monkeypatch.setattr(rewards, "_LOADED", {})  # as in a new process
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=message):
    rewards.load(spec)


def test_labels_of_one_class_are_refused(labelled):
  spec = f"tfidf:{labelled([('good', 1), ('a good film', 2)])}"
  with pytest.raises(ValueError, match="all labels are the same"):
    rewards.load(spec)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(run folder, state) of a policy that is not its reference."""
  workdir = tmp_path_factory.mktemp("run")
  overrides = ("data.eval=None", f"loss.beta={BETA}")
  config = load("configs/dpo.py:smoke", *overrides)
  return workdir, jax.device_get(folders.untrained(config, workdir)[1])


# More than a batch, of many lengths; one prompt is empty.
PROMPTS = ["The plot is", "The plot is", "", *"ABCDEFGHI"]
COMPLETIONS = [
  " warm and clever.",
  " dull and grim.",
  *("dull" + " so" * n for n in range(10)),
]


def test_an_implicit_reward_is_beta_times_the_log_ratio(trained):
  workdir, state = trained
  scorer = rewards.load(f"implicit:{workdir}")
  assert scorer.name == "implicit"
  got = scorer.score(PROMPTS, COMPLETIONS)

  setup = build.prepare_model(load("configs/dpo.py:smoke"))
  eos = setup.tokenizer.eos_id
  examples = [
    comparisons.Example(
      i, 0, list(p.encode()) or [eos], ([*c.encode(), eos],), ()
    )
    for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
  ]
  loader = forward.loader_of(setup, examples)
  policy, ref = (
    dict(forward.token_logps(setup, params, loader))
    for params in (state.params, state.frozen["ref"])
  )
  want = [BETA * (policy[i].sum() - ref[i].sum()) for i in range(len(PROMPTS))]
  # Differences of sums of some 30 f32 log-probs of order 5.
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(got).min() > 1e-2


def test_an_implicit_reward_of_draws_is_of_their_tokens(trained):
  """One that did not end has no EOS; of another tokenizer the text counts."""
  score = rewards.load(f"implicit:{trained[0]}").score
  eos = build.prepare_model(load("configs/dpo.py:smoke")).tokenizer.eos_id

  def draws(end, ids=None):
    return [
      generate.Draw(
        i,
        p,
        list(p.encode()) or [eos],
        c,
        ids or [*c.encode(), *end],
        bool(end),
      )
      for i, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
    ]

  texts = score(PROMPTS, COMPLETIONS)
  ended, cut = score.of_draws(draws([eos])), score.of_draws(draws([]))
  np.testing.assert_allclose(ended, texts, atol=1e-4)
  assert np.abs(cut - texts).min() > 1e-3
  np.testing.assert_allclose(
    score.of_draws(draws([], ids=[7])), texts, atol=1e-4
  )
  (row, *_) = completions.describe(
    draws([]), [rewards.Scorer("it", score)], 1, None
  )
  assert row["reward/it"] == round(float(cut[0]), 6)


def test_implicit_needs_the_folder_of_a_run_that_has_a_beta(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json: no such file"):
    rewards.load(f"implicit:{tmp_path}")
  config = load("configs/sft.py:smoke")
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  with pytest.raises(ValueError, match=r"implicit:.*its loss has no β"):
    rewards.load(f"implicit:{tmp_path}")


def test_an_implicit_reward_refuses_a_text_that_its_model_cannot_read(trained):
  score = rewards.load(f"implicit:{trained[0]}").score
  with pytest.raises(ValueError, match="1 texts are longer than"):
    score(["The plot"] * 2, [" fine", " long" * 500])
  score.check(["The plot"])
  with pytest.raises(ValueError, match=r"a prompt: field 'prompt' has"):
    score.check(["The plot", "The plot " * 200])


def test_scorers_of_one_kind_have_names_of_their_own(tmp_path):
  path = tmp_path / "a.jsonl"
  rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}] * 2
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  other = tmp_path / "b.jsonl"
  other.write_text(path.read_text())
  specs = [f"tfidf:{path}", "vader", f"tfidf:{other}"]
  names = [scorer.name for scorer in rewards.load_all(specs)]
  assert names == [specs[0], "vader", specs[2]]
  assert rewards.load_all(specs[:2])[0].name == "tfidf"
  with pytest.raises(ValueError, match="names a scorer twice"):
    rewards.load_all(["vader", "vader"])


WORDS = ("[PAD]", "[UNK]", "a", "film", "of", "warm", "dull", "long", "words")


def classifier(folder, labels):
  """A random BERT for sequences, saved with a tokenizer of WORDS."""
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  vocabulary = {word: number for number, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
  ).save_pretrained(folder)
  config = transformers.BertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    num_labels=labels,
    initializer_range=1.0,
  )
  model = transformers.BertForSequenceClassification(config)
  model.save_pretrained(folder)
  return model.eval()


def texts_of(count):
  """(prompts, completions, ids of both) of many lengths."""
  rng = np.random.default_rng(0)
  ids = [rng.integers(2, len(WORDS), n) for n in rng.integers(2, 30, count)]
  words = [[WORDS[i] for i in row] for row in ids]
  return [w[0] for w in words], [" ".join(["", *w[1:]]) for w in words], ids


def logits_of(model, ids):
  """f64[n, labels], each text alone."""
  import torch

  with torch.no_grad():
    rows = [model(input_ids=torch.tensor(row)[None]).logits for row in ids]
  return torch.cat(rows).double().numpy()


def reward_model(folder, *, kind="llama", pad=None, adds_bos=True, longest=64):
  """A random causal reward model, saved with a tokenizer that adds a BOS."""
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  words = ("<s>", "</s>", *WORDS[2:])
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "</s>")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  if adds_bos:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 0)]
    )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    pad_token=pad,
    padding_side="left",  # positions of GPT-2 would count the padding
  ).save_pretrained(folder)
  config = transformers.AutoConfig.for_model(
    kind,
    vocab_size=len(words),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=longest,
    num_labels=1,
    initializer_range=0.3,
    pad_token_id=None if pad is None else 1,
    bos_token_id=0,
    eos_token_id=1,
    **({"intermediate_size": 16} if kind == "llama" else {}),
  )
  model = transformers.AutoModelForSequenceClassification.from_config(config)
  model.save_pretrained(folder)
  return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_a_reward_model_scores_a_text_alone_as_among_others(
  kind, pad, tmp_path
):
  """By its last token, with or without a token to pad with."""
  model = reward_model(tmp_path, kind=kind, pad=pad)
  prompts, completions, ids = texts_of(40)
  scorer = rewards.load(f"model:{tmp_path}")
  got = scorer.score(prompts, completions)
  want = logits_of(model, [[0, *row] for row in ids])[:, 0]
  np.testing.assert_allclose(got, want, atol=1e-5)
  alone = [
    scorer.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)
  ]
  np.testing.assert_allclose(got, alone, atol=1e-5)
  assert len(np.unique(got.round(3))) > 30


@pytest.mark.slow
def test_a_classifier_scores_a_text_alone_as_among_others(tmp_path):
  classifier(tmp_path, 2)
  prompts, completions, _ = texts_of(40)
  scorer = rewards.load(f"classifier:{tmp_path}")
  got = scorer.score(prompts, completions)
  alone = [
    scorer.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)
  ]
  np.testing.assert_allclose(got, alone, atol=1e-5)
  assert len(np.unique(got.round(3))) > 20


@pytest.mark.slow
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_that_brings_its_bos_is_scored_with_one(adds_bos, tmp_path):
  """As that of a prompt which a chat template wrote."""
  model = reward_model(tmp_path, adds_bos=adds_bos)
  scorer = rewards.load(f"model:{tmp_path}")
  got = scorer.score(["<s> a film"], [" of warm"])
  np.testing.assert_allclose(
    got, logits_of(model, [[0, 2, 3, 4, 5]])[:, 0], atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer_says", [None, 40])
def test_a_text_is_scored_whole_up_to_what_the_model_can_read(
  tokenizer_says, tmp_path
):
  """Else refused, and counted: cut, the end of it would have no reward."""
  model = reward_model(tmp_path, longest=700)
  limit = 700
  if tokenizer_says is not None:
    path = tmp_path / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "model_max_length": tokenizer_says}))
    limit = tokenizer_says
  score = rewards.load(f"model:{tmp_path}").score
  prompt = "a" + " a" * (limit - 4)  # and the BOS, and two words
  got = score([prompt] * 2, [" dull film", " film dull"])
  ids = [[0, *[2] * (limit - 3), *end] for end in ((6, 3), (3, 6))]
  np.testing.assert_allclose(got, logits_of(model, ids)[:, 0], atol=1e-5)
  assert abs(got[0] - got[1]) > 1e-3
  with pytest.raises(ValueError, match=f"1 texts are longer .*: {limit} tok"):
    score([prompt, f"a {prompt}"], [" dull film"] * 2)


@pytest.mark.slow
def test_positions_that_begin_behind_the_padding_are_not_read_past(tmp_path):
  """RoBERTa's table of 40 has 38 of them."""
  import transformers

  reward_model(tmp_path)
  config = transformers.RobertaConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=40,
    num_labels=1,
    pad_token_id=1,
  )
  transformers.RobertaForSequenceClassification(config).save_pretrained(
    tmp_path
  )
  score = rewards.load(f"model:{tmp_path}").score
  assert np.isfinite(score(["a"], [" film" * 36])).all()
  with pytest.raises(ValueError, match=r"1 texts are longer .*: 38 tokens"):
    score(["a"], [" film" * 37])


@pytest.mark.slow
def test_a_scorer_that_cannot_score_is_refused_when_it_is_loaded(tmp_path):
  """Not once completions have been drawn for it."""
  reward_model(tmp_path, longest=2)
  with pytest.raises(ValueError, match=r"cannot score .*longer than"):
    rewards.load(f"model:{tmp_path}")


@pytest.mark.slow
def test_prompts_that_are_too_long_are_found_before_anything_is_drawn(tmp_path):
  reward_model(tmp_path, longest=8)
  score = rewards.load(f"model:{tmp_path}").score
  score.check([" ".join(WORDS[2:4])])
  long = " ".join([WORDS[2]] * 8)  # and a BOS
  with pytest.raises(ValueError, match="1 texts are longer than"):
    score.check([WORDS[2], long])


@pytest.mark.slow
@pytest.mark.parametrize("adds_bos", [True, False])
def test_an_empty_text_is_scored_as_one_bos(adds_bos, tmp_path):
  model = reward_model(tmp_path, adds_bos=adds_bos)
  got = rewards.load(f"model:{tmp_path}").score([""], [""])
  np.testing.assert_allclose(got, logits_of(model, [[0]])[:, 0], atol=1e-5)


@pytest.mark.slow
def test_code_that_a_scorer_brings_is_never_run(tmp_path, monkeypatch):
  """Nor is there a question on stdin, which a pipe might answer."""
  reward_model(tmp_path)
  path = tmp_path / "config.json"
  about = {
    **json.loads(path.read_text()),
    "model_type": "mine",
    "auto_map": {
      "AutoConfig": "mine.Config",
      "AutoModelForSequenceClassification": "mine.Model",
    },
  }
  path.write_text(json.dumps(about))
  marker = tmp_path / "ran"
  (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
  monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
  with pytest.raises(ValueError, match="without code of its own"):
    rewards.load(f"model:{tmp_path}")
  assert not marker.exists()


@pytest.mark.slow
def test_pickled_weights_of_a_scorer_are_not_read(tmp_path):
  import torch

  model = reward_model(tmp_path)
  (tmp_path / "model.safetensors").unlink()
  torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
  with pytest.raises(ValueError, match="with safetensors"):
    rewards.load(f"model:{tmp_path}")


@pytest.mark.slow
@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_scores_the_log_odds_of_its_last_label(labels, tmp_path):
  model = classifier(tmp_path, labels)
  prompts, completions, ids = texts_of(70)  # batches of 32, 32 and 6
  got = rewards.load(f"classifier:{tmp_path}").score(prompts, completions)
  logits = logits_of(model, ids)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  # f32 logits of order 1, of padded batches.
  np.testing.assert_allclose(got, np.log(p[:, -1] / (1 - p[:, -1])), atol=1e-4)
  if labels == 2:
    np.testing.assert_allclose(got, logits[:, 1] - logits[:, 0], atol=1e-4)
  assert len(np.unique(got.round(2))) > 35
  share = rewards.load(f"probability:{tmp_path}").score(prompts, completions)
  np.testing.assert_allclose(share, p[:, -1], atol=1e-5)


@pytest.mark.slow
def test_a_reward_model_scores_its_only_logit(tmp_path):
  model = classifier(tmp_path, 1)
  prompts, completions, ids = texts_of(70)
  scorer = rewards.load(f"model:{tmp_path}")
  assert scorer.name == "model"
  got = scorer.score(prompts, completions)
  # As above.
  np.testing.assert_allclose(got, logits_of(model, ids)[:, 0], atol=1e-4)
  assert len(np.unique(got.round(2))) > 35


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "labels", "message"),
  [
    ("classifier", 1, "two labels or more; use model:NAME"),
    ("model", 2, "one label; use classifier:NAME"),
  ],
)
def test_another_number_of_labels_is_refused(kind, labels, message, tmp_path):
  classifier(tmp_path, labels)
  with pytest.raises(ValueError, match=message):
    rewards.load(f"{kind}:{tmp_path}").score(["a"], [" film"])
