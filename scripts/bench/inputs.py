"""The inputs of a case, made once for all systems.

model/          config.json, model.safetensors: random weights, and a
                tokenizer whose words are the decimal ids
examples.jsonl  {"prompt", "chosen", "rejected"}, texts of such words
in_order.jsonl  the same lines, in the order in which `ours` trains on them
adapter/        the one that `ours` starts from, as PEFT reads it
"""

import json
import math
import pathlib

import jax
import numpy as np
import tokenizers
import transformers
from etils import epath
from tokenizers import models, pre_tokenizers

from dpo_jax.data.batch import order
from dpo_jax.models import config as model_config
from dpo_jax.models import decoder, write
from scripts.bench import cases

EOS = 0  # the id; it is written <eos>, the others as numbers
PLANNED = 32  # batches of examples.jsonl, at least
_SEED = 0  # of weights and examples, and of the order: configs/base.py


def tokenizer(folder, vocab_size):
  """Writes a tokenizer that splits at spaces; the words are the ids."""
  words = {"<eos>": EOS} | {str(i): i for i in range(1, vocab_size)}
  found = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<eos>"))
  found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=found,
    eos_token="<eos>",
    model_input_names=["input_ids", "attention_mask"],
  )
  fast.save_pretrained(folder)


def lengths(rng, mean, limit, count):
  """i64[count] log-normal lengths of this mean, in 2..limit."""
  middle = math.log(mean) - cases.SPREAD**2 / 2
  drawn = rng.lognormal(middle, cases.SPREAD, count)
  return np.clip(np.rint(drawn), 2, limit).astype(int)


def examples(mix, vocab_size, count):
  """`count` rows of texts with ids drawn uniformly."""
  rng = np.random.default_rng(_SEED)
  prompts = lengths(rng, mix.prompt, mix.max_prompt, count)
  completions = lengths(rng, mix.completion, mix.max_completion, 2 * count)

  def words(length):
    return " ".join(map(str, rng.integers(1, vocab_size, length)))

  return [
    {
      "prompt": words(prompt),
      "chosen": " " + words(chosen - 1),  # the end is added by all systems
      "rejected": " " + words(rejected - 1),
    }
    for prompt, chosen, rejected in zip(
      prompts, completions[:count], completions[count:], strict=True
    )
  ]


def write_model(folder, preset, vocab_size):
  """Writes random weights of a preset as a Hugging Face checkpoint."""
  config = model_config.PRESETS[preset]
  model = decoder.build(config, vocab_size)
  params = jax.jit(model.init)(jax.random.key(_SEED))
  raw = write.describe(config, vocab_size)
  raw |= {"bos_token_id": EOS, "eos_token_id": EOS}
  write.write(folder, params, config, vocab_size, raw, "float32")
  tokenizer(folder, vocab_size)


def make(folder, case, steps):
  """Writes the inputs of a case.

  Args:
    folder: pathlib.Path that exists; a model that is there is kept.
    case: cases.Case.
    steps: of every system; the data is one epoch.
  Returns: as `write_examples`.
  """
  make_model(folder, case)
  return write_examples(
    *(folder, cases.MIXES[case.mix], cases.VOCABULARY[case.model]),
    *(steps, case.batch),
  )


def make_model(folder, case):
  """Writes the model of a case, unless it is there."""
  model = epath.Path(folder) / case.model
  if not model.exists():
    model.mkdir()
    write_model(model, case.model, cases.VOCABULARY[case.model])


def write_adapter(job):
  """Writes the adapter that a job starts from."""
  from dpo_jax import export
  from dpo_jax.config import load
  from dpo_jax.run import build, trained

  setup = build.prepare_model(load.load_config(job["config"], job["fields"]))
  folder = epath.Path(job["adapter"])
  folder.mkdir(exist_ok=True)
  base, rng = trained.base_shapes(setup), jax.random.key(setup.source.seed)
  export.write_adapter(folder, setup, setup.trained.init(base, rng))


def write_head(job):
  """Writes the value head that a reward model starts from."""
  from dpo_jax.config import load
  from dpo_jax.run import build, trained

  setup = build.prepare_model(load.load_config(job["config"], job["fields"]))
  rng = jax.random.key(setup.source.seed)
  params = jax.jit(setup.trained.init)(trained.initial(setup), rng)
  np.save(job["head"], np.asarray(params["reward"]["kernel"]))


def write_examples(folder, mix, vocab_size, steps, batch):
  """Writes examples.jsonl and in_order.jsonl for so many steps.

  Returns: tokens of each step: prompt, chosen and rejected of its pairs, each
    counted once.
  """
  rows = examples(mix, vocab_size, max(PLANNED, steps) * batch)
  turns = order.stream(0, steps * batch, len(rows), _SEED)
  in_order = [rows[index] for index in turns]
  for name, lines in (("examples", rows), ("in_order", in_order)):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (pathlib.Path(folder) / f"{name}.jsonl").write_text(text)
  counts = [
    sum(len(text.split()) for text in row.values()) + 2 for row in in_order
  ]
  return np.reshape(counts, (steps, batch)).sum(1).tolist()


def job(folder, case, steps, overrides):
  """What the workers of a case are told, as plain values.

  The optimiser is the DPO paper's: RMSprop, learning rate 1e-6, gradients
  clipped to a global norm of 10; no warm-up.
  """
  out = common(folder, case, steps)
  lora = ",lora" * case.lora
  reward = case.task == "reward"
  start = "reward.py:optim=rmsprop," if reward else "dpo.py:"
  return {
    **out,
    "head": str(folder / "head.npy") if reward else None,
    "config": f"configs/{start}model=hf:{out['model']}{lora}",
    "fields": fields(out, folder),
    "overrides": list(overrides),
  }


def common(folder, case, steps):
  """What a job has whatever its task."""
  mix = cases.MIXES[case.mix]
  return {
    "model": str(folder / case.model),
    "in_order": str(folder / "in_order.jsonl"),
    "max_prompt": mix.max_prompt,
    "max_completion": mix.max_completion,
    "max_length": mix.max_length,
    "batch": case.batch,
    "steps": steps,
    "ref": case.ref,
    "lora": {"rank": 16, "alpha": 32.0} if case.lora else None,
    "adapter": str(folder / "adapter") if case.adapter else None,
    "beta": 0.1,
    "learning_rate": 1e-6,
    "decay": 0.99,
    "eps": 1e-8,
    "clip_norm": 10.0,
    "points": 1,
    "modules": dict(cases.TASKS[case.task].modules),
  }


def fields(job, folder):
  """Fields of dpo_jax's config that a job fixes, as "name=value"."""
  values = {
    "data.train": folder / "examples.jsonl",
    "data.batch_size": job["batch"],
    "data.max_prompt_length": job["max_prompt"],
    "data.max_completion_length": job["max_completion"],
    "train.steps": max(PLANNED, job["steps"]),
    **optimizer(job),
  }
  if job["ref"] != "none":
    values["loss.beta"] = job["beta"]
  if job["lora"]:
    values |= {f"lora.{name}": value for name, value in job["lora"].items()}
  if job["ref"] == "cached":
    values["ref"] = "cached"
  return [f"{name}={value}" for name, value in values.items()]


def optimizer(job):
  """Fields of the optimiser."""
  return {
    "optim.learning_rate": job["learning_rate"],
    "optim.decay": job["decay"],
    "optim.eps": job["eps"],
    "optim.clip_norm": job["clip_norm"],
    "optim.warmup": 0,
  }
