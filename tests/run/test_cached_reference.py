"""The reference that is computed once: resumed, shared, checked."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from dpo_jax import loop
from dpo_jax.config import load as load_lib
from dpo_jax.data.batch import loader as loader_lib
from dpo_jax.data.batch import rows
from dpo_jax.run import build, forward, reference, trained
from dpo_jax.train import health, log
from tests import conftest, worlds

ITEMS = worlds.examples(22, seed=3, completions=4)


def load(*overrides, loss="dpo"):
  config = str(conftest.ROOT / f"configs/dpo.py:smoke,loss={loss}")
  return load_lib.load_config(config, ("data.batch_size=16", *overrides))


@pytest.fixture(scope="module")
def setup():
  return build.prepare_model(load())


@pytest.fixture(scope="module")
def ref(setup):
  """Parameters, none of which is zero."""
  return jax.device_get(worlds.noisy(trained.initial(setup), 1))


def stored(folder):
  """{name: (bytes, time of the last change)} of a reference store."""
  return {
    str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.fixture
def passes(monkeypatch):
  """A list that gets the numbers of the batches of every pass."""
  right, seen = forward.token_logps, []

  def counted(setup, params, loader, numbers):
    seen.append([])
    for n in numbers:
      seen[-1].append(n)
      yield from right(setup, params, loader, [n])

  monkeypatch.setattr(forward, "token_logps", counted)
  return seen


def test_a_reference_is_computed_once_and_read_afterwards(
  setup, ref, tmp_path, passes
):
  batches = []
  for _ in range(2):
    loader = forward.loader_of(setup, ITEMS)
    forward.attach_reference(setup, ref, loader, tmp_path)
    forward.attach_reference(setup, ref, loader, tmp_path)
    batches.append([loader.batch(n)[0] for n in range(loader.steps)])
    if len(batches) == 1:
      before = stored(tmp_path)
  assert passes == [[0, 1]]
  assert stored(tmp_path) == before
  jax.tree.map(np.testing.assert_array_equal, *batches)
  loader = forward.loader_of(setup, ITEMS)
  want = dict(forward.token_logps(setup, ref, loader, range(loader.steps)))
  for number, batch in enumerate(batches[1]):
    for index, logps in loader.unpack(number, batch["ref_token_logps"]):
      np.testing.assert_array_equal(logps, want[index])


def reference_of(loader):
  """[f32[scored]]: what each example was given, by the batches it is in."""
  found = {}
  for n in range(loader.steps):
    batch, _ = loader.batch(n)
    found |= dict(loader.unpack(n, batch["ref_token_logps"]))
  return [found[i] for i in range(len(ITEMS))]


def test_the_order_of_training_and_a_mixture_share_the_entry(
  setup, ref, tmp_path, passes
):
  """In order, shuffled, and with every example twice an epoch."""
  got = []
  for seed, weights_ in ((None, None), (5, None), (5, (2.0,))):
    layout = rows.Layout(True, True, 8, None)
    options = {"batch_size": 16, "budget": 3, "multiple": 8}
    loader = loader_lib.Loader(
      ITEMS, layout, seed=seed, weights=weights_, **options
    )
    forward.attach_reference(setup, ref, loader, tmp_path)
    got.append(reference_of(loader))
  assert passes == [[0, 1]]
  for others in got[1:]:
    for ours, theirs in zip(got[0], others, strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_every_loss_shares_the_entry(ref, tmp_path, passes):
  """And every β, seed of the order and learning rate."""
  others = ("loss.beta=5.0", "optim.learning_rate=1.0", "data.seed=9")
  runs = (("dpo", ()), ("dpo", others), ("ipo", ()), ("hinge", ()))
  for loss, overrides in runs:
    setup = build.prepare_model(load("ref=cached", *overrides, loss=loss))
    loader = forward.loader_of(setup, ITEMS)
    forward.attach_reference(setup, ref, loader, tmp_path)
    assert loader.has_reference
  assert passes == [[0, 1]]
  assert len(list(tmp_path.iterdir())) == 1


def test_the_values_stay_on_disk(setup, ref, tmp_path, monkeypatch):
  given = []
  monkeypatch.setattr(
    loader_lib.Loader,
    "set_reference",
    lambda self, values: given.append(values),
  )
  for _ in range(2):  # just written, and found
    loader = forward.loader_of(setup, ITEMS)
    forward.attach_reference(setup, ref, loader, tmp_path)
  for values in given:
    assert len(values) == len(ITEMS)
    assert all(isinstance(x.base.base, np.memmap) for x in values)


@pytest.fixture
def blocks(monkeypatch):
  """Blocks of four examples: six of them hold ITEMS."""
  monkeypatch.setattr(reference, "EXAMPLES_PER_BLOCK", 4)


@pytest.fixture(scope="module")
def fives():
  """A Setup whose batches are of five examples, so that blocks cut them."""
  return build.prepare_model(load("data.batch_size=5"))


def attach(setup, params, folder, items=ITEMS):
  """The store in `folder` after a run that asked for it."""
  loader = forward.loader_of(setup, items)
  store = folder / "ref_logps"
  forward.attach_reference(setup, params, loader, store)
  return stored(store)


def contents(files):
  return {name: content for name, (content, _) in files.items()}


def number_of(name):
  """The block of a file of the store."""
  return int(name.split("/")[1].split("-")[0])


@pytest.mark.parametrize("after", [0, 3, 13, 21])
def test_what_was_interrupted_goes_on_where_it_was(
  after, blocks, fives, ref, tmp_path, passes, monkeypatch
):
  def interrupted(*args):
    for done, item in enumerate(scoring_pass(*args)):
      if done == after:
        raise KeyboardInterrupt
      yield item

  scoring_pass = forward.token_logps
  whole = attach(fives, ref, tmp_path / "whole")
  assert passes.pop() == [0, 1, 2, 3, 4]
  with monkeypatch.context() as context:
    context.setattr(forward, "token_logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
      attach(fives, ref, tmp_path)
  passes.clear()
  before = stored(tmp_path / "ref_logps")
  there = {number_of(x) for x in before if x.endswith(".f32")}
  # Batches are in order and examples inside of one are in any: of the block
  # that the interrupted batch cuts, and of no other, it may go either way.
  assert there >= set(range(after // 5 * 5 // 4))
  assert there <= set(range(after // 4 + 2))
  resumed = attach(fives, ref, tmp_path)
  missing = set(range(6)) - there
  examples = {i for i in range(22) if i // 4 in missing}
  assert passes == [sorted({i // 5 for i in examples})]
  assert resumed.items() >= before.items()  # untouched, and
  assert contents(resumed) == contents(whole)  # to the bit
  assert attach(fives, ref, tmp_path) == resumed
  assert len(passes) == 1


def test_damaged_and_missing_blocks_alone_are_computed_again(
  blocks, fives, ref, tmp_path, passes
):
  whole = attach(fives, ref, tmp_path)
  folder = tmp_path / "ref_logps"
  damaged, missing = sorted(x for x in whole if x.endswith(".f32"))[1:6:4]
  content, _ = whole[damaged]
  (folder / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  (folder / missing).unlink()
  with pytest.warns(UserWarning, match="00001-.*damaged"):
    again = attach(fives, ref, tmp_path)
  # Examples 4 to 7, and 20 and 21.
  assert passes == [[0, 1, 2, 3, 4], [0, 1, 4]]
  assert contents(again) == contents(whole)
  changed = {name for name in whole if again[name] != whole[name]}
  assert changed == {damaged, missing}


def test_an_entry_that_says_it_is_another_one_is_refused(
  setup, ref, tmp_path, passes
):
  before = attach(setup, ref, tmp_path)
  (path,) = (tmp_path / "ref_logps").glob("*/entry.json")
  about = json.loads(path.read_text())
  about["made_of"]["precision"] = "default"
  path.write_text(json.dumps(about))
  with pytest.raises(ValueError, match="precision is default") as error:
    attach(setup, ref, tmp_path)
  assert str(path) in str(error.value)
  assert len(passes) == 1
  # What the message says to do.
  shutil.rmtree(path.parent)
  assert contents(attach(setup, ref, tmp_path)) == contents(before)


def test_other_weights_or_other_data_are_another_entry(setup, tmp_path, passes):
  def entries(seed, items):
    here = setup._replace(source=setup.source._replace(seed=seed))
    loader = forward.loader_of(here, items)
    params = trained.initial(here)
    forward.attach_reference(here, params, loader, tmp_path)
    return len(list(tmp_path.glob("*/entry.json")))

  other = [ITEMS[0]._replace(prompt=[1, *ITEMS[0].prompt[1:]]), *ITEMS[1:]]
  assert entries(0, ITEMS) == 1
  assert entries(1, ITEMS) == 2
  assert entries(0, other) == 3
  assert entries(1, ITEMS) == 3
  assert len(passes) == 3


def test_other_arithmetic_or_vocabulary_is_another_entry(
  setup, ref, tmp_path, passes
):
  attach(setup, ref, tmp_path)
  # Within the same padded weights: what the softmax is over.
  fewer = setup.model._replace(vocab_size=setup.model.vocab_size - 1)
  attach(setup._replace(model=fewer), ref, tmp_path)
  # Not by prepare_model, which sets it for the whole process.
  attach(setup._replace(precision="high"), ref, tmp_path)
  half = build.prepare_model(load("model.dtype=bfloat16"))
  attach(half, ref, tmp_path)
  assert len(passes) == 4
  assert len(list((tmp_path / "ref_logps").iterdir())) == 4


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


def of_eights(data, *overrides):
  """The config of three steps of eight comparisons."""
  return load(
    *(f"data.train={data}", "data.batch_size=8", "data.max_shapes=1"),
    *("train.steps=3", "log.every=1", *overrides),
  )


def test_a_run_uses_the_store_that_its_config_names(data, tmp_path, passes):
  """And leaves none in its own folder."""
  named = f"ref_store={tmp_path / 'named'}"
  for _ in range(2):
    config = of_eights(data, "data.eval=None", "ref=cached", named)
    run = build.prepare(config)
    loop.begin(run, tmp_path / "run")
    assert run.feed.loader.has_reference
  assert len(passes) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["named"]


def train(workdir, data, *overrides):
  """The lines of metrics.jsonl after three steps of eight comparisons."""
  loop.fit(of_eights(data, *overrides), workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same_training(got, want):
  for ours, theirs in zip(got, want, strict=True):
    measured = theirs.keys() - {"kind", *log.TIMED}
    if theirs["step"] == 1:
      # The policy still is the reference: rounding decides who is preferred.
      decided = ("rewards/accuracies", "calibration", "overconfidence")
      measured = {key for key in measured if not key.startswith(decided)}
    for key in measured:
      # Rounding, which two RMSprop steps have enlarged.
      np.testing.assert_allclose(
        ours[key], theirs[key], rtol=1e-4, atol=1e-5, err_msg=key
      )


def test_a_cached_reference_trains_as_a_frozen_one(data, tmp_path, passes):
  how = f"data.eval={data}", "train.accumulation=2"
  frozen = train(tmp_path / "frozen", data, *how, "ref=frozen")
  assert not passes
  assert not (tmp_path / "frozen/ref_logps").exists()
  assert [row["kind"] for row in frozen] == 3 * ["train"] + ["eval"]
  assert_same_training(
    train(tmp_path / "cached", data, *how, "ref=cached"), frozen
  )
  assert len(passes) == 1  # training and held-out data are the same
  before = stored(tmp_path / "cached/ref_logps")
  train(tmp_path / "cached", data, *how, "ref=cached")
  assert len(passes) == 1
  assert stored(tmp_path / "cached/ref_logps") == before


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_cached_reference_serves_pmap(accumulation, data, tmp_path):
  cut = f"train.accumulation={accumulation}"
  how = "data.eval=None", "mesh.mode=pmap", cut
  got, want = (
    train(tmp_path / ref, data, *how, f"ref={ref}")
    for ref in ("cached", "frozen")
  )
  assert len(got) == 3
  np.testing.assert_allclose(got[0]["loss"], np.log(2), rtol=1e-6)
  assert_same_training(got, want)


def test_a_signal_stops_the_pass_and_keeps_its_blocks(
  blocks, fives, ref, tmp_path, monkeypatch
):
  stop, right = health.Stop(), forward.token_logps

  def signalled(*args):
    for done, item in enumerate(right(*args)):
      if done == 13:
        stop.signal = signal.SIGTERM
      yield item

  monkeypatch.setattr(forward, "token_logps", signalled)
  loader = forward.loader_of(fives, ITEMS)
  with pytest.raises(health.Stopped) as caught:
    forward.attach_reference(fives, ref, loader, tmp_path, stop)
  assert caught.value.exit_code == health.EXIT_REQUEUE
  assert not loader.has_reference
  there = {number_of(x) for x in stored(tmp_path) if ".f32" in x}
  assert {0, 1} <= there < set(range(6))
