"""Configs that together use every field, and the files that they name."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from configs import common, dpo, judge, online, ppo, quickstart, reward, sft
from dpo_jax.data.batch import order
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import bpe
from dpo_jax.eval.judge import form, matched
from dpo_jax.ops import losses, rl
from dpo_jax.run import build as build_lib
from dpo_jax.run import trained
from dpo_jax.train import checkpoint
from dpo_jax.train import state as state_lib
from tests.models import parity

PYTHIA = "EleutherAI/pythia-70m"


class Base(NamedTuple):
  """A config whose fields are proven.

  Attributes:
    make: world -> ConfigDict.
    only: beginning of the fields that are proven in it.
    leave: beginnings of fields that other bases prove.
    whole: what is compiled is compared as the whole train step.
  """

  make: Callable
  only: str = ""
  leave: tuple[str, ...] = ()
  whole: bool = False


class World(NamedTuple):
  """Paths that configs name.

  Attributes:
    data: comparisons in a file; one is long, and one record is bad.
    labelled, labelled_too: labelled texts in files.
    model: folder of published weights in small.
    adapter: folder of a PEFT adapter of it.
    run: folder of a run of the micro model.
    tokenizer: folder of one.
    reward: folder of a reward model of the micro model.
    samples, samples_too: sample files of the first toy prompts.
    judged: a judgements.jsonl of the second of them.
    form: of the second of them, filled in; form_key: another key of it.
  """

  data: str
  labelled: str
  labelled_too: str
  model: str
  adapter: str
  run: str
  tokenizer: str
  reward: str
  samples: str
  samples_too: str
  judged: str
  form: str
  form_key: str


def build(folder):
  """Writes a World into an empty folder."""
  world = named(folder)
  toy = list(sources.SOURCES["toy"]("100"))
  rows = [*toy, {**toy[0], "chosen": ""}]
  (first,) = order.stream(0, 1, len(toy), seed=0)
  rows[first]["chosen"] *= 3  # so the first batch is longer than others
  _write_lines(world.data, rows)
  for path, row in ((world.labelled, toy[5]), (world.labelled_too, toy[6])):
    sides = ("chosen", "rejected")
    lines = [{"text": row[s], "label": s == "chosen"} for s in sides]
    _write_lines(path, 2 * lines)
  _write_samples(world, toy)
  bpe.train([row["prompt"] for row in toy], 270, world.tokenizer)
  _write_published(pathlib.Path(world.model), pathlib.Path(world.adapter))
  _write_run(pathlib.Path(world.run), _dpo(world).lock())
  whole = _with(_reward(world), reward__centred=False)
  _write_run(pathlib.Path(world.reward), whole.lock())
  return world


def named(folder):
  """The World of a folder, which need not be there."""
  lines = ("data", "labelled", "labelled_too")
  lines += ("samples", "samples_too", "judged", "form")
  return World(
    *(f"{folder}/{n}{'.jsonl' * (n in lines)}" for n in World._fields)
  )


def _write_lines(path, rows):
  text = "".join(json.dumps(row) + "\n" for row in rows)
  pathlib.Path(path).write_text(text)


def _write_samples(world, toy):
  """Two policies for toy prompts, what a judge said, a form for people."""
  rows = [
    {"prompt": r["prompt"], "completion": r["rejected"]} for r in toy[:20]
  ]
  _write_lines(world.samples, [{**r, "completion": " odd"} for r in rows])
  _write_lines(world.samples_too, rows)
  judged = [
    {**row, "ours": row["completion"], "theirs": theirs["chosen"], "verdict": 1}
    for row, theirs in zip(rows, toy, strict=False)
  ]
  _write_lines(world.judged, judged)
  pairs = [
    matched.Pair("", *(row[name] for name in ("prompt", "ours", "theirs")))
    for row in judged
  ]
  path, options = pathlib.Path(world.form), judge.get_config().judge
  for seed in (1, 0):
    options.seed = seed
    form.judge(str(path), pairs, options)
    if seed:  # of its form the other key remains
      path.unlink()
      path.with_suffix(".key.json").rename(world.form_key)
  rows = [json.loads(row) for row in path.read_text().splitlines()]
  _write_lines(path, [{**row, "preferred": "A"} for row in rows])


def _write_published(model, adapter):
  """A small GPT-NeoX, and an adapter of rank 1 of one product a layer."""
  model.mkdir()
  adapter.mkdir()
  raw = parity.small(PYTHIA, vocab_size=300)
  parity.write(raw, model)
  about = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
  (adapter / "adapter_config.json").write_text(json.dumps(about))
  size, tensors = raw["hidden_size"], {}
  for layer in range(raw["num_hidden_layers"]):
    module = f"base_model.model.gpt_neox.layers.{layer}.attention.dense"
    tensors[f"{module}.lora_A.weight"] = np.ones((1, size), np.float32)
    tensors[f"{module}.lora_B.weight"] = np.ones((size, 1), np.float32)
  safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")


def _write_run(folder, config):
  """A run folder whose parameters are all 1."""
  shapes = trained.trained_shapes(build_lib.prepare_model(config))
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  zero = jnp.zeros((), jnp.int32)
  state = state_lib.TrainState(zero, params, {}, {}, {}, zero)
  with checkpoint.Checkpointer(folder, keep=2) as checkpoints:
    checkpoints.save(state, config.to_dict(), wait=True)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))


def get(config, field):
  return functools.reduce(lambda node, key: node[key], field.split("."), config)


def put(config, field, value):
  parents, _, name = field.rpartition(".")
  node = get(config, parents) if parents else config
  with node.ignore_type():
    node[name] = value


def _small(c, w):
  """Few steps on data in which prompts are cut and a record is bad."""
  c.data.train, c.data.eval = w.data, "toy:8"
  c.data.bad_records = "skip"
  c.data.max_prompt_length = 14  # of 12 to 17 bytes
  c.data.max_completion_length = 48
  c.data.long_prompt = "keep_end"
  c.data.batch_size = 16  # two a device
  c.data.shape_multiple = 8
  c.train.steps = 3
  c.log.every = c.eval.every = c.checkpoint.every = 2
  return c


def _sampling(c, w):
  """Samples of the policy, compared and checked against labels."""
  s = c.sample
  s.prompts, s.prefix = "toy:12", (4, 24)
  s.count, s.draws, s.max_new_tokens = 6, 2, 4
  s.batch_size = 16
  s.scorers, s.labelled = ("vader",), w.labelled
  s.labels = "bradley_terry"
  return c


def _dpo(w, arg="", **fields):
  return _with(_small(dpo.get_config(f"smoke{arg}"), w), **fields)


def _with(c, **fields):
  """The config with fields set: data__packed is data.packed."""
  for name, value in fields.items():
    put(c, name.replace("__", "."), value)
  return c


def _lora(w):
  c = _sampling(_dpo(w, ",lora"), w)
  c.optim = common.optim("adamw")
  c.optim.warmup, c.optim.schedule = 1, "cosine"
  c.sample.temperature = 0.5
  c.sample.scorers = "vader", f"tfidf:{w.labelled}"
  c.sample.best_of, c.sample.shots, c.sample.shots_from = (2,), 1, "toy:7"
  c.audit.empty = None
  return c


def _sft(w):
  c = _small(sft.get_config("smoke"), w)
  c.optim = common.optim("sgd")
  c.train.steps = None
  c.data.eval = None
  return _with(c, data__packed=False, optim__schedule="linear")


def _reward(w, arg=""):
  return _with(_small(reward.get_config(f"smoke{arg}"), w), reward__count=None)


def _reward_of_samples(w):
  fields = {"reward__completions": "toy:24", "reward__count": 16}
  return _with(_reward(w, ",lora"), **fields)


def _quickstart(w):
  c = _sampling(_small(quickstart.get_config("stage=dpo,smoke"), w), w)
  return _with(c, sample__labels="none", init_from=w.run)


def _mixture(w):
  return _dpo(
    w, ",loss=mpo,ref=ema", train__accumulation=2, data__batch_size=32
  )


def _simpo(w):
  return _dpo(w, ",loss=simpo", data__shared=False)


def _kto(w):
  limit = 256
  c = _dpo(w, ",loss=kto", mesh__mode="pmap", data__max_row_length=limit)
  c.export.push = "me/it"
  return c


def _published(w):
  c = _small(dpo.get_config(f"lora,model=hf:{w.model}"), w)
  c.tokenizer = "bytes"  # the model has rows for all of them
  c.lora.base, c.export.form = "bfloat16", "adapter"
  return c


def _judge(w):
  """A judge behind an endpoint, with all that may be None."""
  c = judge.get_config()
  c.judge.samples, c.judge.against = (w.samples_too,), "toy:20"
  c.judge.by, c.judge.cache = "openai:stub", "answers"
  c.judge.price_in, c.judge.price_out = 1.0, 2.0
  c.judge.budget = 100.0
  return c


def _judged_by_people(w):
  c = judge.get_config()
  c.judge.samples, c.judge.against = (w.samples_too,), "toy:20"
  return _with(c, judge__by=f"form:{w.form}")


def _ppo(w, arg="", **fields):
  return _drawn(ppo.get_config(f"smoke{arg}"), w, **fields)


def _online(w, arg="", **fields):
  return _drawn(online.get_config(f"smoke{arg}"), w, **fields)


def _drawn(c, w, **fields):
  """Rollouts of which every prompt is drawn once in two iterations or so."""
  c = _small(c, w)
  c.data.eval, c.data.max_completion_length = None, 8
  c.data.batch_size, c.data.shape_multiple = 8, 8
  c.rollout.prompts, c.rollout.epochs, c.rollout.batch_size = 16, 2, 16
  c.train.steps = 12
  return _with(c, **fields)


def _rollouts_of_ppo(w):
  return _ppo(
    w,
    rollout__kl_target=3.0,
    rollout__kl_horizon=100,
    rollout__missing_end="subtract",
    rollout__missing_score=0.5,
    rollout__warmup=1,
    rollout__draws=2,
  )


def _rollouts_of_rloo(w):
  return _ppo(w, ",loss=rloo", rollout__prefix=(4, 24), rollout__draws=2)


def _critic_copied(w):
  return _ppo(w, rollout__critic="copy", init_from=w.run)


def _pairs_drawn(w):
  fields = {"missing_end": "subtract", "missing_score": 0.5, "prefix": (4, 24)}
  return _online(w, **{f"rollout__{k}": v for k, v in fields.items()})


# Layers that see a window, and what Gemma has beside.
_WINDOW = {
  "window": 5,
  "layer_pattern": ("window", "full"),
  "window_theta": 100.0,
  "norm_place": "both",
  "norm_offset": 1.0,
  "qk_norm": "head",
  "embed_scale": 5.0,
  "attention_scale": 0.5,
  "attention_softcap": 4.0,
  "logit_softcap": 8.0,
}
# Learned positions, and blocks of GPT-NeoX.
_LEARNED = {
  "position": "learned",
  "rotary_dim": 0,
  "norm": "layernorm",
  "qkv_bias": True,
  "tied": False,
  "head_bias": True,
  "residual": "parallel",
}


def _model(changes):
  def make(w):
    c = _dpo(w)
    for name, value in changes.items():
      c.model[name] = value
    return c

  return make


def _loss(name):
  def make(w):
    return _dpo(w, f",loss={name}")

  return make


LOSSES = [n for n, loss in losses.LOSSES.items() if not loss.of_rewards]
OF_REWARDS = [n for n, loss in losses.LOSSES.items() if loss.of_rewards]

_SHAPE = ("model.",)  # what a model is does not depend on the rest

BASES = {
  "dpo": Base(_dpo, whole=True),
  "lora": Base(_lora, leave=_SHAPE),
  "sft": Base(_sft, leave=_SHAPE),
  "mixture": Base(_mixture, leave=_SHAPE),
  "reward": Base(_reward, leave=_SHAPE),
  "reward of samples": Base(_reward_of_samples, "reward."),
  "quickstart": Base(_quickstart, leave=_SHAPE),
  "ppo": Base(_rollouts_of_ppo, "rollout."),
  "rloo": Base(_rollouts_of_rloo, "rollout."),
  "critic": Base(_critic_copied, "rollout.critic"),
  "simpo": Base(_simpo, leave=_SHAPE),
  "kto": Base(_kto, leave=_SHAPE),
  "published": Base(_published),
  "online": Base(_pairs_drawn, "rollout."),
  "ranked": Base(lambda w: _online(w, ",loss=plackett_luce"), "rollout."),
  "best": Base(lambda w: _online(w, ",loss=nll"), "rollout."),
  "window": Base(_model(_WINDOW), "model."),
  "learned": Base(_model(_LEARNED), "model."),
  "judge": Base(_judge, "judge.", ("judge.form_key",)),
  "people": Base(_judged_by_people, "judge.form_key"),
  "divergence": Base(lambda w: _dpo(w, ",divergence=alpha"), "loss."),
  **{
    f"loss={name}": Base(_loss(name), "loss.", ("loss.name",))
    for name in LOSSES
  },
  **{
    f"loss={name}": Base(
      functools.partial(_reward, arg=f",loss={name}"),
      "loss.",
      ("loss.name",),
    )
    for name in OF_REWARDS
  },
  **{
    f"loss={name}": Base(
      functools.partial(_ppo, arg=f",loss={name}"),
      "loss.",
      ("loss.name",),
    )
    for name in rl.ESTIMATORS
  },
}
