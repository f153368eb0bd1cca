"""Every field once, with one comment each. Other configs start from this one.

`config.loss`, `config.optim` and `config.model` hold the fields of what is
selected and no others; `configs/common.py` has their tables.
"""

from ml_collections import config_dict

from dpo_jax.configs import common

optional = config_dict.placeholder  # a field that may be None


def get_config():
  c = config_dict.ConfigDict()
  c.algo = "preference"  # or sft, reward, policy_gradient, online
  c.loss = common.loss("dpo")  # the loss and its own fields
  c.workdir = optional(str)  # run folder, or None: --workdir
  # The reference is the initial policy. frozen: a copy of its weights; base:
  # the base of an adapter; cached: its log-probs, computed once and kept on
  # disk; ema: a copy that follows the policy; none: no reference.
  c.ref = "frozen"
  c.ref_mix = optional(float)  # of "ema": share of the policy in an update
  c.ref_every = optional(int)  # of "ema": steps between updates
  c.ref_store = optional(str)  # of "cached"; None: the run folder
  c.init_seed = 0  # of the random initial parameters
  c.init_from = optional(str)  # hf:NAME, gguf:FILE, run folder, or None: random
  c.init_adapter = optional(str)  # hf:NAME of a PEFT adapter to merge into it
  # Decoder shape, see models/config.py; of init_from: common.pretrained.
  c.model = common.model("tiny")
  c.lora = optional(config_dict.ConfigDict)  # common.lora; None: train it all
  c.tokenizer = "bytes"  # bytes, hf:NAME, gguf:FILE, or a local folder
  c.optim = common.optim("rmsprop")  # the optimiser and its own fields
  c.precision = "highest"  # of f32 matmuls: highest, high or default

  c.data = d = config_dict.ConfigDict()
  d.train = optional(str)  # file or generated source
  d.eval = optional(str)  # held-out comparisons, or None
  d.batch_size = 64  # examples per step
  d.max_prompt_length = 256  # tokens, BOS included
  d.max_completion_length = 256  # tokens, EOS included; longer ones are cut
  d.long_prompt = "error"  # error, keep_end or keep_start
  d.bad_records = "error"  # error at the first, or skip and count
  d.packed = True  # several examples share a row
  d.shared = True  # completions share one copy of the prompt
  d.max_row_length = optional(int)  # tokens in a packed row
  d.max_shapes = 3  # compilations that batch shapes may cost
  d.shape_multiple = 32  # T, S and E are multiples of this
  d.seed = 0  # of the order of the data
  # Folder of tokenised data; None: that of the user, ~/.cache/dpo_jax/tokens,
  # for data sets of more than 16,384 records.
  d.token_cache = optional(str)

  # Limits of `dpo-jax audit`: shares of the records, or of the examples, of a
  # data set or of a part of a mixture. None: not checked.
  c.audit = a = config_dict.ConfigDict()
  a.show = 2  # examples printed token by token
  a.skipped = 0.0  # records that cannot be used, identical pairs among them
  a.boundary_merges = 0.01  # prompt and completion would share a token
  a.cut = 0.1  # prompt or completion is cut to data.max_…_length
  a.double_bos = 0.0  # more than one BOS
  a.special_tokens = 0.0  # text that reads as another special token
  a.empty = 0.0  # a completion of no token but its end
  a.other_end = 0.0  # a completion ends in what stops no sample

  c.sample = s = config_dict.ConfigDict()
  s.prompts = optional(str)  # source of prompts, None: no samples
  s.prefix = optional(tuple)  # (2, 8): prompts are text beginnings
  # Text around {prompt}, or a file of it, see data/tokens/shots.py; None: none.
  s.template = optional(str)
  s.shots = 0  # examples in front of each prompt
  s.shots_from = optional(str)  # source of these, with completions
  s.stop = ()  # texts that end a completion, as an EOS does
  s.count = 512  # prompts; all if there are fewer
  s.draws = 1  # completions of each
  s.max_new_tokens = 64  # tokens, EOS included
  s.temperature = 1.0  # 0 takes the most likely token
  s.top_p = 1.0  # share of probability that is kept
  s.batch_size = 256  # completions at once
  s.seed = 0  # of prompts, draws and labels
  s.scorers = ()  # see eval/rewards.py; the first is the ground truth r*
  s.best_of = ()  # (1, 4, 16): what the best of so many draws are worth by r*
  s.rank_by = optional(str)  # the one of scorers that ranks draws, None: first
  s.labelled = optional(str)  # source to check the scorers on
  s.checkpoints = False  # whether those before the last are sampled too
  s.labels = "none"  # comparisons of the draws: bradley_terry, deterministic
  s.label_scale = 1.0  # κ of bradley_terry: i beats j by σ(κ (r_i − r_j))

  # What the policy samples while it is trained: common.rollout, or
  # rollout_of_comparisons; None: nothing.
  c.rollout = optional(config_dict.ConfigDict)

  # Of a reward model: gain and bias, found behind the last step.
  c.reward = r = config_dict.ConfigDict()
  r.centred = False  # completions of the reference get rewards of mean 0
  r.unit = False  # and of standard deviation 1
  r.completions = optional(str)  # source of them; None: those of data.train
  r.count = optional(int)  # prompts that are scored for it; None: all

  c.sweep = config_dict.ConfigDict()
  c.sweep.together = 1  # points trained in one program, where they can be

  c.train = t = config_dict.ConfigDict()
  t.steps = optional(int)  # updates, or None for train.epochs
  t.epochs = 1.0  # passes over the data when train.steps is None
  t.accumulation = 1  # microbatches per update
  t.max_noise = 0.1  # largest |reward| at step 0, where policy = reference
  t.max_skipped = 10  # non-finite updates in a row that end the run

  c.mesh = m = config_dict.ConfigDict()
  m.mode = "jit"  # jit over the mesh, or pmap (data parallelism only)
  m.data = optional(int)  # None: the devices the others leave
  m.fsdp = 1  # splits parameters, and rows
  m.tensor = 1  # splits heads, mlp and vocabulary
  m.context = 1  # splits sequences; not built

  c.export = e = config_dict.ConfigDict()
  e.folder = optional(str)  # None: "export" in the run folder
  e.form = "merged"  # a whole model, or adapter: in PEFT's files
  e.dtype = "float32"  # of the files of a whole model, or bfloat16
  e.push = optional(str)  # name on the Hugging Face hub, None: no upload
  e.public = False  # whether everybody sees what is uploaded

  c.checkpoint = config_dict.ConfigDict()
  c.checkpoint.every = 500  # steps; the last is always saved
  c.checkpoint.keep = 2  # newest ones kept
  c.eval = config_dict.ConfigDict()
  c.eval.every = 100  # steps; the last is always evaluated
  c.log = config_dict.ConfigDict()
  c.log.every = 10  # steps
  c.log.tokens = False  # entropy and top-1 accuracy of the scored tokens too
  c.log.profile = False  # trace of steps 3 to 5, in the run folder
  c.log.tensorboard = False  # event files in the run folder
  c.log.wandb = optional(str)  # project of Weights & Biases
  return c
