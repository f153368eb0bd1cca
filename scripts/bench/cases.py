"""What is measured: shapes, mixes of lengths, systems, cases and goals."""

from typing import NamedTuple

from dpo_jax import lookup


class Mix(NamedTuple):
  """Lengths of a data set in tokens, log-normal and cut at the maximum.

  Attributes:
    prompt, completion: means before the cut, EOS included.
    max_prompt, max_completion: limits; their sum is what is padded to.
  """

  prompt: int
  completion: int
  max_prompt: int
  max_completion: int

  @property
  def max_length(self):
    """T of a padded sequence."""
    return self.max_prompt + self.max_completion


SPREAD = 0.4  # standard deviation of the log of a length
MIXES = {
  "balanced": Mix(120, 150, 256, 256),
  "hh": Mix(180, 60, 384, 128),
  "tldr": Mix(350, 40, 448, 64),
  "long": Mix(120, 400, 256, 768),
  # Every completion that is drawn has 64 tokens.
  "rollout": Mix(96, 64, 128, 64),
  "smoke": Mix(12, 16, 32, 32),
  "smoke-rollout": Mix(12, 8, 16, 8),
}

# Presets of models/config.py and the tokens of their vocabularies.
VOCABULARY = {
  "pythia-70m": 50304,
  "gpt2": 50257,
  "smollm2-135m": 49152,
  "micro": 256,
}


class System(NamedTuple):
  """A worker.

  Attributes:
    module: of scripts/bench.
    venv: in the checkout, None is the driver's own.
    package: what it runs, to be found in the driver's own where there is no
      venv.
    compiles: whether it reports compilations.
    what: for the table.
  """

  module: str
  venv: str | None
  compiles: bool
  what: str
  package: str | None = None


_TORCH, _JAX = ".venv-bench-torch", ".venv-bench-jax"
SYSTEMS = {
  "ours": System("ours", None, True, "dpo_jax"),
  "ours4": System("ours", None, True, "dpo_jax, 4 stacked points"),
  "padded": System("padded", None, True, "padded JAX step"),
  "trl": System("trl_worker", _TORCH, False, "TRL DPOTrainer", "trl"),
  "original": System("original", _TORCH, False, "original repository's step"),
  "tunix": System("tunix_worker", _JAX, True, "Tunix DPOTrainer"),
  "sampler": System("sampler", None, True, "dpo_jax's sampler"),
  "generate": System(
    "generate", _TORCH, False, "transformers' generate", "transformers"
  ),
  "matmul": System("matmul", None, False, "f32 matmul, JAX"),
  "matmul-torch": System("matmul_torch", _TORCH, False, "f32 matmul, torch"),
}
MATMULS = ("matmul", "matmul-torch")
PEER = "trl"


_FUSED = ("pythia-70m", "gpt2")


class Task(NamedTuple):
  """What a step is.

  Attributes:
    unit: what it is counted in.
    draws: completions that are drawn for each prompt; 0: they are there.
    modules: {of SYSTEMS: the worker's module}, where that is not its own.
    warm_up: steps of every system that no time is taken of.
  """

  unit: str = "pairs"
  draws: int = 0
  modules: dict = {}  # noqa: RUF012 - a constant
  warm_up: int = 1


_ROLLOUTS = {
  "ours": "ours_rollouts",
  "trl": "trl_rollouts",
  "tunix": "tunix_rollouts",
}
_ON_POLICY = Task("completions", 4, _ROLLOUTS)
TASKS = {
  "dpo": Task(),
  # A step is a whole iteration: draw, score, learn.
  **dict.fromkeys(("rloo", "grpo"), _ON_POLICY),
  "ppo": _ON_POLICY._replace(warm_up=2),  # Tunix compiles in the second too
  "reward": Task(modules={"trl": "trl_rewards"}),
}


class Case(NamedTuple):
  """One comparison of systems.

  Attributes:
    model: of VOCABULARY.
    mix: of MIXES.
    lora: an adapter of all linear layers, or all parameters.
    ref: "frozen", or "cached": its log-probs computed before; of an adapter
      the base is the reference. A reward model has "none".
    systems: of SYSTEMS, in the order of the table. All are in memory at once.
    steps: of a round.
    batch: pairs a step, or prompts of an iteration.
    about: marks what is no plain step, in the name.
    task: of TASKS.
  """

  model: str
  mix: str
  lora: bool = False
  ref: str = "frozen"
  systems: tuple[str, ...] = ("ours", "trl", "matmul")
  steps: int = 2
  batch: int = 4
  about: str | None = None
  task: str = "dpo"

  @property
  def draws(self):
    """Completions that are drawn for each prompt, or 0."""
    return TASKS[self.task].draws

  @property
  def units(self):
    """Pairs or completions of a step."""
    return self.batch * (self.draws or 1)

  @property
  def name(self):
    """`pythia-70m/balanced/full/frozen`."""
    what = "lora" if self.lora else "full"
    parts = (self.model, self.mix, what, self.ref, self.about)
    return "/".join(filter(None, parts))

  @property
  def adapter(self):
    """Whether PEFT can train the very adapter of dpo_jax.

    Query, key and value have one each, which PEFT cannot express where the
    checkpoint holds the three as one matrix.
    """
    return self.lora and self.model not in _FUSED


