"""A study: every method, labelling and seed, tuned, trained, measured, kept.

    WORKDIR/study.json            what was asked, and the exact facts
    WORKDIR/LABELS/METHOD.json    a method's curves, written when it is done

What is there is not done again, so the same command goes on where it stopped.
"""

import functools
import json
import threading
import time
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dpo_jax import progress, store
from dpo_jax.config import fields, load, saved
from dpo_jax.enumerable import build, programs, worlds
from dpo_jax.enumerable import language as language_lib
from dpo_jax.eval import evaluation, statistics
from dpo_jax.train import health

STAGES = ("reference", "reward")  # before the methods


class Point(NamedTuple):
  """A setting of a method: {"loss.beta": 0.1}, and its traced numbers."""

  setting: dict
  hparams: dict


class Job(NamedTuple):
  """A method under one labelling.

  Attributes:
    name, labels: of the method; "true" of one that reads no comparison.
    programs: programs.Programs.
    points: list of Point.
    rates: learning rates that are tried of it.
    made_of: plain values that decide its curves.
  """

  name: str
  labels: str
  programs: programs.Programs
  points: list
  rates: tuple
  made_of: dict


def run(points, at, workdir):
  """Does what of a study is not done yet.

  Args:
    points: of a sweep, {"arg": "method=dpo", "loss.beta": 0.1}.
    at: point -> its config.
    workdir: folder of the study.
  Raises: ValueError for what no study can have, and if the folder holds one of
    another config; before anything is trained.
  """
  workdir = epath.Path(workdir)
  stages = {name: at({"arg": f"method={name}"}) for name in STAGES}
  configs = [(point, at(point)) for point in points]
  check([*stages.values(), *(config for _, config in configs)])
  first = stages["reference"]
  language, options = build.language_of(first), build.options_of(first)
  compiled = {}
  before = {
    name: worlds.Stage(
      build.programs_of(config, language, compiled), build.hparams_of(config)
    )
    for name, config in stages.items()
  }
  stages = [_decides(config) for config in stages.values()]
  jobs = _jobs(configs, language, options, stages, compiled)
  with health.lock(workdir):
    left = [job for job in jobs if not _done(job, workdir)]
    about = build.asked(first)
    if left or not (workdir / "study.json").exists():
      _study(language, before, options, left, jobs, about, workdir)
  return 0


def check(configs):
  """Refuses configs that no study can have, see build.check."""
  plain = {}
  for name in ("ppo", "base"):  # the second has no rollout
    plain |= saved.flatten(load.load_config(name).to_dict())
  for config in configs:
    build.check(config, plain)


def _jobs(configs, language, options, stages, compiled):
  """The Jobs of a study, in the order of its points."""
  methods = {}
  for point, config in configs:
    _, name = point["arg"].split("=")
    methods.setdefault(name, []).append((point, config))
  jobs = []
  for name, given in methods.items():
    config = given[0][1]
    own = build.programs_of(config, language, compiled)
    points = [
      Point({k: v for k, v in point.items() if k != "arg"}, build.hparams_of(c))
      for point, c in given
    ]
    made_of = [*stages, *(_decides(c) for _, c in given)]
    made_of = json.loads(json.dumps(made_of))
    truth = build.samples_for_truth(config)
    labels = (worlds.TRUE,) if truth else options.labels
    rates = build.options_of(config).rates
    jobs += [Job(name, each, own, points, rates, made_of) for each in labels]
  return jobs


def _decides(config):
  """What of a config decides results: not how they are computed or kept."""
  flat, free = saved.flatten(config.to_dict()), (fields.HOW, fields.KEEP)
  return {k: v for k, v in flat.items() if fields.of(k).decides not in free}


def path_of(job, workdir):
  """The file of a Job's curves."""
  return workdir / job.labels / f"{job.name}.json"


def _done(job, workdir):
  """Whether a Job's file is there.

  Raises: ValueError if it is of another config.
  """
  path = path_of(job, workdir)
  if not path.exists():
    return False
  if store.read_json(path)["made_of"] != job.made_of:
    raise ValueError(
      f"{path} is of another config; use a new --workdir, or remove it to have "
      "that method anew"
    )
  print(f"{path}: done before, skipped")
  return True


def _study(language, stages, options, left, jobs, about, workdir):
  """Makes the worlds, writes study.json, and does the Jobs that are left."""
  seeds = [*options.tuning_seeds, *options.seeds]
  print(
    f"{len(options.seeds)} seeds and {len(options.tuning_seeds)} to tune on: "
    "references, comparisons and reward models",
    flush=True,
  )
  made = worlds.make(language, stages, options, seeds)
  made = {world.seed: world for world in made}
  facts = [_facts(language, options, made[seed]) for seed in options.seeds]
  about |= {
    "worlds": facts,
    "jobs": [{"method": j.name, "labels": j.labels} for j in jobs],
    "made_with": evaluation.made_with(),
  }
  _write(workdir / "study.json", about)
  cost = functools.partial(_cost, options)
  work = _work(left, made, options, workdir)
  total = sum(map(cost, left))
  for _ in progress.over(work, total, "trained", unit="tokens", size=int):
    pass


