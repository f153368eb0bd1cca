"""Online DPO: what is drawn, how it is compared, and what is learned of it."""

import functools
import json
import re

import jax
import numpy as np
import pytest

from configs import losses as loss_fields
from dpo_jax import algos, loop
from dpo_jax.algos import base
from dpo_jax.config import load
from dpo_jax.data.read import pairs
from dpo_jax.data.tokens import comparisons
from dpo_jax.eval import comparing, generate, rewards, rollouts
from dpo_jax.ops import losses, reduce
from dpo_jax.run import build, trained
from dpo_jax.run import rollouts as rules
from dpo_jax.train import checkpoint
from tests import conftest, worlds
from tests.algos import rewarded

WAYS = {  # eight devices, and eight rows a step
  "accumulation": ("mesh.data=4", "mesh.tensor=2", "train.accumulation=2"),
  "2x2x2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
  "pmap": ("mesh.mode=pmap",),
}
STEPS = 2  # of an iteration
OF_PAIRS = [
  name
  for name, loss in losses.LOSSES.items()
  if loss.data in ("pairs", "rankings") or loss.best_alone
]
OF_LABELS = [
  name
  for name, loss in losses.LOSSES.items()
  if loss.data in ("labels", "mismatched")
]


def letters(prompts, completions):
  """A reward: letters above e less those below, which few samples share."""
  del prompts
  return [
    sum((ord(c) > ord("e")) + ord(c) / 1000 for c in text)
    for text in completions
  ]


@pytest.fixture(autouse=True)
def scorers(monkeypatch):
  monkeypatch.setitem(rewards.SCORERS, "letters", letters)
  monkeypatch.setitem(rewards.SCORERS, "same", lambda p, c: [0.5] * len(c))
  nan = lambda p, c: [float("nan")] * len(c)  # noqa: E731
  monkeypatch.setitem(rewards.SCORERS, "nan", nan)


def config_of(arg="", *overrides):
  return load.load_config(
    f"{conftest.ROOT}/configs/online.py:smoke{arg}",
    (
      *("data.eval=None", "data.batch_size=8", "rollout.prompts=16"),
      *("data.max_completion_length=4", "rollout.scorer=letters"),
      *("train.steps=4", "checkpoint.every=1", "log.every=1"),
      *("optim.learning_rate=0.01", *overrides),
    ),
  )


def options_of(arg="", *overrides):
  """The fields of config.rollout."""
  return load.plain(config_of(arg, *overrides).rollout)


def example(scores, completions=None, number=0):
  if completions is None:
    completions = [[1, k] for k in range(len(scores))]
  return comparisons.Example(
    number, 0, [1], tuple(completions), (), scores=tuple(scores)
  )


def compared(scores, kind="pairs", arg="", overrides=(), **of):
  """(pairs, identical, tied) of one example."""
  options = options_of(arg, *overrides)
  one = example(scores, **of)
  (made,), facts = comparing.with_comparisons([one], kind, options)
  return made.pairs, facts["identical"][0], facts["tied"][0]


DETERMINISTIC = (
  "rollout.labels=deterministic",
  "rollout.label_scale=None",
)


# ── Comparisons of scores ────────────────────────────────────────────────────


def test_labels_depend_on_seed_iteration_and_prompt_alone():
  scores, numbers = (0.0, 0.5, 0.2, 0.4), range(40)
  options = options_of()

  def labels(examples, options=options):
    made, _ = comparing.with_comparisons(examples, "pairs", options)
    return {each.example_id: each.pairs for each in made}

  whole = [example(scores, number=number) for number in numbers]
  assert labels(whole) == labels(whole[::-1])
  assert labels(whole[7:9]) == {n: labels(whole)[n] for n in (7, 8)}
  assert len(set(labels(whole).values())) > 20
  other = labels(whole, options._replace(seed=1))
  assert (
    len(
      {number for number in numbers if other[number] != labels(whole)[number]}
    )
    > 20
  )


def winners_are_as_frequent_as_the_sigmoid_of_the_gap(scale=2.0):
  """P(i ≻ j) = σ(κ (r_i − r_j)), through the feed's comparisons."""
  scores, count = (0.0, 0.5, -0.25), 4000
  options = options_of("", f"rollout.label_scale={scale}", "rollout.draws=3")
  examples = [example(scores, number=number) for number in range(count)]
  made, _ = comparing.with_comparisons(examples, "pairs", options)
  wins = np.zeros((3, 3))
  for each in made:
    for winner, loser, weight in each.pairs:
      wins[winner, loser] += weight
  gaps = scale * np.subtract.outer(scores, scores)
  p = 1 / (1 + np.exp(-gaps))
  off = ~np.eye(3, dtype=bool)
  # 4 binomial standard errors.
  assert (np.abs(wins / count - p) < 4 * np.sqrt(p * (1 - p) / count))[
    off
  ].all()


