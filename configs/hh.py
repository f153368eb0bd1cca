"""The paper's single-turn dialogue, on Anthropic's helpful and harmless data.

    dpo-jax train --config hh

Pythia-2.8B, which no SFT model comes with, so that the reference is
Preferred-FT, trained on the chosen replies (arXiv:2305.18290 section 6.2). The
stages, each skipped where it is done: Preferred-FT, a reward model, DPO; for
256 prompts of one turn, samples of each and of the model itself behind two
examples, at three temperatures, and Best-of-N. What a judge compares with the
chosen replies is samples/METHOD/T=…/completions.jsonl. A plan of tokens, FLOPs,
memory and hours is printed first. `:stage=NAME` is the config of one stage;
`:model=` and `:data=` take another model, and another folder or data set of the
columns chosen and rejected with the splits train and test; `:fsdp=` says over
how many devices the parameters are split, 4 unless named; `:smoke` runs all
stages in small, without the network.

Not measured: it takes accelerators. The authors' repository trained its SFT in
about 1 h 30 min and DPO in 2 h 45 min on four A100 of 80 GB.
"""

from dpo_jax.configs import common, paper

MODEL = "hf:EleutherAI/pythia-2.8b"
DATA = "hf:Anthropic/hh-rlhf"
TEMPERATURES = (0.25, 0.7, 1.0)
BEST_OF = (1, 4, 16, 64, 128)
METHODS = ("base", "preferred", "dpo")
BETA = 0.1
SHOTS = 2


def get_config(arg=None):
  a = paper.arguments(
    *(arg, {"model": "micro", "data": "toy"}),
    root="runs/hh",
    fsdp=4,
    model=MODEL,
    data=DATA,
    policy="dpo",  # of stage=samples
  )
  steps = (
    ("train", "preferred"),
    ("train", "reward"),
    ("train", "dpo"),
    *paper.sampled(METHODS, TEMPERATURES, a),
    *paper.best_of_each(TEMPERATURES, a),
  )
  plan = common.planned(
    a.fsdp,
    # Records, and mean tokens of Pythia's (about, by the bytes of the set).
    (paper.split(DATA, "train"), 160_800, 100, 78),
  )
  return paper.task(a, STAGES, steps, plan, "data")


def one_turn(spec, name):
  """The dialogues of a split in which the human speaks once."""
  where = paper.split(spec, name)
  found = where.removeprefix("hf:")
  return where if found == where else f"one_turn:{found}"


def policy(a, folder):
  c = paper.policy(a, folder)
  c.data.long_prompt = "keep_end"
  c.sample.max_new_tokens = c.data.max_completion_length
  c.sample.count = 256
  return c


def pairs(a, folder):
  c = policy(a, folder)
  c.data.train = paper.split(a.data, "train")
  c.data.eval = paper.split(a.data, "test")
  return c


def preferred(a):
  return paper.sft(pairs(a, "preferred"))


def reward(a):
  return paper.reward(paper.after(pairs(a, "reward"), a, "preferred"), 1.0)


def dpo(a):
  c = paper.after(pairs(a, "dpo"), a, "preferred")
  return paper.dpo(c, BETA, BETA)


def samples(a):
  """Of a method at a temperature; of the model itself, 2-shot, as "base"."""
  c = paper.samples(policy, a, "preferred")
  c.sample.prompts = one_turn(a.data, "test")
  if a.policy == "base":
    c.data.max_prompt_length = 1024  # with the examples
    c.sample.shots = SHOTS
    c.sample.shots_from = one_turn(a.data, "train")
    c.sample.stop = ("\n\nHuman:",)
  return c


def best_of(a):
  """Best of N of the reference, by the learned reward."""
  c = paper.best_of(policy, a, "preferred", BEST_OF)
  c.sample.prompts = one_turn(a.data, "test")
  return c


STAGES = {
  "preferred": preferred,
  "reward": reward,
  "dpo": dpo,
  "samples": samples,
  "best_of": best_of,
}
