"""Reward models: where a reward is read, of what, and what is learned."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from configs import base as base_config
from configs import losses as losses_config
from dpo_jax import algos, loop, tree
from dpo_jax.algos import base, diagnostics, reward
from dpo_jax.config import load
from dpo_jax.ops import losses, reduce
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build, trained
from dpo_jax.train import state as state_lib
from tests import conftest, worlds
from tests.parallel import test_every_loss as every_loss
from tests.parallel import test_topology as topology

END = worlds.VOCAB - 1  # a token that also stands inside of prompts


def items_of(count=16):
  """Examples with rankings and scores, whose prompts hold end tokens."""
  out = []
  for e in worlds.examples(count, seed=1, completions=4):
    ranks = tuple(range(len(e.completions)))
    out.append(
      e._replace(
        prompt=[END, *e.prompt, END, 3],
        # Some were cut, so they have no end.
        completions=tuple(
          [*ids, END] if (k + e.example_id) % 3 else [*ids, 5 + k]
          for k, ids in enumerate(e.completions)
        ),
        scores=tuple(float(len(ranks) - k) for k in ranks),
        ranking=ranks,
      )
    )
  return out


ITEMS = items_of()


def config_of(loss="bradley_terry", **fields):
  config = base_config.get_config()
  config.algo, config.ref = "reward", "none"
  config.loss = losses_config.loss(loss)
  config.loss.update(fields)
  return config


def with_head(params, seed=3):
  """Parameters of a model and of a head that is not near 0."""
  width = params["embed"]["tokens"].shape[1]
  kernel = np.random.default_rng(seed).normal(size=width)
  head = {"kernel": jnp.float32(kernel), "bias": jnp.float32(0.25)}
  return {"model": params, "reward": head}


# ── Where a reward is read ───────────────────────────────────────────────────


@functools.cache
def llama():
  model, params = worlds.model("llama")
  return model.apply, with_head(params)


@functools.cache
def alone():
  """Rewards of every completion, each computed alone behind its prompt."""
  apply, params = llama()

  @jax.jit
  def last(params, batch, at):
    hidden, _ = apply(params["model"], batch)
    head = params["reward"]
    return hidden[0, at] @ head["kernel"] + head["bias"]

  out = []
  for e in ITEMS:
    for ids in e.completions:
      one = e._replace(completions=(ids,), pairs=(), ranking=None, scores=None)
      length = len(e.prompt) + len(ids)
      batch = worlds.batch([one], extra=40 - length)  # one program for all
      batch = {k: batch[k] for k in _READ}
      out.append(float(last(params, batch, length - 1)))
  return np.asarray(out)


_READ = ("tokens", "positions", "segment_ids", "branch_ids", "example_index")


def scores_of(batch, apply=None, params=None):
  """Rewards of all completions in the order of ITEMS."""
  if apply is None:
    apply, params = llama()
  values = jax.jit(functools.partial(reward.rewards, apply))(params, batch)
  found = {}
  count = base.completions(batch)
  real = batch["completion_weights"].reshape(values.shape) > 0
  assert np.all(np.asarray(values)[~real] == 0)
  for row, slot in zip(*np.nonzero(real), strict=True):
    key = batch["example_id"][row, slot // count], slot % count
    found[key] = float(values[row, slot])
  return np.asarray([found[key] for key in sorted(found)])


LAYOUTS = {
  "packed, shared, padded": {"extra": 5},
  "packed, repeated": {"shared": False},
  "rows of their own": {"packed": False},
  "rows of their own, repeated": {"packed": False, "shared": False},
  "other mates": {"row_multiple": 3},
}


def assert_read_at_the_last_token(layout="packed, shared, padded"):
  got = scores_of(worlds.batch(ITEMS, **LAYOUTS[layout]))
  # f32 of hidden states of order 1, in another order of sums.
  np.testing.assert_allclose(got, alone(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_is_the_same_whatever_lies_around_a_completion(layout):
  assert_read_at_the_last_token(layout)
  assert np.ptp(alone()) > 1


def at_a_pad(batch):
  return jnp.full_like(right(batch), batch["tokens"].shape[1] - 1)


def before_the_last(batch):
  last = right(batch)
  return jnp.where(last < batch["tokens"].shape[1], last - 1, last)


def at_the_first_end(batch):
  """As those find it who look for the end token in the whole text."""
  positions = jnp.arange(batch["tokens"].shape[1])
  ends = (batch["tokens"] == END) & (batch["segment_ids"] > 0)
  slots = jnp.arange(base.slots(batch))
  of_example = slots // base.completions(batch) + 1
  here = ends[:, None] & (
    batch["segment_ids"][:, None] == of_example[None, :, None]
  )
  first = jnp.min(jnp.where(here, positions, positions[-1]), axis=-1)
  return jnp.where(right(batch) < len(positions), first, len(positions))


right = reward.last_tokens


@pytest.mark.parametrize(
  "wrong",
  [at_a_pad, before_the_last, at_the_first_end],
  ids=lambda f: f.__name__,
)
def test_a_reward_that_is_read_elsewhere_is_found(wrong, monkeypatch):
  monkeypatch.setattr(reward, "last_tokens", wrong)
  with pytest.raises(AssertionError):
    assert_read_at_the_last_token()


def test_a_reward_of_seven_tenths_stays_one():
  """It never takes the type of the ids, nor is written into their array."""
  apply, params = worlds.tables_apply, with_head(worlds.tables())
  zero = jnp.zeros_like(params["reward"]["kernel"])
  head = {"kernel": zero, "bias": jnp.float32(0.7)}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    got = scores_of(worlds.batch(ITEMS), apply, {**params, "reward": head})
  np.testing.assert_array_equal(got, np.float32(0.7))


# ── What is learned of it ────────────────────────────────────────────────────


def terms_of(items, config, apply=worlds.tables_apply, params=None):
  params = with_head(worlds.tables()) if params is None else params
  algorithm = algos.make(config, apply)
  items = worlds.arranged(items, algorithm.data, "scores" in algorithm.needs)
  hparams = {
    k: jnp.float32(v) for k, v in base.numeric_fields(config.loss).items()
  }
  batch = worlds.batch(items)
  return algorithm.objective(params, {}, batch, hparams), batch


def table_scores(e):
  """Rewards of the completions of an example by the model of tables, in f64."""
  params = with_head(worlds.tables())
  embed, head = params["model"]["embed"], params["reward"]
  out = []
  for ids in e.completions:
    at = len(e.prompt) + len(ids) - 1
    hidden = np.tanh(
      np.float64(embed["tokens"])[ids[-1]] + np.float64(embed["positions"])[at]
    )
    out.append(hidden @ np.float64(head["kernel"]) + float(head["bias"]))
  return np.asarray(out)


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def test_the_loss_and_its_metrics_are_those_of_every_comparison():
  config = config_of(label_smoothing=0.1, centring=0.02)
  terms, _ = terms_of(ITEMS, config)
  means = reduce.means({**terms.metrics, "loss": terms.losses["bradley_terry"]})
  chosen, rejected = [], []
  for e in ITEMS:
    scores = table_scores(e)
    chosen += [scores[w] for w, _, _ in e.pairs]
    rejected += [scores[l] for _, l, _ in e.pairs]
  w, l = np.asarray(chosen), np.asarray(rejected)
  m = w - l
  every = np.concatenate([table_scores(e) for e in ITEMS])
  want = {
    "loss": -0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m) + 0.02 * (w + l) ** 2,
    "nll": -log_sigmoid(m),
    "brier": (1 - 1 / (1 + np.exp(-m))) ** 2,
    "rewards/chosen": w,
    "rewards/rejected": l,
    "rewards/margins": m,
    "rewards/accuracies": (1 + np.sign(m)) / 2,
    "rewards/mean": every,
    "rewards/square": every**2,
    "ended/chosen": np.ones(1),
  }
  for name, values in want.items():
    np.testing.assert_allclose(means[name], values.mean(), rtol=2e-5, atol=1e-6)
  totals = reduce.denominators(terms.metrics)
  derived = diagnostics.derived(reduce.means(terms.metrics), totals)
  np.testing.assert_allclose(derived["rewards/std"], every.std(), rtol=1e-5)
  low, high = (derived[f"rewards/accuracies_{s}"] for s in ("low", "high"))
  assert low < derived["rewards/accuracies"] < high


def test_a_tie_counts_one_half():
  e = ITEMS[1]._replace(completions=(ITEMS[1].completions[0],) * 2)
  e = e._replace(pairs=((0, 1, 1.0),))
  terms, _ = terms_of([e], config_of())
  means = reduce.means(terms.metrics)
  assert means["rewards/accuracies"] == 0.5
  np.testing.assert_allclose(means["nll"], np.log(2), rtol=1e-6)


def test_a_soft_label_weighs_both_ways_round():
  """.7 stays .7: the loss is 0.7 of one way and 0.3 of the other."""
  (e, *_) = (e for e in ITEMS if len(e.completions) == 2)
  soft = e._replace(pairs=((0, 1, 0.7), (1, 0, 0.3)))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    terms, batch = terms_of([soft], config_of())
  assert sorted(batch["weights"].ravel())[-2:] == [
    np.float32(0.3),
    np.float32(0.7),
  ]
  m = float(-np.diff(table_scores(e))[0])
  want = -0.7 * log_sigmoid(m) - 0.3 * log_sigmoid(-m)
  got = reduce.means(terms.losses)["bradley_terry"]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_margins_are_the_gaps_of_the_scores():
  config = config_of("bradley_terry_margin", alpha=0.5)
  terms, _ = terms_of(ITEMS, config)
  want = []
  for e in ITEMS:
    r, s = table_scores(e), np.asarray(e.scores)
    want += [
      -log_sigmoid(r[w] - r[l] - 0.5 * (s[w] - s[l])) for w, l, _ in e.pairs
    ]
  got = reduce.means(terms.losses)["bradley_terry_margin"]
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)


def test_a_ranking_is_drawn_best_first_of_what_is_left():
  terms, _ = terms_of(ITEMS, config_of("plackett_luce_reward"))
  want = []
  for e in ITEMS:  # of two and of four
    r = table_scores(e)
    want.append(-sum(r[k] - np.logaddexp.reduce(r[k:]) for k in range(len(r))))
  got = reduce.means(terms.losses)["plackett_luce_reward"]
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)


def test_each_source_has_metrics_of_its_own():
  config = config_of()
  config.data.train = "toy + toy"
  items = [e._replace(source=k % 2) for k, e in enumerate(ITEMS)]
  means = reduce.means(terms_of(items, config)[0].metrics)
  for k in (0, 1):
    alone = reduce.means(
      terms_of([e for e in items if e.source == k], config_of())[0].metrics
    )
    for name in ("nll", "rewards/accuracies", "brier"):
      np.testing.assert_allclose(
        means[f"source{k}/{name}"], alone[name], rtol=1e-5
      )


def test_a_loss_of_ones_own_is_trained_and_its_code_is_known(monkeypatch):
  def mine(rewards):
    return {"loss": jnp.square(1 - (rewards[..., 0] - rewards[..., 1]))}

  row = losses.Loss(mine, data="rewards", reference=False)
  monkeypatch.setitem(losses.LOSSES, "mine", row)
  config = config_of("mine")
  terms, _ = terms_of(ITEMS, config)
  assert float(reduce.means(terms.losses)["mine"]) > 0
  assert "LOSSES['mine']" in algos.make(config, worlds.tables_apply).code


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"ref": "frozen"}, "ref = 'frozen' has no effect with algo 'reward'"),
    ({"log.tokens": True}, r"log\.tokens = True has no effect"),
    ({"model.head_chunk": 64}, r"model\.head_chunk = 64 has no effect"),
    ({"loss": "dpo"}, r"loss\.name \(of algo 'reward'\) = 'dpo' is not known"),
  ],
)
def test_what_a_reward_model_cannot_have_is_refused(changes, said):
  config = config_of(changes.pop("loss", "bradley_terry"))
  with config.ignore_type():
    config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=said):
    algos.make(config, None)


def test_gain_and_bias_are_of_reward_models_alone():
  config = topology.config_of()
  config.reward.centred = True
  with pytest.raises(ValueError, match=r"reward\.centred = True has no effect"):
    algos.make(config, None)


# ── The same wherever the batch is cut ───────────────────────────────────────


def compute(
  apply,
  params,
  *,
  accumulation=1,
  mesh=None,
  mode="jit",
  loss="bradley_terry",
  **layout,
):
  """(gradient, metrics, parameters after a step), as topology.compute_of."""
  config = config_of(loss)
  algorithm = algos.make(config, apply)
  items = worlds.arranged(ITEMS, algorithm.data, "scores" in algorithm.needs)
  numbers = base.numeric_fields(config.loss) | {"learning_rate": 0.1}
  numbers |= {"centring": 0.01}
  hparams = {k: jnp.float32(v) for k, v in numbers.items()}
  state = state_lib.create(params, topology.recording_sgd(), {}, {})
  batch = worlds.batch(items, **layout)
  fn = topology.gradient_and_step(
    algorithm, accumulation, run_lib.axis_name(mode)
  )
  if mesh is None:
    return jax.jit(fn)(state, batch, hparams)
  mesh = mesh_lib.make(config_dict.ConfigDict({**mesh, "context": 1}))
  if mode == "jit":
    spec = trained.partition_spec(mode, ("reward",))
    state = run_lib.place(state, mesh_lib.shardings(mesh, state, spec))
  batch = run_lib.place_batch(batch, mesh, mode)
  return run_lib.evaluator(fn, mesh, mode)(state, batch, hparams)


CUT = {k: v for k, v in every_loss.CUT.items() if "chunk" not in v}
SLOW = pytest.mark.slow
FAST = ("mesh, accumulation", "pmap, accumulation")


@functools.cache
def truth(loss, model="tables"):
  return compute(*MODELS[model](), loss=loss, packed=False, shared=False)


MODELS = {
  "tables": lambda: (worlds.tables_apply, with_head(worlds.tables())),
  "llama": llama,
}
OF_REWARDS = [n for n, loss in losses.LOSSES.items() if loss.of_rewards]


def assert_equal(got, want):
  """As topology's; a head that is not read has a gradient of 0."""
  for (path, a), (_, b) in zip(
    tree.named(got[0]), tree.named(want[0]), strict=True
  ):
    size = np.linalg.norm(b)
    assert np.linalg.norm(np.asarray(a) - b) <= 1e-5 * size + 1e-7, path
  for key in want[1]:
    np.testing.assert_allclose(
      got[1][key], want[1][key], rtol=1e-4, atol=1e-5, err_msg=key
    )


