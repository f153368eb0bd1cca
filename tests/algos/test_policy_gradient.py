"""PPO, RLOO, GRPO and REINFORCE as a run has them: draws, steps, controls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from dpo_jax import tree
from dpo_jax.algos import base, policy_gradient
from dpo_jax.config import load
from dpo_jax.data.batch import rows
from dpo_jax.eval import generate, rewards, rollouts
from dpo_jax.ops import rl
from tests.algos import rewarded

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _scorers(monkeypatch):
  rewarded.registered(monkeypatch)


# ── The first epoch: the policy that is trained is the one that drew ─────────

WHOLE = ("data.batch_size=8",)  # an epoch is one step
WAYS = {
  "ppo": ("", ()),
  "ppo-copy": (",loss=ppo", ("rollout.critic=copy",)),
  "ppo-unshared": (",loss=ppo", ("data.shared=false",)),
  "rloo-hot": (",loss=rloo", ("rollout.temperature=0.7",)),
  "grpo": (",loss=grpo", ()),
  "reinforce": (",loss=reinforce", ("loss.average=tokens",)),
  "rloo-adapter": (",loss=rloo,lora", ()),
  "ppo-adapter-from-a": (",lora", ("lora.zero=a",)),
}


@pytest.mark.parametrize(
  "way",
  [pytest.param(w, marks=() if w == "ppo" else slow) for w in WAYS],
)
def test_in_the_first_epoch_the_ratio_is_one(way):
  arg, overrides = WAYS[way]
  run = rewarded.alone(*WHOLE, *overrides, arg=arg)
  state = rewarded.state_of(run)
  batch, _ = run.feed.batch(0, state)
  there = np.asarray(base.scored_mask(batch))
  values = np.asarray(batch["values"]) if "values" in batch else None
  returns, made = np.asarray(batch["returns"]), np.asarray(batch["advantages"])
  _, found = run.step(state, batch, run.hparams)
  found = {name: float(x) for name, x in found.items()}
  # Two programs of the same f32 log-probs; the sampler's has a cache.
  assert abs(found["policy/ratio"] - 1) < 1e-5
  assert found["policy/approx_kl"] < 1e-10
  assert found["policy/clipfrac"] == 0
  assert found["sampling/gap"] < 1e-4
  assert found["objective/kl"] == 0  # nothing has moved yet
  assert found["grad_norm"] > 1e-4
  if values is not None:
    assert not values.any()  # a new head says 0, exactly
    assert found["value/explained_variance"] < 1e-5
    error = np.mean(np.square(returns[there]))
    np.testing.assert_allclose(found["value/loss"], error / 2, rtol=1e-5)
  if way.startswith(("ppo", "reinforce")):  # whitened, over all tokens
    assert abs(found["policy/loss"]) < 1e-5
    assert abs(made[there].mean()) < 1e-5
    assert abs(made[there].std() - 1) < 1e-4
  assert not made[~there].any()
  assert not returns[~there].any()


def test_explained_variance_of_ppo_is_that_of_all_tokens():
  """1 − Var(R − V) / Var(R), of a step that began with a critic."""
  run = rewarded.alone(*WHOLE)
  state = rewarded.state_of(run)
  head = {
    "kernel": jnp.linspace(-1, 1, len(state.params["value"]["kernel"])),
    "bias": jnp.float32(0.3),
  }
  place = jax.tree.map(lambda x: x.sharding, state.params["value"])
  head = jax.device_put(head, place)
  state = state.replace(params={**state.params, "value": head})
  batch, _ = run.feed.batch(0, state)
  there = np.asarray(base.scored_mask(batch))
  returns, values = (np.asarray(batch[k])[there] for k in ("returns", "values"))
  assert values.std() > 0.1
  _, found = run.step(state, batch, run.hparams)
  want = 1 - np.var(returns - values) / np.var(returns)
  # Differences of means of squares, in f32.
  np.testing.assert_allclose(
    float(found["value/explained_variance"]), want, rtol=1e-3, atol=1e-4
  )


# ── An iteration's steps ─────────────────────────────────────────────────────


def test_ppo_has_every_completion_once_an_epoch_in_another_order():
  run = rewarded.alone()
  state = rewarded.state_of(run)
  drawn = []
  for number in range(rewarded.STEPS):
    batch, _ = run.feed.batch(number, state)
    there = np.asarray(batch["completion_weights"]).any(axis=(1, 2))
    drawn.append(np.asarray(batch["example_id"])[there, 0].tolist())
  epochs = drawn[:2], drawn[2:]
  for epoch in epochs:
    assert sorted(itertools.chain(*epoch)) == list(range(8))
  assert epochs[0] != epochs[1]
  assert [run.feed.boundary(n) for n in range(9)] == [
    n % rewarded.STEPS == 0 for n in range(9)
  ]
  # The next iteration has the next prompts, and another order.
  batch, _ = run.feed.batch(rewarded.STEPS, state)
  ids = np.asarray(batch["example_id"])
  assert ids[ids > 0].min() >= 8


def pieces(kl):
  """The metrics that the controller reads."""
  return {"objective/kl": jnp.float32(kl), "policy/approx_kl": jnp.float32(kl)}


def followed(controller, kls, coefficient=0.2):
  """The controller's states after steps with these KLs."""
  extra = policy_gradient._extra({}, coefficient=coefficient, warmup=0)
  out = []
  for number, kl in enumerate(kls, 1):
    extra = policy_gradient.follow(
      extra, {}, jnp.int32(number), pieces(kl), controller=controller
    )
    out.append({name: float(x) for name, x in extra.items()})
  return out


