"""Tables that configs select from. Imports no jax."""

import dataclasses
import typing

from ml_collections import config_dict

from dpo_jax import lookup
from dpo_jax.configs import losses
from dpo_jax.models import config as model_config
from dpo_jax.ops import rl
from dpo_jax.train import optimizers

loss = losses.loss


def optim(name):
  """config.optim for an optimiser: the common fields and its own."""
  kind = lookup.lookup(optimizers.OPTIMIZERS, name, "optim")
  fields = {"name": name, **kind.defaults, **optimizers.COMMON}
  names = "clip_norm", "max_spike"
  optional = {name: config_dict.placeholder(float) for name in names}
  o = config_dict.ConfigDict(fields | optional)
  o.update({name: fields[name] for name in names})
  return o


def select_optim(c, name, learning_rate):
  """Gives a config an optimiser, by name.

  The rate is of those that divide a gradient by its size, to which their `eps`
  is added; another keeps its own.
  """
  c.optim = optim(name)
  if "eps" in c.optim:
    c.optim.learning_rate = learning_rate
  c.optim.warmup = 10
  return c


def model(name):
  """config.model for a preset of models/config.py."""
  fields = dataclasses.fields(model_config.ModelConfig)
  return _model(name, [field.name for field in fields])


def _model(name, names):
  """Those fields of a preset."""
  preset = lookup.lookup(model_config.PRESETS, name, "model")
  m = config_dict.ConfigDict()
  for field in dataclasses.fields(preset):
    if field.name not in names:
      continue
    value = getattr(preset, field.name)
    if value is not None:
      m[field.name] = value
    elif field.name != "rope_scaling":  # a checkpoint brings that
      m[field.name] = config_dict.placeholder(typing.get_args(field.type)[0])
  return m


def pretrained(c, spec):
  """Makes a config start from a checkpoint, whose config.json has the shape.

  Args:
    c: ConfigDict of configs/base.py.
    spec: "hf:NAME" or "gguf:FILE".
  """
  c.init_from = c.tokenizer = spec
  c.model = _model("micro", model_config.RUNTIME)
  return c


def select_model(c, name):
  """Gives a config a preset, by name, or a pre-trained model, by spec."""
  if ":" in name:
    return pretrained(c, name)
  c.model = model(name)
  return c


def select_ref(c, name):
  """Gives a config a reference; "ema" with TR-DPO's soft update."""
  c.ref = name
  if name == "ema":  # arXiv:2404.09656
    c.ref_mix, c.ref_every = 0.6, 512
  return c


def lora():
  """config.lora: an adapter of all linear layers, on a base in f32."""
  o = config_dict.ConfigDict()
  o.rank = 16  # r
  o.alpha = 32.0  # the product's factor is alpha / r
  o.rank_stabilised = False  # or alpha / √r
  o.targets = (r"(attn|mlp)/\w+/kernel$",)  # path regexes of adapted kernels
  o.zero = "b"  # the factor that begins at 0; a: B is random, not A
  o.base = "float32"  # how the base is held: float32, bfloat16, int8, nf4
  return o


def policy_gradient(name):
  """config.loss for an estimator of ops.rl."""
  row = lookup.lookup(rl.ESTIMATORS, name, "loss")
  return config_dict.ConfigDict({"name": name, **row.defaults})


def rollout(estimator="ppo"):
  """config.rollout of an estimator of ops.rl."""
  row = lookup.lookup(rl.ESTIMATORS, estimator, "loss")
  draws, epochs = (4, 1) if row.group else (1, 4)
  o = _rollout(draws, epochs)
  # What is 0 in scores: the scorer's own, or the mean of a prompt's completions
  # (prompt), before a missing end costs anything.
  o.centre = "none"
  # The coefficient of the KL penalty, loss.beta, aims at this sequence KL
  # (nats); kl_horizon: completions over which it does. None: it is fixed.
  o.kl_target = config_dict.placeholder(float)
  o.kl_horizon = config_dict.placeholder(int)
  # Approximate KL (nats per token) that ends an iteration early, or None.
  o.kl_stop = config_dict.placeholder(float)
  # The critic: a head on the policy's trunk, on a copy of its own, or none.
  o.critic = "head" if row.critic else "none"
  # Run folder of a reward model that a copy starts as; None: as the policy.
  o.critic_from = config_dict.placeholder(str)
  o.warmup = 0  # iterations in which the critic alone learns
  return o


def rollout_of_comparisons(name="dpo"):
  """config.rollout of a loss, or mixture, that compares completions.

  One that reads the best completion alone, such as "nll", has no labels.
  """
  kind, o = losses.compared(name), _rollout(draws=4, epochs=1)
  if kind != "best":
    # Who wins: drawn by the scores (bradley_terry), or the higher
    # (deterministic; ties are left out).
    o.labels = "bradley_terry"
    # κ of the draws, i beats j with probability σ(κ (r_i − r_j)); else None.
    o.label_scale = config_dict.placeholder(float)
    o.label_scale = 1.0
  if kind == "pairs":
    o.compare = "all"  # pairs of a prompt, or best_worst: one
  return o


