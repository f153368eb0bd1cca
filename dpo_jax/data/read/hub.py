"""Hugging Face data sets, from the hub or from a folder."""

import re

from etils import epath

from dpo_jax import lookup
from dpo_jax.data.read import fields, public

_SPEC = re.compile(r"([^@:]+)(?:@([^:]+))?(?::(.+))?")


def load(argument):
  """The datasets.Dataset of NAME_OR_FOLDER[@CONFIG][:SPLIT].

  Args:
    argument: what follows "hf:"; the split is "train" if none is named.
  Raises: ValueError for what does not load, or a split that is not there.
  """
  match = _SPEC.fullmatch(argument)
  if match is None:
    raise ValueError(
      f"source 'hf:{argument}' must be hf:NAME_OR_FOLDER[@CONFIG][:SPLIT]"
    )
  name, config, split = match.groups()
  import datasets  # here, as it takes a second

  folder = epath.Path(name).expanduser()
  if name.startswith((".", "/", "~")) and not folder.exists():
    raise ValueError(f"source 'hf:{argument}': there is no folder {folder}")
  saved = any(
    (folder / file).exists() for file in ("dataset_dict.json", "state.json")
  )
  if saved and config is not None:
    raise ValueError(
      f"source 'hf:{argument}': {folder} was saved without configurations; "
      f"leave '@{config}' out"
    )
  try:
    if saved:
      found = datasets.load_from_disk(str(folder))
    else:
      found = datasets.load_dataset(
        str(folder) if folder.exists() else name,
        config,
        trust_remote_code=False,  # before version 4 a data set could bring code
      )
  except Exception as error:  # the library raises anything
    reason = " ".join(str(error).split()).rstrip(".")
    raise ValueError(
      f"source 'hf:{argument}' cannot be loaded: {reason}. A data set of the "
      "hub needs the network once, then it is cached; or give a local folder"
    ) from error
  if isinstance(found, datasets.Dataset):
    if split not in (None, str(found.split)):
      raise ValueError(
        f"source 'hf:{argument}': {folder} holds one data set, not splits; "
        f"leave ':{split}' out"
      )
    return found
  return lookup.lookup(
    dict(found), split or "train", f"the split of 'hf:{argument}'"
  )


def one_turn(argument):
  """The dialogues of a data set in which a human speaks once.

  Args, Raises: see `load`.
  """
  return filter(public.one_turn, rows(load(argument), f"one_turn:{argument}"))


def rows(made, spec):
  """The rows of what a source returned, as dicts.

  Args:
    made: datasets.Dataset, whose nulls and classes of −1 are missing fields; or
      an iterable of rows, which are given back as they are.
    spec: for messages.
  Raises: ValueError for a stream, or a data set with its splits.
  """
  if not type(made).__module__.startswith("datasets."):
    yield from made
    return
  import datasets

  if isinstance(made, datasets.IterableDataset | datasets.IterableDatasetDict):
    raise ValueError(
      f"source {spec!r} is a stream; load it without streaming=True: the order "
      "of the data is a permutation by one counter, which needs its length and "
      "access to any record"
    )
  if isinstance(made, datasets.DatasetDict):
    raise ValueError(
      f"source {spec!r} has the splits {', '.join(made)}; return one of them"
    )
  classes = [
    name
    for name, feature in made.features.items()
    if isinstance(feature, datasets.ClassLabel)
  ]
  for row in made.with_format(None):
    row = fields.without_nulls(row)  # those that fill the tables up too
    for name in classes:
      if row.get(name) == -1:  # the library's mark for "no label"
        del row[name]
    yield row
