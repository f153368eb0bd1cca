"""Completions of a policy for the prompts of a source, scored and written."""

import hashlib
import json
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax import progress, store
from dpo_jax.data.read import fields, files, pairs, sources
from dpo_jax.data.tokens import chat, tokenize
from dpo_jax.eval import rewards
from dpo_jax.ops import reduce
from dpo_jax.parallel import mesh as mesh_lib

# Batches whose prompts are sorted by length, and drawn before any is written.
_WINDOW = 8


class Draw(NamedTuple):
  """One completion.

  Attributes:
    id: of the draw: prompt number · draws + k.
    prompt: text.
    prompt_ids: as training has them.
    completion: text.
    ids: as drawn, with the end if it came.
    finished: whether it came within the limit.
  """

  id: int
  prompt: str
  prompt_ids: list[int]
  completion: str
  ids: list[int]
  finished: bool


def prompts(setup):
  """The prompts of `sample.prompts`: list of (text, ids), seeded and distinct.

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
  if options.prefix is None:
    apply_template = setup.tokenizer.apply_template
    texts = []
    for record in records:
      try:
        with fields.at(record.origin):
          texts.append(chat.prompt(record, apply_template))
      except fields.BadRecord as error:
        policy.bad(error)
  else:
    sources.refuse_messages(records, "sample.prefix")
    encode, decode = setup.tokenizer.encode, setup.tokenizer.decode
    whole = [record.prompt + record.completions[0] for record in records]
    cut = pairs.beginnings(whole, encode, decode, options.prefix, options.seed)
    texts = [
      chat.Prompt(text, templated=not records[index].bos) for index, text in cut
    ]
  texts = list(dict.fromkeys(texts))
  order = np.random.default_rng(options.seed).permutation(len(texts))
  chosen = [texts[i] for i in order[: options.count]]
  out = tokenize.prompts(chosen, setup.tokenizer, setup.data, policy)
  if not out:
    raise ValueError(
      f"sample.prompts = {options.prompts}: no usable prompt (skipped: "
      f"{policy.skipped})"
    )
  return out


def check(scorers, given):
  """Raises ValueError for prompts that a scorer cannot read, drawn or not.

  Args: list of rewards.Scorer; list of (text, ids), as `prompts` returns.
  """
  for scorer in scorers:
    reads = getattr(scorer.score, "check", None)
    if reads is not None:
      reads([text for text, _ in given])


def draws(setup, params, given, *, skip=0):
  """Yields batches of Draws, in order.

  A completion depends on its prompt, its id and sample.seed, not on the batch
  it is drawn in, so a run that stopped goes on with `skip`. Several processes
  draw together, and each yields all.

  Args:
    setup: base.Setup.
    params: placed parameters of the policy.
    given: list of (text, ids), as `prompts` returns.
    skip: draws that are there already.
  """
  options = setup.sample
  ways = mesh_lib.row_parallelism(setup.mesh)
  size = -(-options.batch_size // ways) * ways
  together = _together(options.draws, size, ways, skip)
  work = [
    _Prompt(n * options.draws + k, text, ids)
    for n, (text, ids) in enumerate(given)
    for k in range(0, options.draws, together)
  ][skip // together :]
  longest = max(len(ids) for _, ids in given)
  lengths = [len(prompt.ids) for prompt in work]
  turns, lengths = _plan(lengths, longest, size // together)
  ready, number = {}, skip
  for turn, length in zip(turns, lengths, strict=True):
    some = [work[place] for place in turn]
    drawn = _drawn(setup, params, some, length, size // together, together)
    ready |= {draw.id: draw for draw in drawn}
    while batch := _next(ready, number, size, len(given) * options.draws):
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
    )
  if jax.process_count() > 1:
    out = multihost_utils.process_allgather(out, tiled=True)
  out = jax.device_get(out)
  batch = []
  for row in range(len(some) * together):
    prompt = some[row // together]
    drawn = out.tokens[row, : out.lengths[row]].tolist()
    text = tokenize.continuation(setup.tokenizer, prompt.ids, drawn)
    about = prompt.text, prompt.ids, text, drawn, bool(out.finished[row])
    batch.append(Draw(int(ids[row]), *about))
  return batch


def write(setup, params, identity, workdir):
  """Draws completions into `completions.jsonl`, and comparisons of them.

  A run that stopped goes on where it was; what is complete is left alone. With
  sample.labels other than "none" the comparisons go to `pairs.jsonl`.

  Args:
    setup: base.Setup.
    params: placed parameters of the policy.
    identity: plain dict of what the draws depend on.
    workdir: folder.
  Returns: list of dicts, one a draw, as in the file.
  Raises: ValueError if the folder holds draws of something else.
  """
  if jax.process_count() > 1:
    raise ValueError("sampling runs in one process; sample the run afterwards")
  options = setup.sample
  scorers = rewards.load_all(options.scorers)
  if options.labels != "none" and not scorers:
    raise ValueError("sample.labels needs a scorer: set sample.scorers")
  workdir = epath.Path(workdir)
  path, given = workdir / "completions.jsonl", prompts(setup)
  check(scorers, given)
  digest = hashlib.blake2b(repr(given).encode(), digest_size=8).hexdigest()
  ends = setup.tokenizer.end_ids
  identity = {**identity, "prompts": digest}
  if len(ends) > 1:  # the EOS alone is the tokenizer's
    identity["ends"] = ends
  total = len(given) * options.draws
  rows = _continue(path, identity, options.batch_size, total)
  if len(rows) < total:
    batches = draws(setup, params, given, skip=len(rows))
    with path.open("a") as file:
      for batch in progress.over(
        batches, -(-(total - len(rows)) // options.batch_size), "batches drawn"
      ):
        new = describe(batch, scorers, options.draws, setup.tokenizer.bos_id)
        file.write("".join(json.dumps(row) + "\n" for row in new))
        file.flush()
        rows += new
  if options.labels != "none":
    first = f"reward/{scorers[0].name}"
    labelled = [{**row, "reward": row[first]} for row in rows]
    out, left_out = pairs.records(labelled, options.labels, options.seed)
    text = "".join(json.dumps(record) + "\n" for record in out)
    store.write(workdir / "pairs.jsonl", text.encode())
    count = sum(len(record["pairs"]) for record in out)
    missing = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
    print(
      f"{count} comparisons of {len(out)} prompts in {workdir / 'pairs.jsonl'}"
      f"{f' (left out: {missing})' if missing else ''}"
    )
  return rows


def describe(batch, scorers, count, bos_id):
  """Draws as plain dicts, with their rewards.

  With `count` draws a prompt, "id" numbers the prompts. "bos" is False where
  the prompt begins without the BOS that there is: whoever reads the text again
  must put none in front.
  """
  texts = [d.prompt for d in batch], [d.completion for d in batch]
  scores = {}
  for scorer in scorers:
    of_draws = getattr(scorer.score, "of_draws", None)
    made = scorer.score(*texts) if of_draws is None else of_draws(batch)
    scores[f"reward/{scorer.name}"] = made
  return [
    {
      "id": draw.id // count,
      "prompt": draw.prompt,
      **({} if bos_id in (None, draw.prompt_ids[0]) else {"bos": False}),
      "completion": draw.completion,
      "finished": draw.finished,
      "length": len(draw.ids),
      "tokens": draw.ids,
      **{name: round(float(values[i]), 6) for name, values in scores.items()},
    }
    for i, draw in enumerate(batch)
  ]


def _continue(path, identity, batch_size, total):
  """The rows of whole batches that are there; the file is cut to them."""
  about, resumed = path.parent / "completions.json", path.exists()
  if resumed:
    saved = store.read_json(about) if about.exists() else None
    if saved != json.loads(json.dumps(identity)):
      raise ValueError(
        f"{path} was drawn from another policy, prompts or settings; delete "
        "it, or use a new --workdir (and name the policy's run by "
        "--config.init_from)"
      )
  path.parent.mkdir(parents=True, exist_ok=True)
  about.write_text(json.dumps(identity))
  rows = []
  for _, row in files.jsonl(path) if resumed else ():
    if isinstance(row, fields.BadRecord):
      break  # cut short by a kill; a draw has its place by its number
    rows.append(row)
  if len(rows) < total:
    rows = rows[: len(rows) // batch_size * batch_size]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return rows
