"""Win rates of a policy's samples, pair by pair, as a judge sees them.

    export OPENAI_API_KEY=…
    dpo-jax judge --config judge:prompt=concise \\
      --config.judge.samples=runs/dpo/completions.jsonl \\
      --config.judge.against=held_out.jsonl \\
      --config.judge.by=openai:gpt-4.1 --workdir runs/judged

`prompt=summary` asks which summary covers more of what matters, `concise` (the
paper's choice for its main results) for one without needless detail as well,
`dialogue` which reply is more helpful: the questions of arXiv:2305.18290
appendix C.2 in other words. With `--config.judge.by=vader`, or any other scorer
of eval/rewards.py, nothing leaves the machine: the higher score wins.
`--config.judge.by=form:form.csv` writes a form for people, and reads it once it
is filled in.
"""

from ml_collections import config_dict

from dpo_jax.configs import common

optional = config_dict.placeholder  # a field that may be None

# (question, what stands before the letter of the verdict). What the answer must
# look like is said behind each question, see eval/judge/question.py.
PROMPTS = {
  "summary": (
    "Here are a post of an internet forum and two summaries of it, A and B. "
    "Which of them tells more of what matters in the post?\n\n"
    "{prompt}\n\n{a}\n\n{b}",
    "Preferred",
  ),
  "concise": (
    "Here are a post of an internet forum and two summaries of it, A and B. "
    "Which of them tells more of what matters in the post, and leaves out the "
    "details that do not? The better summary is exact and short.\n\n"
    "{prompt}\n\n{a}\n\n{b}",
    "Preferred",
  ),
  "dialogue": (
    "Here are what somebody said to a chat assistant and two replies of "
    "assistants, A and B. Which of them helps that person more?\n\n"
    "{prompt}\n\n{a}\n\n{b}",
    "More helpful",
  ),
}


def _may_be_none(value):
  """A field with a value that a command may set to None."""
  field = optional(type(value))
  field.set(value)
  return field


def get_config(arg=None):
  arg = common.parse_arg(arg, prompt="concise")
  template, verdict = common.choose(arg.prompt, PROMPTS)
  c = config_dict.ConfigDict()
  c.workdir = optional(str)  # of the results, or None: --workdir
  c.judge = j = config_dict.ConfigDict()
  # Files of what policies wrote, completions.jsonl or samples.jsonl: the first
  # completion of each prompt that all of them have.
  j.samples = ()
  j.against = optional(str)  # such a file, or data, of which the best answer
  # The judge: openai:MODEL, form:FILE, or a scorer of eval/rewards.py.
  j.by = optional(str)
  j.template = template  # question with {prompt}, {a} and {b}, each once
  j.verdict = verdict  # what stands before the letter: "Preferred: A"
  j.count = optional(int)  # prompts, the first ones; None: all
  j.agree_with = ()  # judgements.jsonl of other judges of the same pairs
  j.seed = 0  # of the intervals, and of the sides in a form
  j.form_key = optional(str)  # which side is whose; None: beside the form

  # Of openai:MODEL, as all that follows: an endpoint that speaks OpenAI's API.
  j.base_url = "https://api.openai.com/v1"
  # Name of the environment variable that has the key; None: it needs none.
  j.key_from = _may_be_none("OPENAI_API_KEY")
  j.temperature = _may_be_none(0.0)  # None: the endpoint's own
  j.max_tokens = _may_be_none(512)  # of an answer; None: as many as it likes
  j.timeout = 60.0  # seconds for an answer
  j.concurrency = 8  # questions at once
  j.retries = 6  # of a question, after ever longer waits
  # Folder of answers, by their questions; None: ~/.cache/dpo_jax/answers.
  j.cache = optional(str)
  j.price_in = optional(float)  # of a million tokens asked; None: not counted
  j.price_out = optional(float)  # of a million tokens answered
  j.budget = optional(float)  # cost at which a command asks no more
  j.budget_tokens = optional(int)  # the same in tokens, asked and answered
  return c
