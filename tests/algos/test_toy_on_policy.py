"""An algorithm on policy, added from outside through the registries alone.

REINFORCE with a learned baseline in a world that can be enumerated: a policy
names one byte after a prompt, and vowels are worth 1. The policy is sampled
anew for every iteration, a value head sits on its trunk, and the coefficient of
the KL penalty follows the KL that was measured.

    python -m tests.algos.test_toy_on_policy FOLDER KILL_AT

trains it and kills the process before step KILL_AT.
"""

import functools
import itertools
import json
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from dpo_jax import algos, loop, notebook, sweeps
from dpo_jax.algos import base, preference
from dpo_jax.config import load
from dpo_jax.data.batch import loader, rows
from dpo_jax.data.tokens import comparisons
from dpo_jax.parallel import run as run_lib
from dpo_jax.run import build, feed, feeds, trained
from dpo_jax.train import checkpoint
from tests import conftest, processes

PROMPTS = ("the plot", "the film", "the cast", "the end ")  # of one length
DRAWS, MINIBATCHES, EPOCHS = 16, 2, 2  # of an iteration
STEPS = MINIBATCHES * EPOCHS
VOWELS = tuple(b"aeiou")
LAYOUT = rows.Layout(False, True, 1, None)
KILL_AT = None  # the step before which the feed kills the process


# ── The algorithm: one function, one line in ALGOS ───────────────────────────


def make(config, apply):
  del config
  return base.Algorithm(
    data="toy prompts",
    features=functools.partial(features, apply=apply),
    combine=combine,
    prepare=functools.partial(
      preference.reference_logps, apply=apply, outputs=False
    ),
    heads=("value",),
    extra=lambda params: {
      "coefficient": jnp.float32(0.1),
      "kls": jnp.zeros(2),
    },
    update=follow,
    held_out=False,
  )


def features(params, frozen, batch, hparams, rng, *, apply):
  """Log-ratio and value of each completion, f32[R, P·C]."""
  del frozen, hparams, rng
  hidden, head = apply(params["model"], batch)
  logps = base.head_logps((hidden, head), batch)
  at = jnp.take_along_axis(hidden, batch["source_index"][..., None], axis=1)
  values = at @ params["value"]["kernel"] + params["value"]["bias"]
  sums = functools.partial(base.completion_sums, batch=batch)
  weights = batch["completion_weights"].reshape(logps.shape[0], -1)
  fixed = {
    "ref_logps": sums(batch["ref_token_logps"]),
    "scores": batch["scores"].reshape(weights.shape),
    "weights": weights,
  }
  return {"logps": sums(logps), "values": sums(values)}, fixed


def combine(moving, fixed, extra, hparams):
  """−A log π + c (V − r)², with A = r − coefficient · log-ratio − V."""
  logps, weights = moving["logps"], fixed["weights"]
  log_ratio = jax.lax.stop_gradient(logps - fixed["ref_logps"])
  returns = fixed["scores"] - extra["coefficient"] * log_ratio
  advantages = returns - jax.lax.stop_gradient(moving["values"])
  error = jnp.square(moving["values"] - returns)
  losses = {
    "policy": (-advantages * logps, weights),
    "value": (hparams["value_weight"] * error, weights),
  }
  coefficient = jnp.full_like(logps, extra["coefficient"])
  metrics = {
    "objective/kl": (log_ratio, weights),
    "objective/scores": (fixed["scores"], weights),
    "objective/coefficient": (coefficient, weights),
  }
  return base.Terms(losses, jax.lax.stop_gradient(metrics))


def follow(extra, params, step, metrics):
  """The adaptive coefficient of arXiv:1909.08593 section 2.2."""
  del params, step
  error = jnp.clip(metrics["objective/kl"] / 0.1 - 1, -0.2, 0.2)
  return {
    "coefficient": extra["coefficient"] * (1 + 0.1 * error),
    "kls": jnp.roll(extra["kls"], 1).at[0].set(metrics["objective/kl"]),
  }


# ── The feed: one function, one line in FEEDS ────────────────────────────────


