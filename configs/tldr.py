"""The paper's summaries of Reddit posts, at several temperatures.

    dpo-jax train --config tldr

GPT-J 6B learns to write the "TL;DR:" of a post from demonstrations, then from
comparisons of such summaries (arXiv:2305.18290 section 6.2). The stages, each
skipped where it is done: SFT, Preferred-FT, a reward model, DPO, PPO; samples
of each method for 256 posts at five temperatures, and Best-of-N. What a judge
compares with people's own summaries is samples/METHOD/T=…/completions.jsonl. A
plan of tokens, FLOPs, memory and hours is printed first. `:stage=NAME` is the
config of one stage; `:model=hf:EleutherAI/pythia-2.8b` takes another model,
`:sft=` and `:data=` other demonstrations (columns prompt and label, splits
train, valid and test) and comparisons (prompt, chosen and rejected; train and
valid1), `:fsdp=` says over how many devices the parameters are split, 8 unless
named; `:smoke` runs all stages in small, without the network.

Not measured: it takes accelerators. A model whose weights on the hub are
pickled must be converted once, and the error says how. A prompt keeps 448 of
the 512 tokens, since its end asks for the summary, which has 48 at most by how
the data were made.
"""

from dpo_jax.configs import common, paper

MODEL = "hf:EleutherAI/gpt-j-6b"
SFT = "hf:CarperAI/openai_summarize_tldr"
DATA = "hf:CarperAI/openai_summarize_comparisons"
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
BEST_OF = (64, 128, 256)
METHODS = ("base", "sft", "preferred", "dpo", "ppo")
BETA = 0.5
PROMPT, SUMMARY = 448, 64  # tokens


def get_config(arg=None):
  a = paper.arguments(
    *(arg, {"model": "micro", "data": "toy", "sft": "toy"}),
    root="runs/tldr",
    fsdp=8,
    model=MODEL,
    data=DATA,
    policy="dpo",  # of stage=samples
    sft=SFT,
  )
  steps = (
    ("train", "sft"),
    ("train", "preferred"),
    ("train", "reward"),
    ("train", "dpo"),
    ("train", "ppo"),
    *paper.sampled(METHODS, TEMPERATURES, a),
    *paper.best_of_each(TEMPERATURES, a),
  )
  plan = common.planned(
    a.fsdp,
    # Records, and mean tokens of GPT-J's (about, by the bytes of the sets).
    (paper.split(SFT, "train"), 116_722, 320, 35),
    (paper.split(SFT, "test"), 6_553, 320, 35),
    (paper.split(DATA, "train"), 92_534, 320, 38),
  )
  return paper.task(a, STAGES, steps, plan, "data", "sft")


def policy(a, folder):
  c = paper.policy(a, folder)
  c.data.max_prompt_length, c.data.max_completion_length = PROMPT, SUMMARY
  c.data.long_prompt = "keep_end"  # which asks for the summary
  c.sample.max_new_tokens = SUMMARY
  c.sample.count = 256
  return c


def sft(a):
  c = paper.sft(policy(a, "sft"))
  c.data.train = paper.split(a.sft, "train")
  c.data.eval = paper.split(a.sft, "valid")
  return c


def method(a, folder):
  """From the SFT policy, on the comparisons."""
  c = paper.after(policy(a, folder), a, "sft")
  c.data.train = paper.split(a.data, "train")
  c.data.eval = paper.split(a.data, "valid1")
  c.eval.every = 1500  # at the end alone: there are 33,082
  return c


def preferred(a):
  return paper.sft(method(a, "preferred"))


def reward(a):
  return paper.reward(method(a, "reward"), 1.0)


def dpo(a):
  return paper.dpo(method(a, "dpo"), BETA, BETA)


def ppo(a):
  c = paper.ppo(method(a, "ppo"), f"reward:{a.root}/reward", 6.0)
  c.data.train, c.data.eval = paper.split(a.sft, "train"), None
  return c


def samples(a):
  """Of a method at a temperature; of the model itself, zero-shot, as "base"."""
  c = paper.samples(policy, a, "sft")
  c.sample.prompts = paper.split(a.sft, "test")
  return c


def best_of(a):
  """Best of N of the SFT policy, by the learned reward."""
  c = paper.best_of(policy, a, "sft", BEST_OF)
  c.sample.prompts = paper.split(a.sft, "test")
  return c


STAGES = {
  "sft": sft,
  "preferred": preferred,
  "reward": reward,
  "dpo": dpo,
  "ppo": ppo,
  "samples": samples,
  "best_of": best_of,
}