@pytest.mark.parametrize(
  ("model", "cut"),
  [
    *(
      pytest.param("tables", cut, marks=() if cut in FAST else SLOW)
      for cut in CUT
    ),
    pytest.param("llama", FAST[0], marks=SLOW),
  ],
)
@pytest.mark.parametrize("loss", OF_REWARDS)
def test_a_reward_model_learns_the_same_wherever_the_batch_is_cut(
  loss, cut, model
):
  got = compute(*MODELS[model](), loss=loss, **CUT[cut])
  want = truth(loss, model)
  assert want[1]["grad_norm"] > 1e-3
  assert_equal(got, want)


# ── A run ────────────────────────────────────────────────────────────────────


def smoke(arg="", *overrides):
  return load.load_config(
    f"{conftest.ROOT}/configs/reward.py:smoke{arg}",
    ("data.eval=None", "checkpoint.every=1", "log.every=1", *overrides),
  )


def test_a_head_begins_by_the_seed_and_leaves_the_adapter_as_it_was():
  width, inner = 4000, trained.whole(keeps_reference=False)
  inner = inner._replace(init=lambda base, rng: jax.random.normal(rng, (3,)))
  heads = trained.with_heads(inner, ("reward", "value"), width)
  one, other = (heads.init({}, jax.random.key(s)) for s in (0, 1))
  kernel = np.asarray(one["reward"]["kernel"])
  # Of 4,000 normal numbers: the error of their spread is 1.1 %.
  assert abs(kernel.std() * np.sqrt(width + 1) - 1) < 0.05
  assert not np.array_equal(kernel, other["reward"]["kernel"])
  assert np.all(np.asarray(one["value"]["kernel"]) == 0)
  np.testing.assert_array_equal(one["model"], inner.init({}, jax.random.key(0)))
  with pytest.raises(ValueError, match="heads = 'reword' is not known"):
    trained.with_heads(inner, ("reword",), width).init({}, jax.random.key(0))


