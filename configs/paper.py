"""What the tasks of arXiv:2305.18290 share: constants, stages, small forms.

The optimiser is that of appendix B, which is the default of "rmsprop" in
train/optimizers.py: 1e-6, the authors' repository has 5e-7; linear warm-up over
150 steps, then constant; gradients clipped to norm 10.
"""

from dpo_jax.configs import base, common

EVERY = 20_000 // 64  # steps between evaluations: the repository's 20,000 pairs
PPO_STEP = 1024  # samples of an iteration of PPO
HORIZON = 10_000  # completions over which its KL coefficient moves


def arguments(arg, small, **defaults):
  """The argument of a task's config; `small` are the defaults of `smoke`."""
  shared = {"stage": "all", "temperature": 1.0, "smoke": False}
  whole = {**shared, **defaults}
  a = common.parse_arg(arg, **whole)
  if a.smoke:
    a = common.parse_arg(arg, **{**whole, **small, "fsdp": 1})
  return a


def task(a, stages, steps, plan, *names):
  """The config of a stage, or of all.

  Args:
    a: of `arguments`.
    stages: {name: function of `a` -> config}.
    steps: of common.stages.
    plan: of common.planned.
    *names: the arguments that are passed on to each stage.
  """
  if a.stage == "all":
    passed = {name: a[name] for name in ("root", "model", "fsdp", *names)}
    return common.stages(a.root, *steps, plan=plan, **passed, smoke=a.smoke)
  c = common.choose(a.stage, stages)(a)
  return smoke(c) if a.smoke else c


def split(spec, name):
  """A split of a hub's data set; other sources have none."""
  return f"{spec}:{name}" if spec.startswith("hf:") else spec


def axis(field, values, a):
  """An axis of a sweep; its first point where all is small."""
  return f"{field}={','.join(map(str, values[: 1 if a.smoke else None]))}"


def policy(a, folder):
  """What all stages that hold a policy share."""
  c = common.select_model(base.get_config(), a.model)
  c.workdir = f"{a.root}/{folder}"
  c.model.dtype = "bfloat16"
  c.optim = common.optim("rmsprop")
  c.mesh.fsdp = a.fsdp
  c.data.batch_size = 64
  c.data.max_prompt_length = 256
  c.data.max_completion_length = 512 - 256
  c.data.bad_records = "skip"
  c.eval.every = EVERY
  c.sample.batch_size = 512
  return c


def after(c, a, stage):
  """Starts from what another stage trained."""
  c.init_from = f"{a.root}/{stage}"
  return c


def sft(c):
  c.algo, c.ref, c.loss = "sft", "none", common.loss("sft")
  return c


def dpo(c, beta, most):
  """DPO with a β, of a sweep with none above `most`.

  The reference runs in the same step: log-probs that another program made would
  differ by most of a nat a completion (SmolLM2-135M in bf16, 60 tokens).
  """
  c.ref, c.loss = "frozen", common.loss("dpo")
  c.loss.beta = beta
  c.train.max_noise = 2.0 * most  # a wrong reference is tens of nats away
  return c


def reward(c, epochs):
  """The model of Eq. 2; its rewards are shifted, and scaled, as PPO likes."""
  c.algo, c.ref, c.loss = "reward", "none", common.loss("bradley_terry")
  c.reward.centred = c.reward.unit = True
  c.reward.count = 1024
  c.train.epochs = epochs
  return c


def ppo(c, scorer, target):
  c.algo, c.ref = "policy_gradient", "frozen"
  c.loss, c.rollout = common.policy_gradient("ppo"), common.rollout("ppo")
  c.data.packed = False
  c.rollout.scorer = scorer
  c.rollout.prompts = PPO_STEP
  c.rollout.kl_target, c.rollout.kl_horizon = target, HORIZON
  return c


def sampled(methods, temperatures, a):
  """The steps that sample methods at temperatures.

  Where all is small, at 0 if that is one of them, and at the first above. What
  a step leaves, completions.jsonl, is what a judge compares.
  """
  warm = min(t for t in temperatures if t > 0)
  for name in methods:
    for temperature in temperatures:
      if temperature <= warm or not a.smoke:
        yield "sample", f"samples,policy={name},temperature={temperature}"


def best_of_each(temperatures, a):
  """The steps of Best-of-N; at 0 all draws of a prompt are the same."""
  for temperature in temperatures[-1 if a.smoke else 0 :]:
    if temperature > 0:
      yield "sample", f"best_of,temperature={temperature}"


def samples(make, a, first):
  """Samples of one method at one temperature.

  Args:
    make: (a, folder) -> config.
    a: of `arguments`; its policy is a stage, or "base": the model itself.
    first: the first stage; without a published model, it stands for "base".
  """
  c = make(a, f"samples/{a.policy}/T={a.temperature}")
  if a.policy != "base":
    after(c, a, a.policy)
  elif c.init_from is None:
    after(c, a, first)
  c.sample.temperature = a.temperature
  return c


def best_of(make, a, stage, counts):
  """Best of N draws of a stage's policy, ranked by the reward model."""
  c = after(make(a, f"best_of/T={a.temperature}"), a, stage)
  c.sample.temperature = a.temperature
  c.sample.best_of, c.sample.draws = counts, max(counts)
  c.sample.scorers = (f"reward:{a.root}/reward",)
  return c


def smoke(c):
  """Two steps of anything, on a few records: seconds on one core."""
  c.model.dtype = "float32"
  c.data.batch_size = 4
  c.data.max_prompt_length = min(c.data.max_prompt_length, 192)
  c.data.max_completion_length = min(c.data.max_completion_length, 32)
  c.train.steps, c.train.epochs = 2, 1.0
  c.optim.warmup, c.optim.learning_rate = 0, 1e-3
  c.sample.count = 8
  c.sample.max_new_tokens = 8
  c.sample.batch_size = 16
  if c.sample.labels != "none":  # what a micro model draws ties by any r*
    c.sample.labels = "bradley_terry"
  if c.sample.best_of:
    c.sample.best_of, c.sample.draws = (1, 4), 4
  if c.reward.centred:
    c.reward.count = 8
  if c.rollout is not None:
    c.data.max_completion_length = 8
    c.rollout.prompts, c.rollout.epochs = 4, 2
    c.rollout.batch_size = 16
  return c