def _rollout(draws, epochs):
  """The fields of config.rollout that all algorithms share.

  An iteration draws `draws` for each of `prompts` prompts of data.train, and
  trains on them `epochs` times.
  """
  o = config_dict.ConfigDict()
  o.scorer = config_dict.placeholder(str)  # the reward, see eval/rewards.py
  o.prefix = config_dict.placeholder(tuple)  # (2, 8): beginnings, as sample's
  o.prompts = 64  # of an iteration: a multiple of data.batch_size
  o.draws = draws  # completions of each
  o.epochs = epochs  # passes over an iteration
  o.batch_size = 256  # completions drawn at once
  # Of sampling, and in policy gradients of every log-prob.
  o.temperature = 1.0
  o.seed = 0  # of the draws, and of the labels
  # Of a completion that is cut at data.max_completion_length: keep its score,
  # replace it by missing_score, or subtract that.
  o.missing_end = "keep"
  o.missing_score = config_dict.placeholder(float)
  return o


def parse_arg(arg, **defaults):
  """Reads a config's argument, `smoke,loss=ipo`, over its defaults.

  Args:
    arg: what follows the colon in `--config file.py:arg`, or None.
    **defaults: {name: default}; a bool may be given by its name alone.
  Returns: ConfigDict of the defaults, overridden.
  Raises: ValueError for an unknown name.
  """
  values = dict(defaults)
  for part in filter(None, (arg or "").split(",")):
    name, given, text = part.partition("=")
    default = lookup.lookup(values, name, "argument of the config").__class__
    lookup.lookup(defaults, name, "argument of the config")
    if default is bool:
      values[name] = not given or text.lower() in ("1", "true")
    elif not given:
      raise ValueError(
        f"argument {name!r} of the config needs a value: {name}=…"
      )
    else:
      values[name] = default(text)
  return config_dict.ConfigDict(values)


def stages(workdir, *steps, plan=None, compared=None, **arguments):
  """A config of `train` that runs a file's stages, one after the other.

  Args:
    workdir: of the whole.
    *steps: (verb, stage), or (verb, stage, *axes): the stage is the file's
      config of that name, the axes are those of `sweep --sweep`. Steps of the
      verb "together" that follow one another are stages in their turn; on a
      CPU they run at the same time, a process each.
    plan: of `planned`; a table is then printed before the first stage.
    compared: of `compared`; what `dpo-jax report` then says of the whole.
    **arguments: passed on to each.
  """
  c = config_dict.ConfigDict({"algo": "stages", "workdir": workdir})
  c.stages = tuple((verb, name, *axes) for verb, name, *axes in steps)
  c.arguments = tuple(arguments.items())
  if plan is not None:
    c.plan = plan
  if compared is not None:
    c.compared = compared
  return c


def compared(method, against, seeds, folder, trend=None):
  """config.compared: the sweeps of several methods and seeds, as one result.

  Args:
    method: ours, a name; against: tuple of the others'. "best_of" is a folder
      of `dpo-jax sample` with sample.best_of.
    seeds: of all methods.
    folder: of a sweep below the workdir, "seed={seed}/{method}".
    trend: the field that must bring our KL down, "loss.beta".
  """
  o = config_dict.ConfigDict()
  o.method, o.against, o.seeds, o.folder = method, against, seeds, folder
  o.trend = config_dict.placeholder(str)
  o.trend = trend
  return o


def planned(devices, *records):
  """config.plan: what a table of tokens, FLOPs, memory and hours rests on.

  Args:
    devices: how many there are.
    *records: (source, records, mean prompt tokens, mean completion tokens).
  """
  o = config_dict.ConfigDict()
  o.device = "H100"  # of train.log.PEAK_FLOPS
  o.devices = devices
  o.mfu = 0.3  # share of the peak in training: 32% was measured on one H100
  o.sampling = 0.02  # and in drawing, where each token reads all weights
  o.records = records
  return o


def choose(name, table):
  """table[name], or ValueError with the nearest spelling."""
  return lookup.lookup(table, name, "argument of the config")


def smoke(c):
  """Two steps of a micro model on generated pairs: seconds on one core."""
  c.model = model("micro")
  c.tokenizer = "bytes"
  c.init_from = None
  c.data.train, c.data.eval = "toy", "toy:64"
  c.data.max_prompt_length = c.data.max_completion_length = 64
  c.data.batch_size = 8
  c.train.steps = 2
  c.optim.warmup = 0
  c.optim.learning_rate = 1e-3
  return c