def test_winners_are_as_frequent_as_the_sigmoid_of_the_gap():
  winners_are_as_frequent_as_the_sigmoid_of_the_gap()


def nothing_tied_counts():
  made, _, tied = compared((1.0, 2.0, 1.0), overrides=DETERMINISTIC)
  assert made == ((1, 0, 1.0), (2, 0, 0.0), (1, 2, 1.0))
  assert tied.tolist() == [0, 1, 0]


def test_ties_are_counted_and_not_trained_on():
  nothing_tied_counts()


def test_draws_decide_ties_and_count():
  made, _, tied = compared((1.0, 1.0), overrides=("rollout.draws=2",))
  assert [weight for *_, weight in made] == [1.0]
  assert tied.tolist() == [1]


@pytest.mark.parametrize("overrides", [(), DETERMINISTIC])
def test_identical_completions_are_counted_and_not_trained_on(overrides):
  made, identical, _ = compared(
    (1.0, 2.0, 1.0), completions=[[1, 2], [1], [1, 2]], overrides=overrides
  )
  weights = {frozenset(pair): weight for *pair, weight in made}
  assert weights == {
    frozenset((0, 1)): 1.0,
    frozenset((0, 2)): 0.0,
    frozenset((1, 2)): 1.0,
  }
  assert identical.tolist() == [0, 1, 0]


def test_the_best_is_compared_with_the_worst_alone():
  best = ("rollout.compare=best_worst", *DETERMINISTIC)
  made, *_ = compared((1.0, 3.0, -2.0, 2.0), overrides=best)
  assert made == ((1, 2, 1.0),)
  made, _, tied = compared((1.0, 1.0, 1.0), overrides=best)
  assert made[0][2] == 0
  assert tied.tolist() == [1]


def test_a_ranking_has_no_ties_and_nothing_twice():
  of = {"kind": "rankings", "arg": ",loss=plackett_luce"}
  made, *_ = compared((1.0, 3.0, 2.0), overrides=DETERMINISTIC, **of)
  assert made == ((1, 2, 0, 1.0),)
  made, identical, tied = compared(
    (1.0, 3.0, 1.0, 1.0),
    completions=[[1], [2], [3], [1]],
    overrides=DETERMINISTIC,
    **of,
  )
  assert made == ((1, 0, 1.0),)
  assert identical.tolist() == [0.25]
  assert tied.tolist() == [0.5]
  made, *_ = compared((1.0, 1.0), overrides=DETERMINISTIC, **of)
  assert made == ((0, 0.0),)


def test_rankings_are_drawn_as_plackett_luce_has_them():
  scores, count = np.asarray([0.0, 1.0, -0.5]), 6000
  first, order = np.zeros(3), 0
  for seed in range(count):
    ranked = pairs.ranking("abc", scores, "bradley_terry", [seed], scale=1.5)
    first[ranked[0]] += 1
    order += ranked == [1, 0, 2]
  weights = np.exp(1.5 * scores)
  share = weights / weights.sum()
  p = share[1] * weights[0] / (weights[0] + weights[2])
  # 4 binomial standard errors.
  error = 4 * np.sqrt(share * (1 - share) / count)
  assert (np.abs(first / count - share) < error).all()
  assert abs(order / count - p) < 4 * np.sqrt(p * (1 - p) / count)


def test_the_best_is_learned_from_even_if_all_are_the_same():
  """Else what is trained on would not be a best of K."""
  made, *_ = compared((1.0, 3.0, 2.0), kind="best", arg=",loss=nll")
  assert made == ((1, 0, 1.0),)
  made, *_ = compared((1.0, 1.0), kind="best", arg=",loss=nll")
  assert made == ((0, 1, 1.0),)


# ── Bugs that leave the loss falling ─────────────────────────────────────────


def labels_swapped(patch):
  right = pairs.judged
  wrong = lambda *args, **of: [  # noqa: E731
    each._replace(winner=each.loser, loser=each.winner)
    for each in right(*args, **of)
  ]
  patch.setattr(pairs, "judged", wrong)


def ties_trained_on(patch):
  right = pairs.judged
  wrong = lambda *args, **of: [  # noqa: E731
    each._replace(counts=True) for each in right(*args, **of)
  ]
  patch.setattr(pairs, "judged", wrong)


