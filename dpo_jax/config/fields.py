"""What each config field is: one row a field, read wherever that matters.

A run that resumes, an evaluation and an export compare what fields decide; the
checks of numbers, and the tests of dead knobs, read the rest.
"""

import math
from typing import NamedTuple

# What a field decides.
POLICY = "policy"  # what is trained: a run that resumes must share it
LENGTH = "length"  # how long
MEASURE = "measure"  # what is measured of the policy
HOW = "how"  # how it is computed: results are the same up to rounding
KEEP = "keep"  # what is kept and reported


class Field(NamedTuple):
  """A row of FIELDS.

  Attributes:
    decides: POLICY, LENGTH, MEASURE, HOW or KEEP.
    optional: it may be None.
    least: least value of a number; None is 1 of a whole number, and anything
      above 0 of another.
    most: greatest value of a share; None where there is none.
    below: what a number must be less than; None for nothing.
  """

  decides: str
  optional: bool = False
  least: float | None = None
  most: float | None = None
  below: float | None = None


SHARE = Field(KEEP, optional=True, least=0, most=1)

# By their paths in configs/base.py, and in configs/judge.py. "loss." is of the
# fields of a section that have no row of their own: those of what is selected
# there.
FIELDS = {
  "algo": Field(POLICY),
  "loss.": Field(POLICY),  # numbers: the loss's row has their ranges
  "workdir": Field(KEEP, optional=True),
  "ref": Field(POLICY),
  "ref_mix": Field(POLICY, optional=True, most=1),
  "ref_every": Field(POLICY, optional=True),
  "ref_store": Field(KEEP, optional=True),
  "init_seed": Field(POLICY, least=0),
  "init_from": Field(POLICY, optional=True),
  "init_adapter": Field(POLICY, optional=True),
  "model.": Field(POLICY),
  "model.rotary_dim": Field(POLICY, least=0),
  "model.norm_offset": Field(POLICY, least=0),
  "model.window": Field(POLICY, optional=True),
  "model.window_theta": Field(POLICY, optional=True),
  "model.embed_scale": Field(POLICY, optional=True),
  "model.attention_scale": Field(POLICY, optional=True),
  "model.attention_softcap": Field(POLICY, optional=True),
  "model.logit_softcap": Field(POLICY, optional=True),
  "model.attention": Field(HOW),
  "model.remat": Field(HOW),
  "model.head_chunk": Field(HOW, optional=True),
  "model.unroll": Field(HOW),
  "lora": Field(POLICY, optional=True),
  "lora.rank": Field(POLICY),
  "lora.alpha": Field(POLICY),
  "lora.rank_stabilised": Field(POLICY),
  "lora.targets": Field(POLICY),
  "lora.zero": Field(POLICY),
  "lora.base": Field(POLICY),
  "tokenizer": Field(POLICY),
  "optim.": Field(POLICY),
  # Of moving averages: at 1 they would never move.
  "optim.decay": Field(POLICY, least=0, below=1),
  "optim.b1": Field(POLICY, least=0, below=1),
  "optim.b2": Field(POLICY, least=0, below=1),
  "optim.warmup": Field(POLICY, least=0),
  "optim.clip_norm": Field(POLICY, optional=True),
  "optim.max_spike": Field(POLICY, optional=True, least=1),
  "optim.weight_decay": Field(POLICY, least=0),
  "precision": Field(POLICY),
  "data.train": Field(POLICY, optional=True),
  "data.eval": Field(MEASURE, optional=True),
  "data.batch_size": Field(POLICY),
  "data.max_prompt_length": Field(POLICY),
  "data.max_completion_length": Field(POLICY),
  "data.long_prompt": Field(POLICY),
  "data.bad_records": Field(POLICY),
  # The layout changes no result but for rounding; a run that resumes shares it
  # all the same, or its steps would not be bit-equal.
  "data.packed": Field(POLICY),
  "data.shared": Field(POLICY),
  "data.max_row_length": Field(POLICY, optional=True),
  "data.max_shapes": Field(POLICY),
  "data.shape_multiple": Field(POLICY),
  "data.seed": Field(POLICY, least=0),
  "data.token_cache": Field(KEEP, optional=True),
  "audit.show": Field(KEEP, least=0),
  "audit.skipped": SHARE,
  "audit.boundary_merges": SHARE,
  "audit.cut": SHARE,
  "audit.double_bos": SHARE,
  "audit.special_tokens": SHARE,
  "audit.empty": SHARE,
  "audit.other_end": SHARE,
  "sample.prompts": Field(MEASURE, optional=True),
  "sample.prefix": Field(MEASURE, optional=True),
  "sample.template": Field(MEASURE, optional=True),
  "sample.shots": Field(MEASURE, least=0),
  "sample.shots_from": Field(MEASURE, optional=True),
  "sample.stop": Field(MEASURE),
  "sample.count": Field(MEASURE),
  "sample.draws": Field(MEASURE),
  "sample.max_new_tokens": Field(MEASURE),
  "sample.temperature": Field(MEASURE, least=0),
  "sample.top_p": Field(MEASURE, most=1),
  "sample.batch_size": Field(MEASURE),
  "sample.seed": Field(MEASURE, least=0),
  "sample.scorers": Field(MEASURE),
  "sample.best_of": Field(MEASURE),
  "sample.rank_by": Field(MEASURE, optional=True),
  "sample.labelled": Field(MEASURE, optional=True),
  "sample.checkpoints": Field(MEASURE),
  "sample.labels": Field(MEASURE),
  "sample.label_scale": Field(MEASURE),
  "rollout": Field(POLICY, optional=True),
  "rollout.scorer": Field(POLICY, optional=True),
  "rollout.prefix": Field(POLICY, optional=True),
  "rollout.prompts": Field(POLICY),
  "rollout.draws": Field(POLICY),
  "rollout.epochs": Field(POLICY),
  "rollout.batch_size": Field(POLICY),
  "rollout.temperature": Field(POLICY),
  "rollout.seed": Field(POLICY, least=0),
  "rollout.missing_end": Field(POLICY),
  "rollout.missing_score": Field(POLICY, optional=True, least=-math.inf),
  "rollout.labels": Field(POLICY),
  "rollout.label_scale": Field(POLICY, optional=True),
  "rollout.compare": Field(POLICY),
  "rollout.centre": Field(POLICY),
  "rollout.kl_target": Field(POLICY, optional=True),
  "rollout.kl_horizon": Field(POLICY, optional=True),
  "rollout.kl_stop": Field(POLICY, optional=True),
  "rollout.critic": Field(POLICY),
  "rollout.critic_from": Field(POLICY, optional=True),
  "rollout.warmup": Field(POLICY, least=0),
  "reward.centred": Field(MEASURE),
  "reward.unit": Field(MEASURE),
  "reward.completions": Field(MEASURE, optional=True),
  "reward.count": Field(MEASURE, optional=True),
  # Of a study in an enumerable language.
  "language.words": Field(POLICY, least=2),
  "language.length": Field(POLICY, least=2),
  "language.prompts": Field(POLICY),
  "language.seed": Field(POLICY, least=0),
  "study.seeds": Field(POLICY),
  "study.tuning_seeds": Field(POLICY),
  "study.rates": Field(POLICY),
  "study.labels": Field(POLICY),
  "study.label_scale": Field(POLICY),
  "study.groups": Field(POLICY),
  "study.draws": Field(POLICY, least=2),
  "study.best_of": Field(MEASURE),
  "study.checkpoints": Field(MEASURE, least=2),
  "study.lanes": Field(HOW),
  "study.workers": Field(HOW),
  "study.claims.grid": Field(MEASURE),
  "study.claims.near": Field(MEASURE, below=1),
  "study.claims.method": Field(MEASURE),
  "study.claims.against": Field(MEASURE),
  "study.claims.level": Field(MEASURE, below=1),
  "study.claims.margin": Field(MEASURE),
  "study.claims.resamples": Field(MEASURE),
  "study.claims.seed": Field(MEASURE, least=0),
  "study.claims.trend": Field(MEASURE),
  "sweep.together": Field(HOW),
  "train.steps": Field(LENGTH, optional=True),
  "train.epochs": Field(LENGTH),
  "train.accumulation": Field(POLICY),  # bit-equal, as data.packed
  "train.max_noise": Field(HOW),
  "train.max_skipped": Field(HOW),
  "mesh.mode": Field(HOW),
  "mesh.data": Field(HOW, optional=True),
  "mesh.fsdp": Field(HOW),
  "mesh.tensor": Field(HOW),
  "mesh.context": Field(HOW),
  "export.folder": Field(KEEP, optional=True),
  "export.form": Field(KEEP),
  "export.dtype": Field(KEEP),
  "export.push": Field(KEEP, optional=True),
  "export.public": Field(KEEP),
  "checkpoint.every": Field(KEEP),
  "checkpoint.keep": Field(KEEP),
  "eval.every": Field(KEEP),
  "log.every": Field(KEEP),
  "log.tokens": Field(KEEP),
  "log.profile": Field(KEEP),
  "log.tensorboard": Field(KEEP),
  "log.wandb": Field(KEEP, optional=True),
  "judge.samples": Field(MEASURE),
  "judge.against": Field(MEASURE, optional=True),
  "judge.by": Field(MEASURE, optional=True),
  "judge.template": Field(MEASURE),
  "judge.verdict": Field(MEASURE),
  "judge.count": Field(LENGTH, optional=True),
  "judge.agree_with": Field(KEEP),
  "judge.seed": Field(KEEP, least=0),
  "judge.form_key": Field(KEEP, optional=True),
  "judge.base_url": Field(MEASURE),
  "judge.key_from": Field(KEEP, optional=True),
  "judge.temperature": Field(MEASURE, optional=True, least=0),
  "judge.max_tokens": Field(MEASURE, optional=True),
  "judge.timeout": Field(HOW),
  "judge.concurrency": Field(HOW),
  "judge.retries": Field(HOW, least=0),
  "judge.cache": Field(KEEP, optional=True),
  "judge.price_in": Field(KEEP, optional=True, least=0),
  "judge.price_out": Field(KEEP, optional=True, least=0),
  "judge.budget": Field(LENGTH, optional=True),
  "judge.budget_tokens": Field(LENGTH, optional=True),
}


def of(path):
  """The Field of a path, "loss.beta".

  What is in no config, such as the fingerprint of a run's data, counts as what
  decides the policy.
  """
  section = f"{path.partition('.')[0]}."
  return FIELDS.get(path) or FIELDS.get(section) or Field(POLICY)
