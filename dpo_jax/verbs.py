"""What `dpo-jax VERB` does, each a function of config and run folder.

Imports are inside: `dpo-jax help` and mistakes in a command need no jax.
"""

import inspect
import time
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from dpo_jax import host, lookup, preflight, stages
from dpo_jax.config import help, load, points, saved
from dpo_jax.eval.judge import options as judge_options
from dpo_jax.run import checks
from dpo_jax.train import optimizers


class Verb(NamedTuple):
  """A verb of the command line.

  Attributes:
    run: (config, workdir, load.Source of the config or None) -> exit code.
    saved: without --config it takes that of the run folder.
    folder: it needs a run folder.
    config: it needs a config.
    reads: fields that name the sources it reads; None: its config is not
      checked.
    default: the config that it takes without --config, by its name.
    several: it runs as several processes too.
  """

  run: Callable
  saved: bool
  folder: bool = True
  config: bool = True
  reads: tuple[str, ...] | None = None
  default: str | None = None
  several: bool = False


def train(config, workdir, source):
  """Trains a policy (loop.fit), or what algo = "tokenizer" or "stages" says."""
  if config.get("algo") == "stages":
    return stages.run(config, workdir, source, run)
  if config.get("algo") == "tokenizer":
    return stages.tokenizer(config, workdir)
  from dpo_jax import loop

  return loop.fit(config, workdir).exit_code


def evaluate(config, workdir, _source):
  """Evaluates the policy of a run folder; writes evaluation.json there."""
  from dpo_jax.eval import best_of, evaluation
  from dpo_jax.run import build, trained
  from dpo_jax.train import checkpoint

  measured = build.prepare_measured(config)
  base = trained.initial(measured.setup)
  params = trained.restored(measured.setup, base, workdir)
  meta = checkpoint.check_run(workdir, config.to_dict(), base)
  made = evaluation.made_of(
    *(meta["step"], meta["data_fingerprint"], base, meta["identity"])
  )
  if config.ref == "ema":
    print("against the reference that the run began with")
  result = evaluation.evaluate(measured, params, base, workdir, made)
  for name, value in result.get("comparisons", {}).items():
    print(f"{name:24} {value:.4g}")
  for name, value in result.get("means", {}).items():
    print(f"{name:24} {value['mean']:.4g} ± {value['se']:.2g}")
  if "best_of" in result:
    print(best_of.table(result["best_of"]))
  return 0


def sample(config, workdir, _source):
  """Draws completions of a run's policy, or of init_from's, into its folder."""
  import jax

  from dpo_jax.eval import completions
  from dpo_jax.run import build, trained
  from dpo_jax.train import checkpoint
  from dpo_jax.train import state as state_lib

  setup = build.prepare_model(config)
  if checkpoint.steps(workdir):
    base = trained.initial(setup)
    params = trained.restored(setup, base, workdir)
    policy = setup.trained.model(base, params)
    step = checkpoint.latest_step(workdir)
    print(f"the policy of {workdir}, step {step}")
  elif config.init_from is not None:
    policy = trained.initial(setup)
    print(f"the policy of init_from = {config.init_from}")
  else:
    raise ValueError(
      f"{workdir} holds no trained policy, and init_from names none"
    )
  identity = {
    "sample": saved.drawn_by(config.sample.to_dict()),
    "policy": state_lib.fingerprint(policy),
    "model": config.model.to_dict(),
    "precision": config.precision,
    "tokenizer": config.tokenizer,
  }
  rows = completions.write(setup, policy, identity, workdir)
  if jax.process_index() > 0:
    return 0
  for row in rows[:3]:
    shown = f"{row['prompt']} ⟶{row['completion']}"
    # A policy may write what moves a terminal's cursor, or worse.
    print("".join(c if c.isprintable() or c == "\n" else "�" for c in shown))
  path = epath.Path(workdir) / "completions.jsonl"
  print(f"{len(rows):,} completion{'s' * (len(rows) != 1)} in {path}")
  return 0


def sweep(config, workdir, source):
  """Trains and evaluates the points of --sweep, or of the file's `sweep()`."""
  chosen = points.of(source)
  if "study" in config:
    from dpo_jax.enumerable import study

    code = study.run(chosen, source.at, workdir)
    write_report(config, workdir, source)
    return code
  configs = [source.at(point) for point in chosen]
  for config_of_point in configs:
    preflight.config(config_of_point, (*_DATA, *_PROMPTS))
    preflight.start(config_of_point)
  preflight.reach(configs)
  from dpo_jax import sweeps

  code = sweeps.sweep(config, chosen, workdir, at=source.at)
  if code <= 1:  # 1 is of points that failed, which the table shows as they are
    write_report(config, workdir, source)
  return code


def write_report(_config, workdir, _source):
  """Writes report.html, report.md and the figures of a sweep's folder."""
  from dpo_jax import report

  page = report.write(workdir)
  print(report.text(workdir))
  print(f"report: {page}")
  return 0


def audit(config, _workdir, _source):
  """Prints what data.train and data.eval hold; 1 if a limit is exceeded."""
  from dpo_jax import algos
  from dpo_jax.data.audit import audit, text
  from dpo_jax.run import build

  if "audit" not in config:
    raise ValueError("audit needs a config that starts from configs/base.py")
  build.check(config)
  algorithm = algos.make(config, apply=None)
  scored = "scores" in algorithm.needs
  reports = audit.audit(
    *(config.tokenizer, config.data, config.audit, algorithm.data, scored)
  )
  for report in reports:
    print(text.text(report))
  print(text.verdict(reports))
  return int(any(check["failed"] for r in reports for check in r["checks"]))


