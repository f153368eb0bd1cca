"""Log-probs and KL over data sets, and the reference that is computed once."""

import json

import jax
import numpy as np
import pytest

from dpo_jax import assembly, cli, loop, scoring, weights
from tests import conftest, worlds

ITEMS = worlds.examples(22, seed=3, completions=4)
LENGTH = 24  # of prompt and completion, at most
SPLIT = ("mesh.fsdp=2", "mesh.tensor=2")
LAYOUTS = {
  "packed, shared": (),
  "packed, repeated": ("data.shared=False",),
  "unpacked, shared": ("data.packed=False",),
  "short rows": ("data.max_row_length=40",),
  "chunked head": ("head_chunk=5",),
  "spread": SPLIT,
}


def load(*overrides):
  config = str(conftest.ROOT / "configs/dpo.py:smoke")
  return cli.load_config(config, ("data.batch_size=16", *overrides))


@pytest.fixture(scope="module")
def setup():
  return assembly.prepare_model(load())


@pytest.fixture(scope="module")
def trees(setup):
  """The parameters of a policy and of its reference."""
  ref = worlds.noisy(jax.device_get(weights.initial(setup)), 1)
  return jax.device_get((worlds.noisy(ref, 2), ref))


@pytest.fixture(scope="module")
def alone(setup, trees):
  """By example: the log-softmax of each tree at its scored tokens, f64[S, V].

  Prompt and completion alone in one decode call, without the batch layout.
  """
  model = setup.model
  decode = jax.jit(model.decode)

  def rows(params, prompt, completion):
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(prompt) + len(completion)] = prompt + completion
    cache = model.init_cache(1, LENGTH)
    logits, _ = decode(params, ids, np.arange(LENGTH)[None], cache)
    logits = np.asarray(logits[0, :, : model.vocab_size], np.float64)
    top = logits.max(axis=-1, keepdims=True)
    norm = top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    start = len(prompt) - 1  # predicts the first scored token
    return (logits - norm)[start : start + len(completion)]

  return [
    [
      np.concatenate([rows(params, e.prompt, c) for c in e.completions])
      for params in trees
    ]
    for e in ITEMS
  ]


def picked(logps, example):
  """f64[S]: the entries of f64[S, V] of the scored tokens."""
  targets = np.concatenate(example.completions)
  return logps[np.arange(len(targets)), targets]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_each_example_alone(layout, trees, alone):
  setup = assembly.prepare_model(load(*LAYOUTS[layout]))
  loader = scoring.loader_of(setup, ITEMS)
  # The last batch is smaller; the first has more examples than rows.
  assert loader.steps == 2
  assert (loader.shapes[-1].per_row > 1) == setup.config.data.packed
  got = list(scoring.token_logps(setup, trees[0], loader))
  assert sorted(index for index, _ in got) == list(range(len(ITEMS)))
  for index, logps in got:
    want = picked(alone[index][0], ITEMS[index])
    # Log-probs of order 5 after two f32 layers.
    np.testing.assert_allclose(logps, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [(), ("head_chunk=5",), SPLIT])
def test_kl_is_the_sum_over_the_whole_vocabulary(how, trees, alone):
  setup = assembly.prepare_model(load(*how))
  loader = scoring.loader_of(setup, ITEMS)
  seen = []
  for index, kl, ours, theirs in scoring.token_kl(setup, *trees, loader):
    logp, logq = alone[index]
    want = np.sum(np.exp(logp) * (logp - logq), axis=-1)
    # As above; the errors of 257 terms are averaged by π.
    np.testing.assert_allclose(kl, want, rtol=0, atol=1e-5)
    assert kl.min() > 0
    example = ITEMS[index]
    np.testing.assert_allclose(ours, picked(logp, example), rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs, picked(logq, example), rtol=0, atol=1e-5)
    seen.append(index)
  assert sorted(seen) == list(range(len(ITEMS)))


