"""Scorers of models that this project computes: of run folders and the hub."""

import functools
import math
import re

import jax
import numpy as np
from etils import epath

from dpo_jax import store
from dpo_jax.config import saved
from dpo_jax.data.read import sources
from dpo_jax.data.tokens import tokenize
from dpo_jax.run import build, classifier, forward, gain, trained
from dpo_jax.train import checkpoint

# What chat templates write around turns.
_MARKUP = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")


def implicit(folder):
  """β·(log π − log π_ref) of a run trained here."""
  setup = _prepared(folder)
  beta = setup.asked["loss"].get("beta")
  if beta is None:
    raise ValueError(f"scorer implicit:{folder}: its loss has no β")
  # As much as the model can read.
  room = setup.model.config.max_positions - setup.data.max_prompt_length
  limits = setup.data._replace(max_completion_length=room)
  ref = trained.initial(setup)
  params = trained.restored(setup, ref, folder)
  policy = setup.trained.model(ref, params)

  def of(examples):
    loader = forward.loader_of(setup, examples)
    ratios = np.zeros(len(examples))
    for params, sign in ((policy, 1.0), (ref, -1.0)):
      for index, logps in forward.token_logps(setup, params, loader):
        ratios[index] += sign * math.fsum(logps)
    return beta * ratios

  return _scorer(setup, limits, f"implicit:{folder}", of)


def reward(argument):
  """A reward model trained here, of its folder, or "hf:NAME", of the hub.

  Of a sweep's folder it is the point of the best held-out accuracy.
  """
  kind, colon, name = argument.partition(":")
  if colon and kind == "hf":
    setup, params, pad = classifier.published(name)
  else:
    setup, params, pad = *_of_run(best_point(argument)), None
  longest = setup.model.config.max_positions
  # Cut ones are counted, and refused with what this scorer calls itself.
  limits = setup.data._replace(
    max_prompt_length=longest,
    max_completion_length=longest,
    long_prompt="keep_end",
  )

  def of(examples):
    if pad is not None:
      examples = [_without_end(example, pad) for example in examples]
    scores = np.zeros(len(examples))
    loader = forward.loader_of(setup, examples)
    for index, values in forward.rewards(setup, params, loader):
      scores[index] = values[0]
    return scores

  return _scorer(setup, limits, f"reward:{argument}", of)


def best_point(folder):
  """The folder of the point of a sweep that ranks held-out pairs best.

  The first of those; a folder of no sweep is returned as it is.

  Raises: ValueError for a sweep none of whose points was evaluated.
  """
  path = epath.Path(folder)
  if not (path / "sweep.json").exists():
    return folder
  accuracies = {}
  for point in store.read_json(path / "sweep.json")["points"]:
    own = store.inside(path, point["folder"], path / "sweep.json")
    evaluation = own / "evaluation.json"
    if evaluation.exists():
      measured = store.read_json(evaluation).get("comparisons", {})
      accuracies[point["folder"]] = measured.get("rewards/accuracies")
  known = {k: x for k, x in accuracies.items() if x is not None}
  if not known:
    raise ValueError(
      f"scorer reward:{folder} is a sweep, and no point of it has a held-out "
      "accuracy; set data.eval, or name the folder of a point"
    )
  return str(path / max(known, key=known.get))


def _of_run(folder):
  """(Setup, parameters) of a reward model's run, gain and bias in its head."""
  setup = _prepared(folder)
  if "reward" not in setup.trained.heads:
    raise ValueError(
      f"scorer reward:{folder}: that run trained no reward model (its algo is "
      f"{setup.asked['algo']!r}); of a policy take implicit:{folder}"
    )
  base = trained.initial(setup) if setup.trained.on_base else None
  params = trained.restored(setup, base, folder)
  step = checkpoint.latest_step(folder)
  found = gain.read(folder, setup.asked, step)
  policy = setup.trained.policy(base, params)
  return setup, {**policy, "reward": gain.folded(policy["reward"], *found)}


def _prepared(folder):
  """The Setup of a run; the precision of this process stays."""
  config = saved.saved_config(folder).lock()
  ours = jax.config.jax_default_matmul_precision
  try:
    return build.prepare_model(config)
  finally:
    jax.config.update("jax_default_matmul_precision", ours)


def _without_end(example, pad):
  """The example without its last tokens that are `pad`, but for its first.

  transformers reads the last token that is none.
  """
  (ids,) = example.completions
  ids = list(ids)
  while len(ids) > 1 and ids[-1] == pad:
    ids.pop()
  return example._replace(completions=(ids,))


def _scorer(setup, limits, name, of):
  """The score function of a model here, see rewards.Scorer.

  Args:
    setup: base.Setup of the model.
    limits: its `data`, with the lengths that it reads.
    name: the scorer's, for messages.
    of: list of comparisons.Example of one completion each -> f64[n].
  """
  encoded = functools.partial(_encoded, setup=setup, limits=limits, name=name)

  def score(prompts, completions):
    texts = enumerate(zip(prompts, completions, strict=True))
    return scored(
      [sources.Record(p, (c,), (), f"text {i}") for i, (p, c) in texts]
    )

  def of_draws(draws):
    """Of the tokens as drawn: a template's prompt may have no BOS, a turn may
    end in another token than the EOS, and a draw at its limit has no end."""
    tokenizer = setup.tokenizer
    if any(
      tokenize.continuation(tokenizer, d.prompt_ids, d.ids) != d.completion
      for d in draws
    ):  # they are another tokenizer's
      _refuse_markup(tokenizer, draws, name)
      return score([d.prompt for d in draws], [d.completion for d in draws])
    return scored(
      [
        sources.Record(
          *(d.prompt, (d.completion,), (), f"draw {d.id}"),
          tokens=(d.ids,),
          bos=d.prompt_ids[0] == tokenizer.bos_id,
        )
        for d in draws
      ]
    )

  def scored(records):
    examples = encoded(records)
    with jax.default_matmul_precision(setup.precision):
      return of(examples)

  def check(prompts):
    bare = sources.Record("", ("",), (), "a prompt", bos=False)
    encoded([bare._replace(prompt=prompt) for prompt in prompts])

  score.of_draws, score.check = of_draws, check
  score.template = setup.tokenizer.apply_template
  return score


def _encoded(records, *, setup, limits, name):
  """The examples of records; raises ValueError for one that would be cut."""
  if not records:
    return []
  examples, changed = tokenize.encode(
    records, setup.tokenizer, limits, sources.Policy("error")
  )
  longest = setup.model.config.max_positions
  over = sum(
    len(e.prompt) + max(map(len, e.completions)) > longest for e in examples
  )
  cut = max(changed["completion cut"] + changed["prompt cut"], over)
  if cut:
    raise ValueError(
      f"scorer {name}: {cut} texts are longer than its model can read: "
      f"{longest} tokens of prompt and completion"
    )
  return examples


def _refuse_markup(tokenizer, draws, name):
  """Refuses prompts of a chat template whose marks a tokenizer has not."""
  marks = {m for d in draws for m in _MARKUP.findall(d.prompt)}
  marks = sorted(marks)
  for mark, ids in zip(marks, tokenizer.encode(marks), strict=True):
    if len(ids) > 1:
      raise ValueError(
        f"scorer {name}: the prompts are written by another chat template than "
        f"its model knows: {mark!r} is no token of its tokenizer; take a "
        "reward model of the policy's family, or prompts of plain text"
      )
