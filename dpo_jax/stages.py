"""Several verbs in a row, as a config of algo = "stages" lists them.

Imports of what needs jax are inside, as those of verbs.
"""

import json

from etils import epath

from dpo_jax import preflight, store
from dpo_jax.config import load, points


def run(config, workdir, source, verb_of):
  """Runs verbs on other configs of the same file; the first failure ends it.

  Args:
    config: of the whole; `source` is its load.Source.
    verb_of: (verb, options, overrides) -> exit code, as verbs.run.
  """
  if workdir != config.workdir:
    raise ValueError(
      f"--workdir {workdir}: the stages have folders of their own; name the "
      f"root by the config's argument, root={workdir}"
    )
  rest = "".join(f",{name}={value}" for name, value in config.arguments)
  steps = []
  for verb, name, *axes in config.stages:
    spec = f"{source.module.__file__}:stage={name}{rest}"
    steps.append((verb, name, load.load(spec, (), axes)))
  configs = [step.config for _, _, step in steps]
  for one in configs:  # what is wrong with the last is said before the first
    preflight.config(one, ())
  far = preflight.far(configs)
  if "plan" in config:  # which takes no network
    print(_plan(steps, config.plan), flush=True)
  preflight.kept(*far)
  if "compared" in config:  # what a report looks for, also of a part
    text = json.dumps(config.compared.to_dict(), indent=2) + "\n"
    store.write(epath.Path(workdir) / "compared.json", text.encode())
  for verb, name, step in steps:
    print(f"━━ {verb} {name}", flush=True)
    sweep = {"sweep": list(step.axes)} if step.axes else {}
    code = verb_of(verb, {"config": f"{step.path}:{step.arg}", **sweep}, [])
    if code:
      return code
  return (
    0
    if "compared" not in config
    else verb_of("report", {"workdir": workdir}, [])
  )


def _plan(steps, options):
  """The table of what stages will take: (verb, name, load.Source) of each."""
  from dpo_jax import plan
  from dpo_jax.plan import table

  stages = [
    plan.Stage(
      *(verb, name, step.config),
      points=len(points.of(step)) if verb == "sweep" else 1,
    )
    for verb, name, step in steps
  ]
  return table.text(plan.rows(stages, options), options)


def tokenizer(config, workdir):
  """Trains a tokenizer on the texts of a source, unless it is there."""
  from dpo_jax.data.read import sources
  from dpo_jax.data.tokens import bpe

  about = epath.Path(workdir) / "tokenizer.about.json"
  if about.exists():
    if json.loads(about.read_text()) != json.loads(config.to_json()):
      raise ValueError(f"{workdir} holds a tokenizer of another config")
    print(f"{workdir}: trained before, skipped")
    return 0
  records = sources.load(config.data.train, "sft", sources.Policy("error"))
  sources.refuse_messages(records, "the tokenizer's data.train")
  texts = [r.prompt + c for r in records for c in r.completions]
  size = bpe.train(texts, config.vocab_size, workdir)
  about.write_text(config.to_json())
  print(f"{size} tokens from {len(texts)} texts in {workdir}")
  return 0