# Each JAX peer may come to 12 GiB or more, so it has a case of its own.
HEADLINE = Case(
  "pythia-70m", "balanced", systems=("ours", "trl", "original", *MATMULS)
)
PADDED = HEADLINE._replace(systems=("ours", "padded", "matmul"), about="padded")
TUNIX = HEADLINE._replace(systems=("ours", "tunix", "matmul"), about="tunix")
CACHED = Case("pythia-70m", "balanced", ref="cached")
TLDR = Case("pythia-70m", "tldr")
# Four points of a sweep over β in one program.
SWEEP = Case(
  "pythia-70m",
  "balanced",
  lora=True,
  systems=("ours", "ours4", "matmul"),
  about="sweep4",
)


def _on_policy(model, task, peer, batch=8):
  return Case(
    *(model, "rollout"),
    systems=("ours", peer, "matmul"),
    steps=1,
    batch=batch,
    about=f"on-policy-{task}",
    task=task,
  )


ON_POLICY = (
  _on_policy("pythia-70m", "rloo", "trl"),
  _on_policy("pythia-70m", "grpo", "trl"),
  _on_policy("smollm2-135m", "rloo", "trl"),
  # Tunix keeps the logits of all positions.
  _on_policy("smollm2-135m", "grpo", "tunix", batch=4),
  _on_policy("smollm2-135m", "ppo", "tunix", batch=4),
  Case(
    *("pythia-70m", "balanced"),
    ref="none",
    about="on-policy-reward",
    task="reward",
  ),
)
QUICK = (HEADLINE, PADDED, TUNIX)
CASES = (
  *QUICK,
  CACHED,
  Case("pythia-70m", "hh"),
  TLDR,
  Case("pythia-70m", "long", steps=1),
  Case("pythia-70m", "balanced", lora=True),
  SWEEP,
  Case("gpt2", "balanced", steps=1),
  Case("gpt2", "balanced", lora=True, steps=1),
  Case("smollm2-135m", "balanced", steps=1),
  Case("smollm2-135m", "balanced", lora=True, steps=1),
  *ON_POLICY,
)
SMOKE = Case("micro", "smoke", systems=("ours", "padded", "matmul"), steps=1)
SMOKE_ROLLOUTS = Case(
  *("micro", "smoke-rollout"),
  systems=("ours", "matmul"),
  steps=1,
  batch=2,
  about="on-policy-rloo",
  task="rloo",
)


def choose(pattern):
  """The cases whose name holds `pattern`.

  Raises: ValueError showing the names, if there is none.
  """
  found = [case for case in CASES if pattern in case.name]
  if not found:
    names = [case.name for case in CASES]
    near = lookup.nearest(pattern, names)
    raise ValueError(
      f"--cases {pattern}: no case has this in its name{near}; there are\n  "
      + "\n  ".join(names)
    )
  return found


class Goal(NamedTuple):
  """A bound on a ratio between two systems of a case.

  Attributes:
    case: its name.
    what: "pairs" (a second; at least `bound`) or "memory" (the worker's peak;
      at most `bound`).
    system, to: of SYSTEMS.
    bound: of the median over rounds.
  """

  case: str
  what: str
  system: str
  to: str
  bound: float


_WITH_PEER = tuple(
  case for case in CASES if PEER in case.systems and case.task == "dpo"
)
_AT_LEAST = {HEADLINE: 5.0, CACHED: 5.5, TLDR: 8.0}
GOALS = (
  *(
    Goal(case.name, "pairs", "ours", PEER, _AT_LEAST.get(case, 1.0))
    for case in _WITH_PEER
  ),
  Goal(PADDED.name, "pairs", "ours", "padded", 3.0),
  Goal(TUNIX.name, "pairs", "ours", "tunix", 3.5),
  *(Goal(case.name, "memory", "ours", PEER, 0.8) for case in _WITH_PEER),
  # Each of its steps trains four points: at most 0.8 × the time of four runs,
  # which is less than 3.3 × that of one.
  Goal(SWEEP.name, "pairs", "ours4", "ours", 1 / 0.8),
  *(
    Goal(case.name, "pairs", "ours", case.systems[1], 3.0) for case in ON_POLICY
  ),
)
