"""Another value of every config field."""

import copy

from configs import common, losses
from tests.knobs import bases

# Other values of the fields of which a number near by, or the other bool, is
# none. Those that are set already are left out; the first that has an effect
# counts.
VALUES = {
  "algo": ("preference", "sft"),
  "workdir": ("elsewhere",),
  "ref_mix": (0.5,),
  "ref_every": (3,),
  "ref_store": ("store",),
  "init_from": lambda w: (w.run, None),
  "init_adapter": lambda w: (f"hf:{w.adapter}",),
  "tokenizer": lambda w: (w.tokenizer,),
  "model.head_chunk": (8,),
  "precision": ("default",),
  "model.kv_heads": (4, 1),
  "model.layer_pattern": (("full", "nope"), ("window", "nope")),
  "model.window": (3,),
  "model.residual": ("parallel", "sequential"),
  "model.norm": ("layernorm", "rmsnorm"),
  "model.norm_place": ("post", "pre"),
  "model.qk_norm": ("head", "all"),
  "model.heads": (2, 8),
  "model.head_dim": (16,),
  "model.rotary_dim": (4,),
  "model.window_theta": (50.0,),
  "model.activation": ("gelu",),
  "model.embed_scale": (2.0,),
  "model.attention_scale": (0.25,),
  "model.attention_softcap": (2.0,),
  "model.logit_softcap": (2.0,),
  "model.dtype": ("bfloat16",),
  "model.attention": ("xla",),
  "model.remat": ("full",),
  "optim.moments": ("bfloat16",),
  "optim.max_spike": (3.0,),
  "loss.dialect": ("trl_1",),
  "loss.bco.dialect": ("trl_1",),
  "lora.targets": ((r"attn/\w+/kernel$",),),
  "lora.zero": ("a",),
  "lora.base": ("bfloat16", "float32"),
  "optim.schedule": ("linear", "constant"),
  "optim.freeze": (("attn",),),
  "data.train": ("toy:16",),
  "data.eval": ("toy:4",),
  "data.max_prompt_length": (12,),
  "data.max_completion_length": (8,),
  "data.long_prompt": ("keep_start",),
  "data.bad_records": ("error",),
  "data.max_row_length": (96, 128),
  "data.max_shapes": (1,),
  "data.shape_multiple": (16, 64),
  "data.token_cache": ("tokens",),
  "audit.empty": (0.5,),
  "sample.prompts": ("toy:6",),
  "sample.prefix": ((4, 16),),
  "sample.template": ("so {prompt}:",),
  "sample.shots_from": ("toy:3", "toy:4", "toy:5"),
  "sample.stop": (("e", "a", "u"),),
  "sample.top_p": (0.5,),
  "sample.batch_size": (8,),
  "sample.scorers": lambda w: ((f"tfidf:{w.labelled}",),),
  "sample.best_of": ((1,),),
  "sample.rank_by": lambda w: ("vader", f"tfidf:{w.labelled}"),
  "sample.labelled": lambda w: (w.labelled_too,),
  "sample.labels": ("deterministic",),
  "sample.label_scale": (1e6,),
  "reward.completions": ("toy:12",),
  "reward.count": (8, 32),
  "rollout.compare": ("best_worst",),
  "train.steps": (4,),
  "train.max_noise": (0.01,),
  "train.max_skipped": (1,),
  "optim.decay": (0.9,),
  "optim.b1": (0.8,),
  "optim.b2": (0.9,),
  "mesh.mode": ("jit", "pmap"),
  "mesh.data": (4,),
  "mesh.fsdp": (2,),
  "mesh.tensor": (2,),
  "rollout.scorer": lambda w: (f"tfidf:{w.labelled}",),
  "rollout.prefix": ((4, 16),),
  "rollout.prompts": (24,),
  "rollout.kl_target": (6.0,),
  "rollout.kl_horizon": (200,),
  "rollout.kl_stop": (0.5,),
  "rollout.missing_score": (0.25,),
  "rollout.centre": ("prompt",),
  "rollout.critic": ("copy", "head"),
  "rollout.critic_from": lambda w: (w.reward,),
  "loss.gamma": (0.9,),
  "loss.lam": (0.5,),
  "loss.value_lam": (0.5,),
  "loss.average": ("sums", "means"),
  "loss.whiten": ("both", "rewards"),
  "loss.scale": ("none",),
  "export.folder": ("elsewhere",),
  "export.form": ("adapter", "merged"),
  "export.dtype": ("bfloat16",),
  "export.push": ("me/mine",),
  "log.wandb": ("mine",),
  "judge.samples": lambda w: ((w.samples,),),
  "judge.against": ("toy:3",),
  "judge.by": ("openai:other",),
  "judge.template": ("Which? {prompt} {a} {b}",),
  "judge.verdict": ("Best",),
  "judge.count": (2,),
  "judge.agree_with": lambda w: ((w.judged,),),
  "judge.form_key": lambda w: (w.form_key,),
  "judge.base_url": ("http://localhost:8000/v1",),
  "judge.key_from": ("OTHER_KEY",),
  "judge.cache": ("elsewhere",),
  "judge.budget": (0.5,),
  "judge.budget_tokens": (3,),
}