def export(config, workdir, _source):
  """Writes the policy of a run folder as transformers or PEFT load it."""
  from dpo_jax import export as export_lib

  folder = export_lib.publish(config, workdir)
  print(f"{config.export.form} policy in {folder}")
  if config.export.push is not None:
    print(f"pushed to https://huggingface.co/{config.export.push}")
  return 0


def judge(config, workdir, _source):
  """Win rates of sample files, by a model, people or a scorer."""
  from dpo_jax.eval.judge import judging

  judging.judge(load.plain(config.judge), config.to_dict(), workdir)
  return 0


def losses(_config, _workdir, _source):
  """Prints the table of losses."""
  from dpo_jax.ops.losses import catalogue

  print(catalogue.text())
  return 0


_DATA = ("data.train", "data.eval")
_PROMPTS = ("sample.prompts", "sample.shots_from")
VERBS = {
  "train": Verb(train, saved=False, reads=_DATA, several=True),
  "eval": Verb(evaluate, saved=True, reads=("data.eval", *_PROMPTS)),
  "sample": Verb(sample, saved=True, reads=_PROMPTS, several=True),
  "sweep": Verb(sweep, saved=False, reads=()),  # its points say of what
  "report": Verb(write_report, saved=True, config=False),
  "audit": Verb(audit, saved=True, folder=False, reads=_DATA),
  "export": Verb(export, saved=True),
  "judge": Verb(judge, saved=False, reads=(), default="judge"),
  "losses": Verb(losses, saved=False, folder=False, config=False),
}


def fields(name, options, overrides):
  """What a verb reads of a config: [] or [a page of all fields].

  Args: as of `run`; without a config they are those of configs/base.py.
  """
  if not VERBS[name].config:
    return []
  own = VERBS[name].default or "base"
  config = load.load_config(options.get("config", own), overrides)
  notes = help.comments(load.shipped()[own].read_text(encoding="utf-8"))
  notes |= help.entries(inspect.getsource(optimizers), "optim")
  return [help.page(config, notes)]


def _judged(config, name):
  """Refuses the config of a judge for another verb, and another for it.

  And what no judge can do.
  """
  if ("judge" in config) != (name == "judge"):
    raise ValueError(
      "judge takes configs/judge.py, or a config like it: --config judge"
      if name == "judge"
      else f"--config is one of `dpo-jax judge`, not of {name}"
    )
  if name == "judge":
    checks.numbers(config)
    judge_options.check(config.judge)


def _several(name, options, config):
  """The host.Processes of a verb, or None; refuses them where one must do."""
  several = host.processes(options)
  if several is None:
    return None
  algo = None if config is None else config.get("algo")
  if algo in ("stages", "tokenizer"):
    raise ValueError(
      f'algo = "{algo}" runs as one process, and this is one of several; run '
      "it alone, or each of its trainings by itself"
    )
  if not VERBS[name].several:
    able = ", ".join(v for v, about in VERBS.items() if about.several)
    raise ValueError(
      f"{name} runs as one process, and this is one of several (its flags, "
      f"DPO_JAX_PROCESSES, srun or TPU_WORKER_HOSTNAMES say so); {able} run "
      "as several: start this on one machine alone, or with --coordinator "
      "localhost:1 --processes 1 --process 0"
    )
  return several


def run(name, options, overrides):
  """Runs a verb.

  Args:
    name: of the verb.
    options: {"config", "workdir"}, {"sweep": axes} and those of
      host.processes, as far as given.
    overrides: "loss.beta=0.2" and the like.
  Returns: exit code.
  """
  verb = lookup.lookup(VERBS, name, "verb")
  workdir, spec = options.get("workdir"), options.get("config", verb.default)
  if "sweep" in options and name != "sweep":
    raise ValueError(f"--sweep is of `dpo-jax sweep`, not of {name}")
  if spec is None and verb.saved and workdir is not None:
    spec = str(epath.Path(workdir) / "config.json")
  if not verb.config and "config" not in options:
    config = source = None
  elif spec is None:
    raise ValueError(f"{name} needs --config, for example --config dpo")
  else:
    source = load.load(spec, overrides, options.get("sweep", ()))
    config = source.config
    workdir = config.get("workdir") if workdir is None else workdir
  if workdir is None and verb.folder:
    raise ValueError(f"{name} needs --workdir, the folder of a run or sweep")
  several = _several(name, options, config)
  if verb.folder:
    preflight.folder(workdir)
  if verb.reads is not None:
    _judged(config, name)
    preflight.config(config, verb.reads)
  if name == "train":
    preflight.start(config)
  if config is not None:
    preflight.reach([config])
  host.keep_pages()
  host.see_what_others_write()
  host.claim_devices()
  host.leave_triton_out()
  host.keep()
  if several is not None:
    host.join(several)
  begin = time.perf_counter()
  code = verb.run(config, workdir, source)
  minutes, seconds = divmod(round(time.perf_counter() - begin), 60)
  what = name if workdir is None else f"{name} {workdir}"
  print(f"{what}: {minutes}:{seconds:02}", flush=True)
  return code