def _facts(language, options, world):
  """What of a World a report reads."""
  frontier = language_lib.frontier(world.log_ref, language.reward)
  measure = functools.partial(
    language_lib.measure,
    log_ref=np.float64(world.log_ref),
    reward=language.reward,
  )
  ranked = {
    labels: [
      _plain(measure(language_lib.best_of(world.log_ref, ranking, n)))
      for n in options.best_of
    ]
    for labels, ranking in world.scores.items()
  }
  return {
    "seed": world.seed,
    "reference": _plain(measure(np.float64(world.log_ref))),
    "frontier": {
      "kl": frontier.kl.tolist(),
      "reward": frontier.reward.tolist(),
      "temperature": language_lib.TEMPERATURES[::-1].tolist(),
    },
    "best_of": ranked,
    "reward_model_accuracy": world.accuracy,
  }


def _plain(values):
  return {name: float(value) for name, value in values.items()}


def _write(path, content):
  store.write(path, (json.dumps(content, indent=1) + "\n").encode())


def _lanes(job, options):
  """(lanes that tune, lanes of the study) of a Job: (seed, rate, point)."""
  tuning = [
    (seed, rate, point)
    for rate in job.rates
    for seed in options.tuning_seeds
    for point in job.points
  ]
  if len(job.rates) == 1:
    tuning = []
  return tuning, len(options.seeds) * len(job.points)


def _cost(options, job):
  """Tokens that a Job computes."""
  tuning, count = _lanes(job, options)
  runs = sum(-(-n // options.lanes) for n in (len(tuning), count))
  return runs * options.lanes * _tokens(job.programs.method)


def _tokens(method):
  """That a run computes."""
  return method.steps // method.span * method.tokens


def _work(jobs, made, options, workdir):
  """Does Jobs; yields the tokens that were computed, now and then."""
  for job in jobs:
    began = time.perf_counter()
    trainer = _trainer(job, options, made)
    tuning, _ = _lanes(job, options)
    curves = yield from trainer(tuning)
    rate, tried = _best_rate(curves, tuning, job, options, made)
    chosen = [(s, rate, p) for s in options.seeds for p in job.points]
    curves = yield from trainer(chosen)
    _write(
      path_of(job, workdir),
      {
        "method": job.name,
        "labels": job.labels,
        "rate": rate,
        "tried": tried,
        "tokens": _tokens(job.programs.method),
        "seconds": time.perf_counter() - began,
        "runs": [
          {"seed": seed, "setting": point.setting, **curve}
          for (seed, _, point), curve in zip(chosen, curves, strict=True)
        ],
        "made_of": job.made_of,
      },
    )


def _trainer(job, options, made):
  """f(lanes): a generator of tokens that returns the curve of each lane."""
  run, method = job.programs, job.programs.method
  stops = checkpoints(method, options.checkpoints)
  stopped = threading.Event()

  def curves_of(block, count):
    """The curves of the lanes of a program; None once it is `stopped`."""
    own = [made[seed] for seed, _, _ in block]
    seeds = np.asarray([world.seed for world in own])
    states = run.begin(worlds.stacked([world.params for world in own]), seeds)
    data = worlds.stacked(
      [worlds.data_of(method, world, job.labels) for world in own]
    )
    hparams = worlds.hparams_of(
      [point.hparams | {"learning_rate": rate} for _, rate, point in block]
    )
    log_ref = np.stack([world.log_ref for world in own])
    start, measures = 0, []
    for stop in stops:
      if stopped.is_set():
        return None
      states = run.advance(states, data, hparams, start, stop)
      measures.append(jax.device_get(run.measure(states, log_ref)))
      start = stop
    return [
      {"steps": stops}
      | {k: [float(m[k][number]) for m in measures] for k in measures[0]}
      for number in range(count)
    ]

  def train(lanes):
    out = []
    with futures.ThreadPoolExecutor(options.workers) as pool:
      blocks = zip(*worlds.blocks(lanes, options.lanes), strict=True)
      try:
        for curves in pool.map(curves_of, *blocks):
          out += curves
          yield options.lanes * _tokens(method)
      finally:
        stopped.set()  # by a signal, say, while others are under way
    stopped.clear()
    return out

  return train


def checkpoints(method, count):
  """Steps at which a run is measured: early ones are close together."""
  spans = method.steps // method.span
  steps = np.geomspace(1, spans, count).round().astype(int)
  return (np.unique(steps) * method.span).tolist()


def _best_rate(curves, tuning, job, options, made):
  """(the rate of the smallest mean gap to the frontier, {rate: gap})."""
  if not tuning:
    return job.rates[0], {}
  tried = {}
  for rate in job.rates:
    gaps = []
    for seed in options.tuning_seeds:
      own = [
        curve
        for (s, r, _), curve in zip(tuning, curves, strict=True)
        if (s, r) == (seed, rate)
      ]
      world = made[seed]
      exact = language_lib.frontier(
        world.log_ref, job.programs.method.language.reward
      )
      points = statistics.points(own, exact.reward[0])
      reached = statistics.envelope(*points, options.claims.grid)
      gaps.append(np.mean(exact.at(options.claims.grid) - reached))
    tried[str(rate)] = float(np.mean(gaps))
  best = min(job.rates, key=lambda rate: tried[str(rate)])
  return best, tried