def scale_forgotten(patch):
  right = pairs.judged
  patch.setattr(pairs, "judged", lambda *args, scale, **of: right(*args, **of))


def old_samples_reused(patch):
  """Every iteration draws from the policy of the first."""
  right, first = rollouts.draw, []

  def wrong(source, state, iteration):
    first.append(state)
    return right(source, first[0], iteration)

  patch.setattr(rollouts, "draw", wrong)


def samples_are_of_the_policy_as_it_is():
  """Tokens come with the log-probs that this very policy gives them."""
  run, state = started()
  run.feed.batch(0, state)
  moved = state.replace(params=worlds.noisy(state.params, 2, 0.5))
  batch, _ = run.feed.batch(STEPS, moved)
  apply = functools.partial(base.token_logps, run.setup.model.apply)
  logps = np.asarray(jax.jit(apply)(moved.params, batch))
  # The sampler's f32 sums are in another order: 1e-6 seen.
  assert np.abs(logps - np.asarray(batch["old_logps"])).max() < 1e-4


@functools.cache
def started(arg="", *overrides):
  """(Run, TrainState at step 0)."""
  run = build.prepare(config_of(arg, *overrides))
  return run, build.initial_state(run, trained.initial(run.setup))


def test_samples_are_of_the_policy_as_it_is():
  samples_are_of_the_policy_as_it_is()


@pytest.mark.parametrize(
  ("plant", "check"),
  [
    (labels_swapped, winners_are_as_frequent_as_the_sigmoid_of_the_gap),
    (scale_forgotten, winners_are_as_frequent_as_the_sigmoid_of_the_gap),
    (ties_trained_on, nothing_tied_counts),
    (old_samples_reused, samples_are_of_the_policy_as_it_is),
  ],
  ids=lambda value: value.__name__,
)
def test_is_found(plant, check, monkeypatch):
  plant(monkeypatch)
  with pytest.raises(AssertionError):
    check()


# ── The feed ─────────────────────────────────────────────────────────────────


def test_batches_are_a_pure_function_of_the_state_and_the_iteration():
  run, state = started()
  batches = [run.feed.batch(n, state)[0] for n in range(2 * STEPS)]
  run.feed.batch(0, state)
  again = run.feed.batch(STEPS, state)[0]  # as after a restart
  for name, values in batches[STEPS].items():
    np.testing.assert_array_equal(values, again[name])
  ids = [set(np.ravel(batch["example_id"])) for batch in batches]
  assert ids[0] | ids[1] == set(range(16))
  assert ids[2] | ids[3] == set(range(16, 32))
  scores = [np.asarray(batch["scores"]) for batch in batches]
  assert not np.array_equal(scores[0], scores[STEPS])


def drawn(kind, count=6, arg="", overrides=()):
  """(examples, their batch): random completions that random scores compare."""
  rng = np.random.default_rng(3)
  items = [
    each._replace(scores=tuple(rng.normal(size=len(each.completions))))
    for each in worlds.examples(3 * count, completions=4)[::3]
  ]
  options = options_of(arg, *overrides)
  items, _ = comparing.with_comparisons(items, kind, options)
  return items, worlds.batch(items, packed=False)


def test_winners_have_the_higher_score_in_the_rows_of_a_step():
  items, batch = drawn("pairs", overrides=DETERMINISTIC)
  scores = np.asarray([each.scores for each in items])
  sides = np.take_along_axis(scores[:, None], batch["pairs"], axis=-1)
  assert batch["weights"].shape == (6, 6)
  assert (batch["weights"] == 1).all()
  assert (sides[..., 0] > sides[..., 1]).all()


@pytest.mark.parametrize(
  "fn",
  [
    lambda loss: loss,
    pytest.param(jax.grad, marks=pytest.mark.slow),
  ],
  ids=["value", "gradient"],
)
def test_the_loss_of_the_best_alone_is_sft_on_the_best_of_k(fn):
  """That is expert iteration."""
  items, batch = drawn("best", arg=",loss=nll")
  best = [
    each._replace(
      completions=(each.completions[int(np.argmax(each.scores))],),
      pairs=(),
      scores=None,
    )
    for each in items
  ]
  model, params = worlds.model("llama")
  config = config_of(",loss=nll")
  online = algos.make(config, model.apply)
  assert (online.data, online.compares) == ("prompts", "best")
  config = config.unlock()
  config.algo, config.loss = "sft", loss_fields.loss("sft")
  sft = algos.make(config.lock(), model.apply)

  def of(algorithm, batch):
    def loss(params):
      terms = algorithm.objective(params, {}, batch, {})
      (value,) = reduce.means(terms.losses).values()
      return value

    return jax.tree.leaves(jax.jit(fn(loss))(params))

  alone = worlds.batch(best, packed=False)
  # f32 sums of rows of another length.
  for one, other in zip(of(online, batch), of(sft, alone), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_held_out_comparisons_are_measured_as_offline():
  run = build.prepare(config_of("", "data.eval=toy:8"))
  loader, _ = run.held_out.loader()
  assert loader.comparisons == 8
  batch, _ = loader.batch(0)

  def terms(params, batch):
    batch = run.algorithm.prepare(batch, {"ref": params}, {})
    return run.algorithm.objective(params, {}, batch, run.hparams)

  shapes = trained.model_shapes(run.setup)
  names = jax.eval_shape(terms, shapes, batch).metrics
  assert "rewards/accuracies" in names
  assert not [name for name in names if name.startswith("objective/")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_PAIRS, *losses.MIXTURES])
