"""Draws of a policy as a file of its folder, scored, and compared."""

import hashlib
import json

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dpo_jax import lines, progress, store
from dpo_jax.data.read import fields, files, pairs
from dpo_jax.eval import best_of, generate, prompting, rewards, statistics


def write(setup, params, identity, workdir):
  """Draws completions into `completions.jsonl`, and comparisons of them.

  A run that stopped goes on where it was; what is complete is left alone. With
  sample.labels other than "none" the comparisons go to `pairs.jsonl`, and with
  sample.best_of what the best of them are worth to `best_of.json`. Several
  processes draw and score together, in a folder that all see; the first writes.

  Args:
    setup: base.Setup.
    params: placed parameters of the policy.
    identity: plain dict of what the draws depend on.
    workdir: folder.
  Returns: list of dicts, one a draw, as in the file.
  Raises: ValueError if the folder holds draws of something else.
  """
  options, first = setup.sample, jax.process_index() == 0
  scorers = rewards.load_all(options.scorers)
  if options.labels != "none" and not scorers:
    raise ValueError("sample.labels needs a scorer: set sample.scorers")
  workdir = epath.Path(workdir)
  path, given = workdir / "completions.jsonl", generate.prompts(setup)
  generate.check(setup, scorers, given)
  digest = hashlib.blake2b(repr(given).encode(), digest_size=8).hexdigest()
  ends = setup.tokenizer.end_ids
  identity = {**identity, "prompts": digest}
  if len(ends) > 1:  # the EOS alone is the tokenizer's
    identity["ends"] = ends
  total = len(given) * options.draws
  rows = _agreed(path, identity, options.batch_size, total)
  if len(rows) < total:
    written = lines.Writer(path)
    batches = generate.draws(setup, params, given, skip=len(rows))
    count = -(-(total - len(rows)) // options.batch_size)
    for batch in progress.over(batches, count, "batches drawn", loud=first):
      batch = prompting.stopped(setup, batch)
      new = describe(batch, scorers, options.draws, setup.tokenizer.bos_id)
      if first:
        written.append("".join(json.dumps(row) + "\n" for row in new))
      rows += new
  if not first:
    return rows
  lines.join(path)
  if options.best_of:
    measured = best_of.measure(rows, options.best_of, ranking(options, scorers))
    text = json.dumps(statistics.plain(measured), indent=2) + "\n"
    store.write(workdir / "best_of.json", text.encode())
    print(best_of.table(measured))
  if options.labels != "none":
    reward = f"reward/{scorers[0].name}"
    labelled = [{**row, "reward": row[reward]} for row in rows]
    out, left_out = pairs.records(
      *(labelled, options.labels, options.seed), scale=options.label_scale
    )
    text = "".join(json.dumps(record) + "\n" for record in out)
    store.write(workdir / "pairs.jsonl", text.encode())
    count = sum(len(record["pairs"]) for record in out)
    missing = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
    print(
      f"{count} comparisons of {len(out)} prompts in {workdir / 'pairs.jsonl'}"
      f"{f' (left out: {missing})' if missing else ''}"
    )
  return rows


def ranking(options, scorers):
  """Key of the reward that ranks draws, of sample.rank_by.

  Args: config.sample; list of rewards.Scorer, of its scorers.
  """
  place = 0
  if options.rank_by is not None:
    place = options.scorers.index(options.rank_by)
  return f"reward/{scorers[place].name}"


def describe(batch, scorers, count, bos_id):
  """Draws as plain dicts, with their rewards.

  With `count` draws a prompt, "id" numbers the prompts. "bos" is False where
  the prompt begins without the BOS that there is: whoever reads the text again
  must put none in front.
  """
  scores = {
    f"reward/{scorer.name}": rewards.of_draws(scorer, batch)
    for scorer in scorers
  }
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


def _agreed(path, identity, batch_size, total):
  """`_continue` of the first process, whose file the others read.

  Raises: ValueError in all of them if it does in one, or they would wait.
  """
  rows, error = [], None
  if jax.process_index() == 0:
    try:
      rows = _continue(path, identity, batch_size, total)
    except (ValueError, OSError) as caught:
      error = caught
  told = np.asarray([len(rows), error is not None], np.int32)
  if jax.process_count() > 1:
    told = multihost_utils.broadcast_one_to_all(told)
  if error is not None:
    raise error
  if told[1]:
    raise ValueError(f"{path}: the first process cannot go on, and says why")
  if jax.process_index() > 0:
    rows = [row for _, row in files.jsonl(path)][: int(told[0])]
  return rows


def _continue(path, identity, batch_size, total):
  """The rows of whole batches that are there; the file is cut to them."""
  about, resumed = path.parent / "completions.json", lines.exists(path)
  if resumed:
    saved = store.read_json(about) if about.exists() else None
    if saved != json.loads(json.dumps(identity)):
      raise ValueError(
        f"{path} was drawn from another policy, prompts or settings; delete "
        "it, or use a new --workdir (and name the policy's run by "
        "--config.init_from)"
      )
  store.write(about, json.dumps(identity).encode())
  rows = []
  for _, row in files.jsonl(path) if resumed else ():
    if isinstance(row, fields.BadRecord):
      break  # cut short by a kill; a draw has its place by its number
    rows.append(row)
  if len(rows) < total:
    rows = rows[: len(rows) // batch_size * batch_size]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  lines.replace(path, text.encode())
  return rows