def checksums(folder, step):
  path = folder / "checkpoints" / str(step) / "meta" / "metadata"
  return json.loads(path.read_text())["checksums"]


WAYS = {
  "whole": ("", ()),
  "adapter, mesh": (",lora", ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")),
  "pmap": ("", ("mesh.mode=pmap",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(way, tmp_path):
  """With gain and bias that are measured once all steps are done."""
  arg, more = WAYS[way]
  config = smoke(arg, *more, "train.steps=3")
  whole = loop.fit(config, tmp_path / "whole")

  class Killed(BaseException):
    """Stands for the end of the process."""

  run = build.prepare(config)
  assert run.about[0].startswith("reward model, loss bradley_terry")

  def batch(number, state):
    if number == 2:
      raise Killed
    return run.feed.batch(number, state)

  cut = run._replace(feed=run.feed._replace(batch=batch, ahead=0))
  with pytest.raises(Killed):
    loop.fit(config, tmp_path / "cut", cut)
  assert not (tmp_path / "cut" / "reward.json").exists()
  loop.fit(config, tmp_path / "cut", run)
  assert checksums(tmp_path / "cut", 3) == checksums(tmp_path / "whole", 3)
  found = [(tmp_path / n / "reward.json").read_text() for n in ("cut", "whole")]
  assert found[0] == found[1]
  assert json.loads(found[0])["step"] == 3
  kernel = whole.state.params["reward"]["kernel"]
  assert float(jnp.max(jnp.abs(kernel))) > 0
