"""The pairs to judge: what policies wrote, and what it is held against."""

from typing import NamedTuple

from etils import epath

from dpo_jax import store
from dpo_jax.data.read import fields, files, sources


class Samples(NamedTuple):
  """A completion of each prompt.

  Attributes:
    name: of the file or the source.
    texts: {prompt: completion}, in the order of the file.
    temperature: at which they were drawn; None if nobody says.
  """

  name: str
  texts: dict
  temperature: float | None = None


class Pair(NamedTuple):
  """Two completions of a prompt.

  Attributes:
    samples: name of the file that `ours` is of.
    prompt, ours, theirs: texts.
  """

  samples: str
  prompt: str
  ours: str
  theirs: str


# Where the settings of a sample file stand: file beside it, section of that.
_SETTINGS = {
  "completions.jsonl": ("completions.json", ()),
  "samples.jsonl": ("evaluation.json", ("config",)),
}


def pairs(options):
  """The pairs that config.judge names.

  Of prompts that all files have, in the order of the first one; so rates of
  several files are of the same prompts, and can be compared prompt by prompt.

  Args:
    options: the fields of config.judge.
  Returns: (list of Samples, list of Pair: those of the first file, then those
    of the next, all of the same prompts; list of lines on what is left out).
  Raises: ValueError for a file that cannot be read, or if no prompt is shared.
  """
  ours = [read(path, "judge.samples") for path in options.samples]
  theirs = against(options.against)
  every = [*ours, theirs]
  shared = [p for p in ours[0].texts if all(p in s.texts for s in every)]
  if not shared:
    firsts = [next(iter(s.texts), "") for s in (ours[0], theirs)]
    raise ValueError(
      f"judge.samples and judge.against share no prompt: {ours[0].name} begins "
      f"with {firsts[0]!r:.80}, {theirs.name} with {firsts[1]!r:.80}; take "
      "samples for the prompts of that data (sample.prompts)"
    )
  told = [
    f"{s.name}: {len(s.texts) - len(shared):,} of {len(s.texts):,} prompts are "
    "not in all files, and left out"
    for s in every
    if len(s.texts) > len(shared)
  ]
  shared = shared[: options.count]
  out = [
    Pair(s.name, prompt, s.texts[prompt], theirs.texts[prompt])
    for s in ours
    for prompt in shared
  ]
  return ours, out, told


def read(path, field):
  """The Samples of a sample file: the first completion of each prompt.

  Args:
    path: of it.
    field: the config field that names it, for messages.
  Raises: ValueError naming file and line.
  """
  path, texts = epath.Path(path), {}
  hint = f"{field} is a path relative to the current folder, of a sample file"
  with store.explained(f"{path}: cannot be read", hint):
    path.open("rb").close()
  for origin, row in files.jsonl(path):
    with fields.at(origin):
      if isinstance(row, fields.BadRecord):
        raise row
      if not isinstance(row, dict):
        raise ValueError(f"{origin}: a row must be an object, not {row!r:.40}")
      prompt, text = (
        fields.field(row, name, str) for name in ("prompt", "completion")
      )
    texts.setdefault(prompt, text)
  if not texts:
    raise ValueError(f"{field}: {path} is empty")
  return Samples(str(path), texts, _temperature(path))


def against(spec):
  """The Samples of judge.against, which may be a source of data.

  Of data it is the best answer: the chosen one of comparisons.
  """
  if _drawn(spec):
    return read(spec, "judge.against")
  if any(w != 1 for w, _ in sources.parse(spec, "judge.against")):
    raise ValueError("judge.against: weights have no effect; leave them out")
  policy = sources.Policy("error")
  records = sources.load(spec, "sft", policy, "judge.against")
  sources.refuse_messages(records, "judge.against")
  texts = {}
  for record in records:
    texts.setdefault(record.prompt, record.completions[0])
  return Samples(spec, texts)


def _drawn(spec):
  """Whether a spec is a file of samples, which has whole rows of them."""
  path = epath.Path(spec)
  if path.suffix != ".jsonl" or not path.exists():
    return False
  _, row = next(files.jsonl(path), ("", None))
  return isinstance(row, dict) and {"prompt", "completion"} <= row.keys()


def _temperature(path):
  """sample.temperature of what a sample file was drawn by, or None."""
  name, sections = _SETTINGS.get(path.name, (None, ()))
  if name is None or not (path.parent / name).exists():
    return None
  about = store.read_json(path.parent / name)
  for section in (*sections, "sample"):
    about = about.get(section) or {}
  return about.get("temperature")