def make_feed(config, setup, algorithm):
  del config, algorithm
  drawn = {}  # of the iteration under way

  def batch(number, state):
    iteration, step = divmod(number, STEPS)
    if step == 0:
      drawn["examples"] = draw(setup, state, iteration)
    if number == KILL_AT:
      os.kill(os.getpid(), signal.SIGKILL)
    epoch, part = divmod(step, MINIBATCHES)
    examples = drawn["examples"]
    order = np.random.default_rng([7, iteration, epoch]).permutation(
      len(examples)
    )
    size = len(examples) // MINIBATCHES
    chosen = [examples[i] for i in order[part * size : (part + 1) * size]]
    return place(setup, chosen)

  size = len(PROMPTS) * DRAWS // MINIBATCHES
  return feed.Feed(
    batch=batch,
    ahead=0,
    boundary=lambda done: done % STEPS == 0,
    about="toy prompts",
    shapes=[shape_of(size)],
    fingerprint="toy prompts",
    epoch=len(PROMPTS),
  )


def draw(setup, state, iteration):
  """Examples of one byte each, under the policy as it is."""
  policy = setup.trained.model(state.frozen.get("base"), state.params)
  prompts = setup.tokenizer.encode([p for p in PROMPTS for _ in range(DRAWS)])
  ids = iteration * len(prompts) + np.arange(len(prompts))
  with jax.set_mesh(setup.mesh):
    samples = setup.programs.sample(
      policy,
      np.asarray(prompts, np.int32),
      np.asarray([len(ids) for ids in prompts], np.int32),
      ids.astype(np.int32),
      jax.random.key(4),
      max_new_tokens=1,
      temperature=1.0,
      top_p=1.0,
      end_ids=(),
      vocab_size=setup.tokenizer.vocab_size,
    )
  return [
    comparisons.Example(
      int(number), 0, prompt, ([int(byte)],), (), scores=(reward(byte),)
    )
    for number, prompt, (byte,) in zip(
      ids, prompts, np.asarray(samples.tokens), strict=True
    )
  ]


def reward(byte):
  return float(int(byte) in VOWELS)


def shape_of(count, completions=1):
  """The one Shape of all batches, from limits alone."""
  return rows.limits_shape(
    LAYOUT,
    rows=count,
    per_row=1,
    completions=completions,
    prompt=len(PROMPTS[0]),
    completion=1,
    pairs=0,
    multiple=1,
  )


def place(setup, examples):
  batch = rows.build(
    examples,
    [[index] for index in range(len(examples))],
    shape_of(len(examples)),
    LAYOUT,
    {"scores": [example.scores for example in examples]},
  )
  tokens = sum(len(e.prompt) + 1 for e in examples)
  stats = loader.Stats(len(examples), 0, tokens, len(examples), 0, 1.0)
  return run_lib.place_batch(batch, setup.mesh, setup.mode), stats


# ── The run ──────────────────────────────────────────────────────────────────


def config_of(*overrides):
  config = load.load_config(
    str(conftest.ROOT / "configs/dpo.py:smoke"),
    (
      *("train.steps=12", "checkpoint.every=1", "log.every=1"),
      *("data.eval=None", "optim.learning_rate=0.01", *overrides),
    ),
  ).unlock()
  config.algo = "toy"
  config.loss = config_dict.ConfigDict({"name": "toy", "value_weight": 0.5})
  return config.lock()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(algos.ALGOS, "toy", make)
  monkeypatch.setitem(feeds.FEEDS, "toy prompts", make_feed)


class Killed(BaseException):
  """Stands for the end of the process."""


def with_own_feed(run, killed_before=None):
  """A Run that has drawn nothing; its feed may end it before a step."""
  made = make_feed(None, run.setup, run.algorithm)

  def batch(number, state):
    if number == killed_before:
      raise Killed
    return made.batch(number, state)

  return run._replace(feed=made._replace(batch=batch))


def checksums(folder, step=12):
  path = folder / "checkpoints" / str(step) / "meta" / "metadata"
  return json.loads(path.read_text())["checksums"]


