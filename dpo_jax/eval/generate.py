"""Completions of a policy for the prompts of a source."""

from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.data.read import fields, pairs, sources
from dpo_jax.data.tokens import chat, tokenize
from dpo_jax.eval import prompting
from dpo_jax.ops import reduce
from dpo_jax.parallel import mesh as mesh_lib

# Batches whose prompts are sorted by length, and drawn before any is written.
_WINDOW = 8


class Draw(NamedTuple):
  """One completion.

  Attributes:
    id: of the draw: prompt number · draws + k.
    prompt: text, without what sample.template and sample.shots put around it.
    prompt_ids: what the model continued: as training has them, or with that.
    completion: text, up to its end or to one of sample.stop.
    ids: as drawn, with the end if it came; the EOS stands for a stop text.
    finished: whether an end came within the limit, or a text of sample.stop.
    logps: of each of `ids` as it was drawn, in nats.
  """

  id: int
  prompt: str
  prompt_ids: list[int]
  completion: str
  ids: list[int]
  finished: bool
  logps: list[float] = ()


def prompts(setup):
  """The prompts of `sample.prompts`: list of (text, ids), seeded and distinct.

  With sample.template or sample.shots the ids are of the text with these around
  it, which the model continues; the text is the bare one, which scorers read.

  Raises: ValueError if there is no source of prompts, or none is usable.
  """
  options = setup.sample
  if options.prompts is None:
    raise ValueError(
      "sample.prompts is not set; give a source of prompts, for example "
      "--config.sample.prompts=my.jsonl"
    )
  if any(w != 1 for w, _ in sources.parse(options.prompts, "sample.prompts")):
    raise ValueError("sample.prompts: weights have no effect; leave them out")
  policy = sources.Policy(setup.data.bad_records)
  form = "prompt" if options.prefix is None else "sft"
  records = sources.load(options.prompts, form, policy, "sample.prompts")
  of = {}  # a record of each prompt
  if options.prefix is None:
    apply_template = setup.tokenizer.apply_template
    for record in records:
      try:
        with fields.at(record.origin):
          of.setdefault(chat.prompt(record, apply_template), record)
      except fields.BadRecord as error:
        policy.bad(error)
  else:
    sources.refuse_messages(records, "sample.prefix")
    encode, decode = setup.tokenizer.encode, setup.tokenizer.decode
    whole = [record.prompt + record.completions[0] for record in records]
    cut = pairs.beginnings(whole, encode, decode, options.prefix, options.seed)
    for index, text in cut:
      templated = not records[index].bos
      of.setdefault(chat.Prompt(text, templated), records[index])
  texts = list(of)
  order = np.random.default_rng(options.seed).permutation(len(texts))
  chosen = [texts[i] for i in order[: options.count]]
  out = prompting.encoded(setup, [(p, of[p]) for p in chosen], policy)
  if not out:
    raise ValueError(
      f"sample.prompts = {options.prompts}: no usable prompt (skipped: "
      f"{policy.skipped})"
    )
  return out


def check(setup, scorers, given):
  """Raises ValueError for prompts that a scorer cannot read, drawn or not.

  Those of a chat template must be of the template that its model knows.

  Args: base.Setup of the policy; list of rewards.Scorer; list of (text, ids),
    as `prompts` returns.
  """
  texts, ours = [text for text, _ in given], setup.tokenizer.apply_template
  for scorer in scorers:
    theirs = getattr(scorer.score, "template", None)
    if ours is not None and theirs is not None:
      _check_template(scorer.name, ours, theirs, texts)
    reads = getattr(scorer.score, "check", None)
    if reads is not None:
      reads(texts)


def _check_template(name, ours, theirs, texts):
  """Raises ValueError for texts of one template where another is known."""
  pairs = zip(chat.forms(ours), chat.forms(theirs), strict=True)
  other = next((pair for pair in pairs if pair[0] != pair[1]), None)
  if other is not None and any(chat.wrote(ours, text) for text in texts):
    raise ValueError(
      f"scorer {name}: the prompts are written by the chat template of the "
      f"policy's tokenizer, as {other[0]!r:.200}, and its model knows another, "
      f"{other[1]!r:.200}: take a reward model of the policy's template, or "
      "give both tokenizers the same 'chat_template'"
    )