def test_every_loss_is_finite_also_of_a_batch_without_comparisons(name):
  arg, overrides = f",loss={name}", labels_of(name)
  _, batch = drawn(loss_fields.compared(name), arg=arg, overrides=overrides)
  config = config_of(arg, *overrides)
  algorithm = algos.make(config, worlds.tables_apply)
  params = worlds.tables()
  extra, hparams = algorithm.extra(params), base.numeric_fields(config.loss)

  @jax.jit
  def terms(params, batch):
    def loss(params):
      ready = algorithm.prepare(batch, {"ref": worlds.tables()}, extra)
      out = algorithm.objective(params, {}, ready, hparams, extra)
      means = reduce.means({**out.losses, **out.metrics})
      return sum(means[name] for name in out.losses), means

    return jax.value_and_grad(loss, has_aux=True)(params)

  for weights in (batch["weights"], np.zeros_like(batch["weights"])):
    (_, means), slopes = terms(params, {**batch, "weights": weights})
    for value in jax.tree.leaves((means, slopes)):
      assert np.isfinite(value).all()
    moves = any(np.abs(s).max() > 0 for s in jax.tree.leaves(slopes))
    assert moves == (weights.sum() > 0)


def labels_of(name):
  """Overrides of a loss that needs winners with the higher score."""
  names = [term for _, term in loss_fields.parse(name)]
  scored = any("scores" in losses.LOSSES[term].needs for term in names)
  return DETERMINISTIC if scored else ()


# ── Runs ─────────────────────────────────────────────────────────────────────