def metrics(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


WAYS = {  # and one device, in processes of their own
  "2x2x2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
  "pmap": ("mesh.mode=pmap",),
  "accumulation": ("mesh.data=4", "mesh.tensor=2", "train.accumulation=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_ends_between_boundaries_goes_on_to_the_same_bits(
  way, tmp_path
):
  config = config_of(*WAYS[way])
  run = build.prepare(config)  # its programs are compiled once
  whole = loop.fit(config, tmp_path / "whole", with_own_feed(run))
  with pytest.raises(Killed):
    loop.fit(config, tmp_path / "cut", with_own_feed(run, killed_before=6))
  # Every step was due, and the one boundary was saved.
  with checkpoint.Checkpointer(tmp_path / "cut", keep=2) as saved:
    assert saved.steps() == [4]
  resumed = loop.fit(config, tmp_path / "cut", with_own_feed(run))
  assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")
  assert (
    metrics(tmp_path / "cut")[-1]["loss"]
    == (metrics(tmp_path / "whole")[-1]["loss"])
  )
  for result in (whole, resumed):
    value = result.state.params["value"]
    assert float(jnp.max(jnp.abs(value["kernel"]))) > 0


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits_and_has_learned(tmp_path):
  folders = [tmp_path / "whole", tmp_path / "cut", tmp_path / "cut"]
  codes = [
    processes.alone("tests.algos.test_toy_on_policy", *a)
    for a in zip(folders, (-1, 7, -1), strict=True)
  ]
  assert codes == [0, -signal.SIGKILL, 0]
  assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")
  rows_logged = metrics(tmp_path / "cut")
  assert [row["step"] for row in rows_logged] == list(range(1, 13))
  # The coefficient follows the KL: up where it is above 0.1 nats, else down.
  for before, after in itertools.pairwise(rows_logged):
    up = before["objective/kl"] > 0.1
    grew = after["objective/coefficient"] > before["objective/coefficient"]
    assert grew == up


def test_reinforce_raises_the_exact_expectation(tmp_path):
  rarely = ("checkpoint.every=40", "log.every=40")
  config = config_of("train.steps=40", *rarely, *WAYS["2x2x2"])
  run = build.prepare(config)
  result, setup = loop.fit(config, tmp_path, run), run.setup
  before = expected_reward(setup, trained.initial(setup))
  after = expected_reward(setup, result.state.params["model"])
  assert before < 0.1
  assert after > before + 0.2


def expected_reward(setup, params):
  """E[r] over the prompts, by enumeration of all bytes."""
  encoded = setup.tokenizer.encode(list(PROMPTS))
  examples = [
    comparisons.Example(0, 0, ids, tuple([v] for v in VOWELS), ())
    for ids in encoded
  ]
  shape = shape_of(len(examples), len(VOWELS))
  batch = rows.build(examples, [[0], [1], [2], [3]], shape, LAYOUT)
  logps = base.token_logps(setup.model.apply, params, batch)
  scored = base.scored_mask(batch)
  return float(np.exp(logps)[np.asarray(scored)].sum() / len(PROMPTS))


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("train.steps=10", r"10 steps end inside .* set train\.steps = 12$"),
    ("data.eval=toy:8", r"data\.eval = 'toy:8' has no effect with algo"),
  ],
)
def test_what_a_run_on_policy_cannot_have_is_refused(override, said, tmp_path):
  with pytest.raises(ValueError, match=said):
    loop.fit(config_of(override), tmp_path)


def test_points_on_policy_share_no_batches(tmp_path):
  """Those of two policies at once would be drawn from neither."""
  points = [{"loss.value_weight": weight} for weight in (0.5, 0.1)]
  with pytest.raises(ValueError, match=r"together = 2: the batches of algo"):
    sweeps.sweep(config_of("sweep.together=2"), points, tmp_path)
  assert not list(tmp_path.glob("value_weight*"))
  with pytest.raises(ValueError, match="'toy prompts' depend on the policy"):
    next(notebook.batches(config_of()))


def test_a_notebook_steps_an_algorithm_with_heads_on_a_mesh():
  config = config_of("train.steps=4", *WAYS["2x2x2"])
  apply, params = notebook.build(config)
  step, state = notebook.train_step(config, apply, params)
  _, state, _ = notebook.parallelize(config, step, state)
  assert state.params["value"]["kernel"].sharding.is_fully_replicated


def test_a_signal_between_boundaries_is_obeyed_at_the_next(
  monkeypatch, tmp_path
):
  whole = make_feed

  def signalled(config, setup, algorithm):
    made = whole(config, setup, algorithm)

    def batch(number, state):
      if number == 5:
        os.kill(os.getpid(), signal.SIGTERM)
      return made.batch(number, state)

    return made._replace(batch=batch)

  monkeypatch.setitem(feeds.FEEDS, "toy prompts", signalled)
  result = loop.fit(config_of(*WAYS["2x2x2"]), tmp_path)
  assert result.exit_code == 42
  assert int(result.state.step) == 8
  with checkpoint.Checkpointer(tmp_path, keep=2) as saved:
    assert saved.steps()[0] == 8


if __name__ == "__main__":
  KILL_AT = int(sys.argv[2])
  algos.ALGOS["toy"] = make
  feeds.FEEDS["toy prompts"] = make_feed
  jax.config.update("jax_num_cpu_devices", 1)
  loop.fit(config_of(), pathlib.Path(sys.argv[1]))