def draws(setup, params, given, *, skip=0, first=0, room=None):
  """Yields batches of Draws, in order.

  A completion depends on its prompt, its id and sample.seed, not on the batch
  it is drawn in, so a run that stopped goes on with `skip`. Several processes
  draw together, and each yields all.

  Args:
    setup: base.Setup.
    params: placed parameters of the policy.
    given: list of (text, ids), as `prompts` returns.
    skip: draws that are there already.
    first: number of the first prompt.
    room: tokens that a prompt may have; None: those of the longest. It is a
      shape, so what draws again and again says it once for all.
  """
  options = setup.sample
  ways = mesh_lib.row_parallelism(setup.mesh)
  size = -(-options.batch_size // ways) * ways
  together = _together(options.draws, size, ways, skip)
  work = [
    _Prompt(n * options.draws + k, text, ids)
    for n, (text, ids) in enumerate(given, first)
    for k in range(0, options.draws, together)
  ][skip // together :]
  longest = room or max(len(ids) for _, ids in given)
  lengths = [len(prompt.ids) for prompt in work]
  turns, lengths = _plan(lengths, longest, size // together)
  ready, number = {}, first * options.draws + skip
  total = (first + len(given)) * options.draws
  for turn, length in zip(turns, lengths, strict=True):
    some = [work[place] for place in turn]
    drawn = _drawn(setup, params, some, length, size // together, together)
    ready |= {draw.id: draw for draw in drawn}
    while batch := _next(ready, number, size, total):
      number += len(batch)
      yield batch


class _Prompt(NamedTuple):
  """A prompt, and the id of the first of the draws made of it together."""

  first: int
  text: str
  ids: list[int]


def _together(draws, size, ways, skip):
  """How many draws of a prompt share one pass over it.

  As many as fill batches evenly, on each of `ways` devices, from `skip` on.
  """
  return next(
    k
    for k in range(draws, 0, -1)
    if not (draws % k or size % (k * ways) or skip % k)
  )


def _plan(lengths, longest, size):
  """Batches of prompts of like length: (places of each, length of each).

  Where there are batches enough to be worth a compilation more, those of
  `_WINDOW` batches are sorted, and padded to the longest prompt of all, half of
  it or a quarter. They come in order after each window.

  Args:
    lengths: of the prompts, in order.
    longest: of all prompts, those of an earlier run among them.
    size: prompts of a batch.
  """
  count = len(lengths)
  padded, window = [longest], size
  if count >= _WINDOW * size:
    rounded = (-(-longest // (8 * part)) * 8 for part in (4, 2))
    padded = [*(x for x in rounded if x < longest), longest]
    window = _WINDOW * size if len(padded) > 1 else size
  turns = []
  for start in range(0, count, window):
    places = range(start, min(start + window, count))
    order = sorted(places, key=lambda place: lengths[place])
    turns += [order[at : at + size] for at in range(0, len(order), size)]
  needed = [max(lengths[place] for place in turn) for turn in turns]
  return turns, [next(x for x in padded if x >= n) for n in needed]


def _next(ready, number, size, total):
  """The batch of draws from `number` on, taken from `ready`; [] if not all."""
  ids = range(number, min(number + size, total))
  return [ready.pop(i) for i in ids] if all(i in ready for i in ids) else []


def _drawn(setup, params, some, length, size, together):
  """The Draws of one batch: `together` of each of up to `size` _Prompts."""
  options = setup.sample
  padded = some + [some[-1]] * (size - len(some))
  tokens = np.zeros((size, length), np.int32)
  for row, prompt in zip(tokens, padded, strict=True):
    row[: len(prompt.ids)] = prompt.ids
  lengths = np.asarray([len(prompt.ids) for prompt in padded], np.int32)
  ids = np.asarray([p.first + k for p in padded for k in range(together)])
  sharding = NamedSharding(setup.mesh, PartitionSpec(reduce.ROWS))
  rows = [
    jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    for x in (tokens, lengths, ids.astype(np.int32))
  ]
  with jax.set_mesh(setup.mesh):
    out = setup.programs.sample(
      params,
      *rows,
      jax.random.key(options.seed),
      max_new_tokens=options.max_new_tokens,
      temperature=options.temperature,
      top_p=options.top_p,
      end_ids=setup.tokenizer.end_ids,
      vocab_size=setup.tokenizer.vocab_size,
      stops=prompting.endings(setup.tokenizer, options.stop),
    )
  if jax.process_count() > 1:
    out = multihost_utils.process_allgather(out, tiled=True)
  out = jax.device_get(out)
  batch = []
  for row in range(len(some) * together):
    prompt = some[row // together]
    drawn = out.tokens[row, : out.lengths[row]].tolist()
    text = tokenize.continuation(setup.tokenizer, prompt.ids, drawn)
    logps = out.logps[row, : out.lengths[row]].tolist()
    about = prompt.text, prompt.ids, text, drawn, bool(out.finished[row])
    batch.append(Draw(int(ids[row]), *about, logps))
  return batch