def metrics(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def checksums(folder):
  path = folder / "checkpoints" / "4" / "meta" / "metadata"
  return json.loads(path.read_text())["checksums"]


@pytest.mark.parametrize(
  ("way", "arg"),
  [
    # The reference that moves is in the checkpoint too.
    *(
      pytest.param(way, arg, marks=pytest.mark.slow)
      for way, arg in (
        ("accumulation", ",round=1"),
        ("2x2x2", ""),
        ("2x2x2", ",lora"),
        ("pmap", ""),
        ("pmap", ",loss=bco"),
        ("accumulation", ",loss=kto_pair"),
        ("2x2x2", ",loss=nll"),
        ("2x2x2", ",loss=plackett_luce"),
      )
    ),
  ],
)
def test_a_run_killed_in_an_iteration_goes_on_to_the_same_bits(
  way, arg, tmp_path
):
  config = config_of(arg, *WAYS[way])
  run = build.prepare(config)
  whole = loop.fit(config, tmp_path / "whole", run)
  with pytest.raises(rewarded.Killed):
    loop.fit(config, tmp_path / "cut", rewarded.killed_before(run, 3))
  # Every step was due, and the one boundary was saved.
  with checkpoint.Checkpointer(tmp_path / "cut", keep=2) as saved:
    assert saved.steps() == [2]
  loop.fit(config, tmp_path / "cut", run)
  assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")
  first, _, third, _ = metrics(tmp_path / "whole")
  if config.ref != "none":
    # What draws is the reference at first, and again where that follows it;
    # else it has moved: 1e-2 seen.
    assert abs(first["objective/kl"]) < 1e-5
    assert (abs(third["objective/kl"]) < 1e-5) == (config.ref == "ema")
  if config.ref == "ema":
    state = whole.state
    for ref, now in zip(
      *map(jax.tree.leaves, (state.extra["ref"], state.params)), strict=True
    ):
      np.testing.assert_array_equal(ref, now)


@pytest.mark.slow
def test_the_first_iteration_is_the_same_on_every_mesh(tmp_path):
  seen = []
  for way, overrides in WAYS.items():
    loop.fit(config_of("", "train.steps=2", *overrides), tmp_path / way)
    seen.append(metrics(tmp_path / way))
  # Not accuracies: at step 0 the sign of a margin is that of its rounding.
  known = "loss$|objective/|rewards/(chosen|rejected|margins)$"
  names = [name for name in seen[0][0] if re.match(known, name)]
  assert len(names) > 8
  for rows in seen[1:]:
    for row, want in zip(rows, seen[0], strict=True):
      for name in names:
        # Rounding of f32; the same tokens are drawn.
        np.testing.assert_allclose(row[name], want[name], atol=1e-4)


@pytest.mark.slow
def test_a_run_of_ties_alone_learns_nothing_and_says_so(tmp_path, capsys):
  config = config_of("", "rollout.scorer=same", "train.steps=2", *DETERMINISTIC)
  result = loop.fit(config, tmp_path)
  setup = build.prepare_model(config)
  for before, after in zip(
    *map(jax.tree.leaves, (trained.initial(setup), result.state.params)),
    strict=True,
  ):
    np.testing.assert_array_equal(before, after)
  assert "step 0: no comparison counts" in capsys.readouterr().out
  (first, _) = metrics(tmp_path)
  assert (first["comparisons/tied"], first["comparisons/used"]) == (1, 0)


# ── What cannot be had ───────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*OF_PAIRS, *losses.MIXTURES])
def test_every_loss_of_comparisons_brings_its_rollouts(name):
  config = config_of(f",loss={name}", *labels_of(name))
  build.check(config)
  every = {field for own in rules.OWN.values() for field in own}
  has = tuple(field for field in config.rollout if field in every)
  algorithm = algos.make(config, apply=None)
  assert set(has) == set(rules.OWN[algorithm.compares])


@pytest.mark.parametrize("name", OF_LABELS)
def test_losses_of_labels_are_refused(name):
  with pytest.raises(ValueError, match=f"loss '{name}' .* single completions"):
    build.check(config_of(f",loss={name}"))


@pytest.mark.parametrize(
  ("arg", "overrides", "said"),
  [
    ("", "rollout.scorer=None", "rollout.scorer = None"),
    ("", "rollout.scorer=implicit", "no expected gradient"),
    ("", "rollout.draws=1", "rollout.draws = 1: algo = 'online' compares"),
    ("", "rollout.prompts=12", "rollout.prompts = 12 of an iteration is no"),
    ("", "rollout.labels=same", "rollout.labels"),
    ("", "rollout.labels=deterministic", "rollout.label_scale = 1.0 with"),
    ("", "rollout.label_scale=None", "rollout.label_scale = None with"),
    ("", "rollout.compare=some", "rollout.compare"),
    ("", "rollout.compare=best_worst rollout.draws=2", "are one pair"),
    ("", "data.packed=True", "data.packed = True"),
    ("", "data.train=None", "data.train = None"),
    ("", "ref=cached", "ref = 'cached' needs completions"),
    ("", "algo=preference", "rollout has no effect with algo = 'preference'"),
    (",loss=odpo", "", "needs winners with the higher score"),
    (",loss=simpo,round=1", "", "ref = 'ema' has no effect"),
  ],
)
def test_what_no_run_can_have_is_refused_before_anything_is_built(
  arg, overrides, said
):
  with pytest.raises(ValueError, match=re.escape(said)):
    build.check(config_of(arg, *overrides.split()))


@pytest.mark.parametrize(
  ("config", "other"),
  [("online.py:smoke", "ppo.py:smoke"), ("ppo.py:smoke", "online.py:smoke")],
)
def test_rollouts_of_another_algorithm_are_refused(config, other):
  config, other = (
    load.load_config(f"{conftest.ROOT}/configs/{spec}", ()).unlock()
    for spec in (config, other)
  )
  config.rollout = other.rollout
  with pytest.raises(ValueError, match=r"config\.rollout has the fields"):
    build.check(config.lock())


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    (("rollout.scorer=nan",), "not finite"),
    (("rollout.prompts=64",), "rollout.prompts = 64, but .* only"),
    (("train.steps=3",), r"3 steps end inside .* train\.steps = 4"),
  ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(
  overrides, said, monkeypatch
):
  def draws(*args, **options):
    raise AssertionError("something was drawn")

  monkeypatch.setattr(generate, "draws", draws)
  with pytest.raises(ValueError, match=said):
    build.prepare(config_of("", *overrides))


def test_a_round_is_so_many_iterations():
  config = config_of(",round=3")
  # Of the file's own rollouts: 8 prompts, 4 a step.
  assert (config.ref, config.ref_mix, config.ref_every) == ("ema", 1.0, 6)