def test_the_kl_between_equal_policies_is_zero(setup, trees):
  loader = scoring.loader_of(setup, ITEMS)
  for _, kl, ours, theirs in scoring.token_kl(
    setup, trees[1], trees[1], loader
  ):
    # Two passes compiled apart; each log-prob is of order 5.
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def stored(folder):
  """{name: (bytes, time of the last change)} of a reference store."""
  return {
    path.name: (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.iterdir()
  }


@pytest.fixture
def passes(monkeypatch):
  """A list that gets an entry whenever log-probs are computed."""
  right, seen = scoring.token_logps, []

  def counted(*args):
    seen.append(True)
    return right(*args)

  monkeypatch.setattr(scoring, "token_logps", counted)
  return seen


def test_a_reference_is_computed_once_and_read_afterwards(
  setup, trees, alone, tmp_path, passes
):
  batches = []
  for _ in range(2):
    loader = scoring.loader_of(setup, ITEMS)
    scoring.attach_reference(setup, trees[1], loader, tmp_path)
    scoring.attach_reference(setup, trees[1], loader, tmp_path)
    batches.append([loader.batch(n)[0] for n in range(loader.steps)])
    if len(batches) == 1:
      before = stored(tmp_path / "ref_logps")
  assert len(passes) == 1
  assert stored(tmp_path / "ref_logps") == before
  jax.tree.map(np.testing.assert_array_equal, *batches)
  for number, batch in enumerate(batches[1]):
    for index, logps in loader.unpack(number, batch["ref_token_logps"]):
      want = picked(alone[index][1], ITEMS[index])
      # As in the test of `token_logps`.
      np.testing.assert_allclose(logps, want, rtol=0, atol=1e-5)


def test_a_damaged_entry_is_computed_again(setup, trees, tmp_path, passes):
  def attach():
    loader = scoring.loader_of(setup, ITEMS)
    scoring.attach_reference(setup, trees[1], loader, tmp_path)

  attach()
  (path,) = (tmp_path / "ref_logps").glob("*.npy")
  whole = path.read_bytes()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.warns(UserWarning, match="damaged"):
    attach()
  assert len(passes) == 2
  assert path.read_bytes() == whole


def test_other_weights_or_other_data_are_another_entry(setup, tmp_path, passes):
  def attach(seed, items):
    config = load(f"init_seed={seed}", "ref=cached", f"ref_store={tmp_path}")
    here = setup._replace(config=config)
    loader = scoring.loader_of(here, items)
    params = weights.initial(here)
    scoring.attach_reference(here, params, loader, tmp_path / "not here")
    return len(list(tmp_path.glob("*.npy")))

  other = [ITEMS[0]._replace(prompt=[1, *ITEMS[0].prompt[1:]]), *ITEMS[1:]]
  assert attach(0, ITEMS) == 1
  assert attach(1, ITEMS) == 2
  assert attach(0, other) == 3
  assert attach(1, ITEMS) == 3
  assert len(passes) == 3
  assert not (tmp_path / "not here").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """24 comparisons of texts of many lengths: three batches of eight."""
  rng = np.random.default_rng(0)

  def text():
    words = rng.choice(["good", "bad", "film", "a"], rng.integers(1, 5))
    return " ".join(words)

  path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
  rows = [
    {"prompt": text(), "chosen": f" {text()}.", "rejected": f" {text()}!"}
    for _ in range(24)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def train(workdir, data, *overrides):
  """The lines of metrics.jsonl after three steps of eight comparisons."""
  overrides = (
    *(f"data.train={data}", "data.batch_size=8", "data.max_shapes=1"),
    *("train.steps=3", "log.every=1", *overrides),
  )
  loop.fit(load(*overrides), workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same_training(got, want):
  for ours, theirs in zip(got, want, strict=True):
    measured = theirs.keys() - {"kind", "tokens_per_second", "mfu"}
    if theirs["step"] == 1:
      # The policy still is the reference: rounding decides between them.
      measured -= {"rewards/accuracies"}
    for key in measured:
      # Rounding, which two RMSprop steps have enlarged.
      np.testing.assert_allclose(
        ours[key], theirs[key], rtol=1e-4, atol=1e-5, err_msg=key
      )


def test_a_cached_reference_trains_as_a_frozen_one(data, tmp_path, passes):
  held_out = f"data.eval={data}"
  frozen = train(tmp_path / "frozen", data, held_out, "ref=frozen")
  assert not passes
  assert not (tmp_path / "frozen/ref_logps").exists()
  assert [row["kind"] for row in frozen] == 3 * ["train"] + ["eval"]
  assert_same_training(
    train(tmp_path / "cached", data, held_out, "ref=cached"), frozen
  )
  assert len(passes) == 1  # training and held-out data are the same
  before = stored(tmp_path / "cached/ref_logps")
  train(tmp_path / "cached", data, held_out, "ref=cached")
  assert len(passes) == 1
  assert stored(tmp_path / "cached/ref_logps") == before


@pytest.mark.parametrize("how", ["mesh.mode=pmap", "train.accumulation=2"])
def test_a_cached_reference_serves_pmap_and_accumulation(how, data, tmp_path):
  got, want = (
    train(tmp_path / ref, data, "data.eval=None", how, f"ref={ref}")
    for ref in ("cached", "frozen")
  )
  assert len(got) == 3
  np.testing.assert_allclose(got[0]["loss"], np.log(2), rtol=1e-6)
  assert_same_training(got, want)