CONTROLLER = policy_gradient.Controller(2, 3.0, 100, 10, 0, None)


@pytest.mark.parametrize(
  ("kls", "error"), [((3.0, 3.6), 0.1), ((9.0, 9.0), 0.2), ((0.0, 1.0), -0.2)]
)
def test_ppo_s_coefficient_follows_the_kl_of_an_iteration(kls, error):
  """β (1 + clip(KL / target − 1, ±.2) · n / horizon), at its end alone."""
  first, second = followed(CONTROLLER, kls)
  np.testing.assert_allclose(first["coefficient"], 0.2, rtol=1e-6)
  want = 0.2 * (1 + error * 10 / 100)
  np.testing.assert_allclose(second["coefficient"], want, rtol=1e-6)
  assert second["seen"] == second["kl"] == 0  # the next begins anew
  held = CONTROLLER._replace(target=None, horizon=None)
  np.testing.assert_allclose(
    followed(held, kls)[-1]["coefficient"], 0.2, rtol=1e-6
  )


def test_ppo_stops_for_the_rest_of_an_iteration_only():
  controller = CONTROLLER._replace(steps=3, target=None, kl_stop=0.5)

  def resting(controller, kls):  # before the updates 2, 3, …
    states = followed(controller, kls)
    return [n < state["rests"] for n, state in enumerate(states, 1)]

  kls = (0.1, 0.6, 0.1, 0.1)
  assert resting(controller, kls) == [False, True, False, False]
  kls = (0.6, 0.1, 0.1, 0.9)
  longer = controller._replace(steps=4)
  assert resting(longer, kls) == [True, True, True, False]


CONTROLLED = ("rollout.warmup=1", "rollout.kl_stop=1e-8")