def _other_ref(c, w):
  others = {"frozen": "cached", "base": "cached", "none": "frozen"}
  c.ref = others.get(c.ref, "none")
  c.ref_mix = c.ref_every = None


def _other_loss(c, w):
  others = {"simpo": "orpo", "kto": "bco_unpaired", "mixture": "rpo"}
  others["bradley_terry"] = "bradley_terry_margin"
  other = "dpo" if c.loss.name == "ipo" else "ipo"
  c.loss = common.loss(others.get(c.loss.name, other))


def _other_optimizer(c, w):
  c.optim = common.optim("adamw" if c.optim.name == "sgd" else "sgd")


def _other_divergence(c, w):
  c.loss = losses.loss(c.loss.name, "js")


def _adapter(c, w):
  c.lora = common.lora()
  c.ref = "base" if c.ref == "frozen" else c.ref
  c.ref_mix = 1.0 if c.ref == "ema" else None


def _rollouts(c, w):
  c.rollout = common.rollout()


def _other_end(c, w):
  c.rollout.missing_end = "replace"
  c.rollout.missing_score = c.rollout.missing_score or 0.5


def _other_labels(c, w):
  c.rollout.labels, c.rollout.label_scale = "deterministic", None


def _other_position(c, w):
  learned = c.model.position == "learned"
  c.model.position = "rotary" if learned else "learned"
  c.model.rotary_dim = 4 if learned else 0


def _other_limit(c, w):
  """Rotary positions are not stored: there it is no more than a limit."""
  learned = c.model.position == "learned"
  c.model.max_positions = 1000 if learned else 8


# Fields that select a section, or go with others.
EDITS = {
  "ref": _other_ref,
  "loss.name": _other_loss,
  "optim.name": _other_optimizer,
  "loss.divergence": _other_divergence,
  "lora": _adapter,
  "rollout": _rollouts,
  "rollout.missing_end": _other_end,
  "rollout.labels": _other_labels,
  "model.position": _other_position,
  "model.max_positions": _other_limit,
}


def others(config, field, world):
  """Yields copies of a config in which a field is another.

  Raises: LookupError for a field of which nothing says what that would be.
  """
  if field in EDITS:
    changed = copy.deepcopy(config).unlock()
    EDITS[field](changed, world)
    yield changed.lock()
    return
  now = bases.get(config, field)
  values = VALUES.get(field, ())
  values = values(world) if callable(values) else values
  if not values and isinstance(now, bool):
    values = (not now,)
  elif not values and isinstance(now, int):
    values = (now + 1,)
  elif not values and isinstance(now, float):
    values = (1.5 * now or 0.25,)
  if not values:
    raise LookupError
  for value in values:
    if value != now:
      changed = copy.deepcopy(config).unlock()
      bases.put(changed, field, value)
      yield changed.lock()
