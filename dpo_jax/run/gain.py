"""Gain and bias of a reward model, so that the reference's rewards have mean 0.

    r'(x, y) = gain · r(x, y) + bias,   E_x E_{y ~ π_ref(y | x)} r' = 0

Comparisons say nothing of a shift, so without it a constant beside the reward
(a penalty for a missing end) would have no fixed meaning. The mean is of the
prompts' means, so that each counts once however many completions it has. One
shift serves all prompts: that of each would need completions of it wherever it
is scored, as rollout.centre = "prompt" has them; `spread` says what it leaves,
the standard deviation of the prompts' true means. What compares completions of
one prompt does not see either.
Source: arXiv:2305.18290 section 3, where it is 0 for every prompt.
"""

import collections
import functools
import json
import math

import jax
import numpy as np
from etils import epath

from dpo_jax import store
from dpo_jax.algos import base
from dpo_jax.parallel import mesh as mesh_lib
from dpo_jax.run import feed, forward
from dpo_jax.train import state as state_lib

FILE = "reward.json"  # in the run folder


def prepared(setup, options, loader):
  """What a run does behind its last step, see base.Run; None for nothing.

  Data of its own are read here, so that what is wrong with them is found before
  anything is trained.

  Args:
    setup: base.Setup.
    options: the fields of config.reward.
    loader: of data.train.
  """
  if not options.centred:
    return None
  if options.completions is not None:
    algorithm = base.Algorithm("completions", None, None)
    loader, _ = feed.load(
      *(setup, algorithm, options.completions, "reward.completions"),
      mesh_lib.row_parallelism(setup.mesh),
      steps=lambda size: -(-size // setup.data.batch_size),
    )
  args = setup, loader, options.count, options.unit
  return functools.partial(finish, *args)


def finish(setup, loader, count, unit, params, frozen, step, workdir):
  """Measures gain and bias and writes reward.json; all processes together.

  Args:
    setup: base.Setup.
    loader: of the reference's completions, see `measure`.
    count, unit: of config.reward.
    params: what was trained, placed.
    frozen: of the TrainState.
    step: updates behind params.
    workdir: run folder.
  """
  path = epath.Path(workdir) / FILE
  about = {
    "step": step,
    "asked": setup.asked["reward"],
    "data": loader.fingerprint,
    "head": state_lib.fingerprint(params.get("reward", {})),
  }
  if path.exists():
    there = store.read_json(path)
    if {name: there.get(name) for name in about} == json.loads(
      json.dumps(about)
    ):
      return
  found = measure(setup, params, frozen, loader, count, unit)
  if jax.process_index() == 0:
    text = json.dumps({**about, **found}, indent=2) + "\n"
    store.write(path, text.encode())
    error = "" if found["se"] is None else f" ± {found['se']:.2g}"
    print(
      f"rewards of the reference: mean {found['mean']:.4g}{error}, standard "
      f"deviation {found['std']:.4g}, of {found['prompts']} prompts, the mean "
      f"of one up to {found['furthest']:.4g} away; gain "
      f"{found['gain']:.4g} and bias {found['bias']:.4g} in {path}",
      flush=True,
    )


def measure(setup, params, frozen, loader, count, unit):
  """Scores completions of the reference, and what follows: see `of_scores`.

  Args:
    params, frozen: of the TrainState, placed.
    loader: data.batch.loader.Loader; its first batches are scored.
    count: examples of them, rounded up to whole batches; None is an epoch.
    unit: of `of_scores`.
  """
  steps = loader.steps
  if count is not None:
    size = len(loader.indices(0))
    steps = min(steps, -(-count // size))
  policy = setup.trained.policy(frozen.get("base"), params)
  groups, seen = collections.defaultdict(list), set()
  for number in range(steps):
    for index, scores in forward.rewards(setup, policy, loader, [number]):
      if index not in seen:  # a mixture may have an example twice an epoch
        seen.add(index)
        (prompt,) = loader.prompts([index])
        groups[prompt] += scores.tolist()
  return of_scores(list(groups.values()), unit)


def of_scores(groups, unit):
  """Gain, bias and what they were found from, as plain numbers.

  Args:
    groups: lists of the rewards of each prompt's completions.
    unit: whether the standard deviation becomes 1 too.
  Returns: {"gain", "bias"} and of the rewards before: "mean" of the prompts'
    means, its standard error "se", "std" over all completions, "prompts_std" of
    the prompts' means and "furthest" of them from "mean", "spread" of them
    beyond that of their draws (null where no prompt has two), "prompts",
    "completions".
  Raises: ValueError for rewards that are not finite, or all the same where
    `unit` divides by what tells them apart.
  """
  means = np.asarray([np.mean(group) for group in groups])
  sizes = np.asarray([len(group) for group in groups])
  weights = np.repeat(1 / (len(groups) * sizes), sizes)
  values = np.concatenate([np.asarray(group, np.float64) for group in groups])
  if not np.isfinite(values).all():
    raise ValueError("the reward model's rewards are not finite: train it anew")
  mean = float(means.mean())
  std = math.sqrt(float(weights @ np.square(values - mean)))
  if unit and std < 1e-6 * max(1.0, abs(mean)):
    raise ValueError(
      "reward.unit = True: all completions of the reference get the same "
      f"reward {mean:.4g}, so there is nothing to divide by"
    )
  several = [np.asarray(g, np.float64) for g in groups if len(g) > 1]
  between = means.var(ddof=1) if len(means) > 1 else math.nan
  spread = None
  if several and len(means) > 1:
    within = np.mean([g.var(ddof=1) / len(g) for g in several])
    spread = math.sqrt(max(0.0, float(between - within)))
  gain = 1 / std if unit else 1.0
  return {
    "gain": gain,
    "bias": -gain * mean,
    "mean": mean,
    "se": math.sqrt(between / len(means)) if len(means) > 1 else None,
    "std": std,
    "prompts_std": math.sqrt(between) if len(means) > 1 else None,
    "furthest": float(np.abs(means - mean).max()),
    "spread": spread,
    "prompts": len(groups),
    "completions": len(values),
  }


def read(workdir, asked, step):
  """(gain, bias) of a run folder.

  Args:
    workdir: run folder.
    asked: the run's config, as plain values.
    step: of the checkpoint that they are for.
  Raises: ValueError if they should be there and are not.
  """
  if not asked["reward"]["centred"]:
    return 1.0, 0.0
  path = epath.Path(workdir) / FILE
  there = store.read_json(path) if path.exists() else {}
  if there.get("step") != step:
    raise ValueError(
      f"{path}: gain and bias of step {step} are not there: the run was not "
      "trained to its end; the command that started it goes on"
    )
  return float(there["gain"]), float(there["bias"])


def folded(head, gain, bias):
  """The head whose reward is gain · r + bias of this one's r."""
  return {
    "kernel": gain * head["kernel"],
    "bias": gain * head["bias"] + bias,
  }