def differs(one, other):
  """Whether any bit of two trees differs."""
  return any(
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


@pytest.mark.parametrize("critic", ["head", pytest.param("copy", marks=slow)])
def test_ppo_warms_up_its_critic_and_stops_at_a_kl(critic):
  """First the critic alone learns; then steps until the policy has moved."""
  run = rewarded.alone(*CONTROLLED, f"rollout.critic={critic}")
  state, seen = rewarded.state_of(run), []
  for number in range(3 * rewarded.STEPS):
    batch, _ = run.feed.batch(number, state)
    before = jax.device_get(state.params)
    state, found = run.step(state, batch, run.hparams)
    after = jax.device_get(state.params)
    moved = {name: differs(before[name], after[name]) for name in before}
    seen.append((moved, float(found["policy/approx_kl"])))
  first, second, third = (seen[i : i + 4] for i in (0, 4, 8))
  critics = {"value"} | ({"critic"} if critic == "copy" else set())
  for moved, kl in first:
    assert not moved["model"]
    assert moved["value"]
    assert kl < 1e-10
  # A head that is still 0 gives its trunk no gradient.
  assert all(moved[name] for moved, _ in first[1:] for name in critics)
  for steps in (second, third):
    # The step that finds the policy moved is the last of its iteration.
    kls = [kl > 1e-8 for _, kl in steps]
    assert kls == [False, True, True, True]
    for name in ("model", *critics):
      assert [moved[name] for moved, _ in steps] == [True, True, False, False]


@slow
def test_ppo_s_policy_begins_after_the_warm_up_as_if_there_were_none():
  """Its optimiser is as at step 0, and its first update is Adam's first."""
  run = rewarded.alone(
    *("rollout.warmup=1", "optim.warmup=0", "optim.eps=1e-12"),
    arg=",optim=adamw",
  )
  state = rewarded.state_of(run)
  fresh = jax.device_get(state.opt_state[1])
  for number in range(rewarded.STEPS):
    batch, _ = run.feed.batch(number, state)
    state, _ = run.step(state, batch, run.hparams)
  parts = jax.device_get(state.opt_state[1])
  assert not differs(parts.resting, fresh.resting)
  assert parts.others[0].count == rewarded.STEPS
  before = jax.device_get(state.params["model"])
  batch, _ = run.feed.batch(rewarded.STEPS, state)
  state, found = run.step(state, batch, run.hparams)
  rate = float(found["learning_rate"])
  moved = [
    np.abs(after - was).ravel() / rate
    for after, was in zip(
      jax.tree.leaves(jax.device_get(state.params["model"])),
      jax.tree.leaves(before),
      strict=True,
    )
  ]
  # g / (|g| + eps): 1 wherever there is a gradient. With the count of the
  # warm-up's four updates it would be 0.55.
  moved = np.concatenate(moved)
  np.testing.assert_allclose(np.median(moved[moved > 0]), 1, rtol=1e-2)


# ── What the fields of config.loss and config.rollout do ─────────────────────


def advantages_of(name, centred=False, **changes):
  """advantages and returns f32[B, K, N] of fixed draws, and their mask."""
  fields = common.policy_gradient(name).to_dict() | changes
  rng = np.random.default_rng(0)
  mask = np.arange(5) < rng.integers(2, 6, (3, 4))[..., None]
  drawn = {
    name: rng.normal(size=mask.shape).astype(np.float32) * mask
    for name in ("old_logps", "ref_token_logps", "values")
  }
  if not rl.ESTIMATORS[name].critic:
    del drawn["values"]
  scores = rng.normal(size=(3, 4)).astype(np.float32)
  if centred:
    scores -= scores.mean(axis=1, keepdims=True)
  extra = {"coefficient": jnp.float32(fields["beta"])}
  estimator = rl.ESTIMATORS[name].fn
  out = policy_gradient.advantages(
    scores, drawn, mask, extra, estimator=estimator, fields=fields
  )
  return {k: np.asarray(v) for k, v in out.items()}, mask


@pytest.mark.parametrize(
  ("name", "field", "value", "changed"),
  [
    ("ppo", "gamma", 0.9, {"advantages", "returns"}),
    ("ppo", "lam", 0.5, {"advantages"}),
    ("ppo", "value_lam", 0.5, {"returns"}),
    ("ppo", "beta", 0.5, {"advantages", "returns"}),
    ("ppo", "whiten", "none", {"advantages"}),
    ("ppo", "whiten", "both", {"advantages", "returns"}),
    ("reinforce", "gamma", 0.9, {"advantages", "returns"}),
    ("rloo", "whiten", "rewards", {"advantages", "returns"}),
    ("rloo", "whiten", "advantages", {"advantages"}),
    ("grpo", "scale", "none", {"advantages"}),
    ("grpo", "beta", 0.5, {"advantages", "returns"}),
  ],
)
def test_a_field_of_an_estimator_changes_what_it_says(
  name, field, value, changed
):
  before, _ = advantages_of(name)
  after, _ = advantages_of(name, **{field: value})
  for part, values in after.items():
    distance = np.abs(values - before[part]).max()
    assert distance > 1e-2 if part in changed else distance < 1e-6, part


@pytest.mark.parametrize("name", rl.ESTIMATORS)
def test_scores_that_are_centred_by_prompt_change_what_has_no_group(name):
  """A baseline of the prompt's own completions takes the mean out as well."""
  before, after = (
    advantages_of(name, centred, whiten="none")[0]["advantages"]
    for centred in (False, True)
  )
  distance = np.abs(after - before).max()
  assert distance < 1e-6 if rl.ESTIMATORS[name].group else distance > 1e-2


@pytest.mark.parametrize(
  ("mode", "cost"), [("keep", None), ("subtract", 0.5), ("replace", -1.0)]
)
def test_centred_scores_of_a_prompt_have_mean_zero_before_ends_cost(mode, cost):
  drawn = fake_draws(2, 3, 8)
  raw = np.asarray([[1.0, 2.0, 6.0], [0.7, 0.7, 0.7]])
  missing = np.asarray([[not d.finished for d in drawn]]).reshape(raw.shape)
  made = rollouts.Rollouts(drawn, [], [], None, raw)

  def of(centre):
    options = load.plain(rewarded.config_of().rollout)
    options = options._replace(
      centre=centre, missing_end=mode, missing_score=cost
    )
    return rollouts.rewards_of(options, made)

  zero = raw - np.asarray([[3.0], [0.7]])
  if mode == "keep":
    np.testing.assert_allclose(of("prompt").mean(axis=1), 0, atol=1e-7)
  assert missing.any()
  costs = {
    "keep": zero,
    "subtract": zero - 0.5 * missing,
    "replace": np.where(missing, -1.0, zero),
  }
  np.testing.assert_allclose(of("prompt"), costs[mode], atol=1e-6)
  untouched = {"subtract": raw - 0.5 * missing}.get(mode, raw)
  if mode != "replace":
    np.testing.assert_allclose(of("none"), untouched, atol=1e-6)
  assert of("none").dtype == of("prompt").dtype == np.float32


def test_reinforce_learns_from_centred_scores_and_logs_them_as_they_are():
  """In an iteration as it is run: only the advantages see the centre."""
  found = {}
  for centre in ("none", "prompt"):
    run = rewarded.alone(
      *("rollout.draws=2", f"rollout.centre={centre}", "loss.whiten=none"),
      *("data.batch_size=8", "loss.beta=0.0"),
      arg=",loss=reinforce",
    )
    batch, _ = run.feed.batch(0, rewarded.state_of(run))
    found[centre] = jax.device_get(batch)
  for name in ("tokens", "scores"):
    np.testing.assert_array_equal(
      found["none"][name], found["prompt"][name], err_msg=name
    )
  batch = found["prompt"]
  real = batch["completion_weights"] > 0
  scores = batch["scores"]
  mean = scores.sum(-1, keepdims=True) / np.maximum(real.sum(-1), 1)[..., None]
  want = np.where(real, scores - mean, 0.0)
  assert np.abs(want).max() > 0.01
  rows = np.arange(len(scores))[:, None]
  flat = np.pad(want.reshape(len(want), -1), ((0, 0), (0, 1)))
  of_tokens = flat[rows, batch["target_slot"]]
  np.testing.assert_allclose(batch["advantages"], of_tokens, atol=1e-6)


def test_returns_of_ppo_are_not_whitened():
  """They are raw advantage + value, whatever the policy's advantages become."""
  white, mask = advantages_of("ppo")
  raw, _ = advantages_of("ppo", whiten="none")
  np.testing.assert_array_equal(white["returns"], raw["returns"])
  real = white["advantages"][mask]
  assert abs(real.mean()) < 1e-6
  assert abs(real.std() - 1) < 1e-5


def fake_draws(prompts, draws, limit):
  """Draws of which every other was cut at the limit."""
  out = []
  for n in range(prompts * draws):
    ids = [65 + n % 26] * (limit if n % 2 else 1 + n % limit)
    out.append(
      generate.Draw(n, "p", [1, 2], "x", ids, n % 2 == 0, [-1.0] * len(ids))
    )
  return out


@pytest.mark.parametrize(
  ("mode", "score", "want"),
  [("keep", None, 0.7), ("replace", -1.0, -1.0), ("subtract", 0.2, 0.5)],
)
def test_ppo_treats_a_missing_end_as_it_is_told(mode, score, want, monkeypatch):
  config = rewarded.config_of()
  run = rewarded.alone()
  source = rewarded.source_of(config, run)
  options = source.options._replace(missing_end=mode, missing_score=score)
  drawn = fake_draws(8, 1, 8)
  monkeypatch.setattr(generate, "draws", lambda *_, **__: iter([drawn]))
  monkeypatch.setattr(rewards, "of_draws", lambda *_: np.full(len(drawn), 0.7))
  source = source._replace(options=options)
  made = rollouts.draw(source, rewarded.state_of(run), 0)
  made = rollouts.scored(source, made)
  for example, one in zip(made.examples, drawn, strict=True):
    expected = 0.7 if one.finished else want
    # .7 stays .7: no score is rounded on its way into the batch.
    np.testing.assert_allclose(example.scores, [expected], rtol=1e-7)
    assert example.ended == (one.finished,)
  layout = source.layout
  batch = rows.build(
    made.examples,
    [[i] for i in range(8)],
    source.shape,
    layout,
    {"scores": [example.scores for example in made.examples]},
  )
  assert batch["scores"].dtype == np.float32
  assert {round(float(x), 6) for x in batch["scores"][:, 0, 0]} == {0.7, want}


def test_end_tokens_in_prompts_change_nothing_for_ppo():
  """An end is looked for in completions, and only they are scored."""
  config, run = rewarded.config_of(), rewarded.alone()
  source, state = rewarded.source_of(config, run), rewarded.state_of(run)
  end = run.setup.tokenizer.end_ids[0]
  prompts = [
    (text, [*ids[:3], end, *ids[3:-1]]) for text, ids in source.prompts
  ]
  source = source._replace(prompts=prompts)
  loader = rollouts.loader_of(source, state, 0)
  batch, _ = loader.batch(0)
  # The sampler and the training pass agree on what they saw and scored.
  assert 0 < batch["gaps"].max() < 1e-4
  assert (batch["tokens"] == end).any()
  drawn = rollouts.draw(source, state, 0)
  for example, mask in zip(drawn.examples, drawn.mask, strict=True):
    for ids, there, ended in zip(
      example.completions, mask, example.ended, strict=True
    ):
      assert there.sum() == len(ids) > 0
      assert ended == (ids[-1] == end)
      assert end not in ids[:-1]


def test_values_of_ppo_are_read_where_the_token_is_predicted():
  """At source_index: at the prompt's last token for the first one."""
  run = rewarded.alone()
  batch, _ = run.feed.batch(0, rewarded.state_of(run))
  batch = jax.device_get(batch)
  there = base.scored_mask(batch)
  length = batch["tokens"].shape[1]
  place = np.arange(length, dtype=np.float32)
  hidden = np.broadcast_to(place[None, :, None], (len(there), length, 1))
  head = {"kernel": jnp.ones(1), "bias": jnp.zeros(())}
  values = np.asarray(base.head_values(head, hidden, batch))
  np.testing.assert_array_equal(values[there], batch["source_index"][there])
  assert np.all(batch["source_index"][there] < batch["target_index"][there])
  assert not values[~there].any()


# ── The same update however it is computed ───────────────────────────────────

MESHES = {
  "2x2x2-accumulation": (
    *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    "train.accumulation=2",
  ),
  "2x2x2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
  "pmap": ("mesh.mode=pmap",),
  "accumulation": ("train.accumulation=2",),
}


BIG = ("optim.learning_rate=0.3", "data.batch_size=8")


def after_an_iteration(run):
  """(params as numpy, metrics of each step)."""
  state, found = rewarded.state_of(run), []
  for number in range(2):
    batch, _ = run.feed.batch(number, state)
    state, metrics = run.step(state, batch, run.hparams)
    found.append({k: float(v) for k, v in metrics.items()})
  return jax.device_get(state.params), found


@slow
@pytest.mark.parametrize(
  ("way", "loss"),
  [
    ("2x2x2-accumulation", "ppo"),
    *((way, loss) for way in list(MESHES)[1:] for loss in ("ppo", "rloo")),
  ],
)
def test_an_update_is_the_same_on_every_mesh(way, loss):
  """Whitening, averages and the controller are of the global batch."""
  arg = f",optim=sgd,loss={loss}"
  params, found = after_an_iteration(
    rewarded.prepared(*BIG, *MESHES[way], arg=arg)
  )
  want, alone = after_an_iteration(rewarded.alone(*BIG, arg=arg))
  for got, expected in zip(found, alone, strict=True):
    assert set(got) == set(expected)
    for name, value in expected.items():
      # f32 sums of 64 tokens in another order, ratios of variances last.
      close = {"rtol": 1e-3, "atol": 2e-5}
      np.testing.assert_allclose(got[name], value, **close, err_msg=name)
  difference = tree.norm(jax.tree.map(jnp.subtract, params, want))
  start = jax.device_get(rewarded.state_of(rewarded.alone(*BIG, arg=arg)))
  moved = tree.norm(jax.tree.map(jnp.subtract, want, start.params))
  assert float(moved) > 1e-2
  assert float(difference) < 1e-3 * float(moved)
