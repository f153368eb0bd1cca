"""What a config must satisfy before it is built; `values` needs no jax."""

import itertools

from dpo_jax import lookup
from dpo_jax.config import fields, saved
from dpo_jax.data.read import sources
from dpo_jax.models import config as model_config

HEADED = ("reward",)  # algorithms with a head whose parameters are drawn
LABELS = ("none", "bradley_terry", "deterministic")


def values(config):
  """Refuses what no config can have, and fields that would have no effect.

  Losses, algorithms, models and the mesh check their own fields.
  """
  numbers(config)
  for obeyed, otherwise in _rules(config):
    if not obeyed:
      raise ValueError(otherwise)


def numbers(config):
  """Refuses None, and numbers out of range, by the rows of config.fields."""
  for path, value in saved.flatten(config.to_dict()).items():
    row = fields.of(path)
    if value is None and not row.optional:
      raise ValueError(f"{path} = None: it needs a value")
    if isinstance(value, bool | str | tuple | None) or path.startswith("loss."):
      continue
    least = row.least
    if least is None and isinstance(value, int):
      least = 1
    if not (value > 0 if least is None else value >= least):
      bound = "above 0" if least is None else f"at least {least}"
      raise ValueError(f"{path} = {value} must be {bound}")
    if row.most is not None and value > row.most:
      bound = f"is a share: it must be at most {row.most}"
      if row.least is None:
        bound = f"must be in (0, {row.most}]"
      raise ValueError(f"{path} = {value} {bound}")
    if row.below is not None and value >= row.below:
      raise ValueError(f"{path} = {value} must be below {row.below}")


def _rules(c):
  """Yields (whether a config obeys, what to say if not).

  Mostly of fields that are None, or another default, unless they are set.
  """
  yield (
    c.data.max_row_length is None or c.data.packed,
    "data.max_row_length has no effect with data.packed=False",
  )
  yield (
    c.ref_store is None or c.ref == "cached",
    f"ref_store has no effect with ref = {c.ref!r}",
  )
  # Of the reference that follows the policy.
  for field in ("ref_mix", "ref_every"):
    yield (
      (c[field] is not None) == (c.ref == "ema"),
      f"{field} = {c[field]} with ref = {c.ref!r}: it is of ref = 'ema', which "
      "needs it (TR-DPO: ref_mix 0.6, ref_every 512)",
    )
  yield (
    c.ref != "ema" or c.lora is None or c.ref_mix == 1,
    f"ref_mix = {c.ref_mix}: a mean of adapters' factors is not the mean of "
    "the weights; with an adapter set ref_mix = 1, a copy every ref_every "
    "steps",
  )
  yield (
    c.init_seed == 0
    or c.init_from is None
    or c.lora is not None
    or c.algo in HEADED,
    f"init_seed = {c.init_seed} has no effect: init_from = {c.init_from!r} "
    "has all parameters, and there is no adapter; set it to 0 (the order of "
    "the data is data.seed)",
  )
  yield (
    c.export.dtype == "float32" or c.export.form != "adapter",
    f"export.dtype = {c.export.dtype!r} has no effect with export.form = "
    "'adapter', whose files are in float32",
  )
  yield (
    c.export.push is not None or not c.export.public,
    "export.public = True has no effect without export.push; name the "
    "repository there",
  )
  for field in ("unit", "completions", "count"):
    yield (
      c.reward.centred or not c.reward[field],
      f"reward.{field} = {c.reward[field]!r} has no effect with "
      "reward.centred = False; set that to True",
    )
  yield from _rules_of_samples(c.sample)
  if "norm" in c.model:  # else the shape is that of init_from
    yield from _rules_of_model(c.model)


def _rules_of_samples(s):
  """`_rules` of config.sample."""
  lookup.lookup(LABELS, s.labels, "sample.labels")
  yield (
    s.labels == "none" or s.draws >= 2,
    f"sample.labels = {s.labels!r} compares the draws of a prompt: "
    "sample.draws must be at least 2",
  )
  yield (
    s.label_scale == 1 or s.labels == "bradley_terry",
    f"sample.label_scale = {s.label_scale} has no effect with sample.labels = "
    f"{s.labels!r}: it is κ of 'bradley_terry'; leave it at 1",
  )
  yield (
    s.prompts is not None or not s.checkpoints,
    "sample.checkpoints = True has no effect with sample.prompts = None: set "
    "that, or it to False",
  )
  yield prefix(s.prefix, "sample.prefix")
  yield (
    s.top_p == 1 or s.temperature > 0,
    f"sample.top_p = {s.top_p} has no effect with sample.temperature = 0",
  )
  yield from _rules_of_prompting(s)
  yield from _rules_of_best_of(s)
  if s.labelled is not None:
    yield (
      s.prompts is not None and len(s.scorers) > 0,
      f"sample.labelled = {s.labelled!r} has no effect: it is to check "
      "sample.scorers on, of samples for sample.prompts; set both, or it to "
      "None",
    )
    yield (
      all(w == 1 for w, _ in sources.parse(s.labelled, "sample.labelled")),
      "sample.labelled: weights have no effect; leave them out",
    )


def prefix(value, field):
  """The rule of a range of tokens, or None."""
  return (
    value is None
    or (
      len(value) == 2
      and all(type(n) is int for n in value)
      and 1 <= value[0] <= value[1]
    ),
    f"{field} = {value} must be (fewest, most) tokens, at least 1",
  )


def _rules_of_prompting(s):
  """`_rules` of what stands around prompts, and ends completions."""
  yield (
    s.shots == 0 or s.shots_from is not None,
    f"sample.shots = {s.shots} needs sample.shots_from: a source of prompts "
    "with completions",
  )
  yield (
    s.shots > 0 or s.shots_from is None,
    f"sample.shots_from = {s.shots_from!r} has no effect with sample.shots = "
    "0: say how many examples stand before a prompt, or set it to None",
  )
  yield (
    all(isinstance(text, str) and text for text in s.stop)
    and len(set(s.stop)) == len(s.stop),
    f"sample.stop = {s.stop} must be distinct texts, none of them empty: write "
    'them as ("\\n\\nHuman:",)',
  )


def _rules_of_best_of(s):
  """`_rules` of sample.best_of and sample.rank_by."""
  yield (
    all(type(n) is int and n >= 1 for n in s.best_of)
    and len(set(s.best_of)) == len(s.best_of),
    f"sample.best_of = {s.best_of} must be distinct whole numbers, at least 1: "
    "write them as (1, 4, 16)",
  )
  yield (
    not s.best_of or len(s.scorers) > 0,
    f"sample.best_of = {s.best_of} ranks draws by a scorer: set sample.scorers",
  )
  yield (
    not s.best_of or max(s.best_of) <= s.draws,
    f"sample.best_of = {s.best_of} takes the best of more than sample.draws = "
    f"{s.draws} completions of a prompt: raise that to "
    f"{max(s.best_of, default=1)}, or leave the larger numbers out",
  )
  yield (
    not s.best_of or max(s.best_of) == 1 or s.temperature > 0,
    f"sample.best_of = {s.best_of} has no effect with sample.temperature = 0: "
    "all draws of a prompt are the same",
  )
  yield (
    s.rank_by is None or len(s.best_of) > 0,
    f"sample.rank_by = {s.rank_by!r} has no effect without sample.best_of, "
    "whose draws it ranks",
  )
  if s.rank_by is not None:
    lookup.lookup(s.scorers, s.rank_by, "sample.rank_by")


def _rules_of_model(m):
  """`_rules` of a config.model that has the whole shape."""
  kinds = {"full", *(["window"] if m.window_theta is None else [])}
  rotates = m.position != "learned" and kinds & set(m.layer_pattern)
  default = model_config.ModelConfig.rope_theta
  yield (
    rotates or m.rope_theta == default,
    f"model.rope_theta = {m.rope_theta} has no effect: no layer of "
    f"model.position = {m.position!r} and model.layer_pattern = "
    f"{m.layer_pattern} rotates by it; set it to {default}",
  )
  yield (
    m.norm_offset == 0 or m.norm == "rmsnorm" or m.qk_norm != "none",
    f"model.norm_offset = {m.norm_offset} has no effect with model.norm = "
    f"{m.norm!r}: it is of RMSNorm",
  )


def pmap(options):
  """Refuses a mesh, of config.mesh, that pmap cannot have."""
  if options.mode != "pmap":
    return
  if options.fsdp * options.tensor > 1:
    raise ValueError("mesh.mode = 'pmap' needs mesh.fsdp = mesh.tensor = 1")
  import jax

  if jax.process_count() > 1:
    raise ValueError("mesh.mode = 'pmap' runs in one process; use 'jit'")


def held_out(config, measured):
  """Refuses data.eval of an algorithm by which nothing is `measured` on it."""
  if not measured:
    raise ValueError(
      f"data.eval = {config.data.eval!r} has no effect with algo = "
      f"{config.algo!r}, which measures nothing held out: set it to None"
    )


def last_step(total, boundary, algo):
  """Refuses a run that ends where its feed cannot start again.

  Args:
    total: updates.
    boundary: of its feed.Feed.
    algo: of the config.
  """
  if not boundary(total):
    later = next(filter(boundary, itertools.count(total)))
    raise ValueError(
      f"{total} steps end inside an iteration of algo = {algo!r}, where a "
      f"checkpoint would lose what was drawn; set train.steps = {later}"
    )


def freeze(patterns, params, optimizer):
  """Refuses a pattern of optim.freeze that matches nothing, or everything."""
  from dpo_jax import tree

  paths = [path for path, _ in tree.named(params)]
  for pattern in patterns:
    if not any(tree.matches([pattern], path) for path in paths):
      raise ValueError(
        f"optim.freeze: {pattern!r} matches no parameter"
        f"{lookup.nearest(pattern, paths)}"
      )
  if not any(map(optimizer.trains, paths)):
    raise ValueError(
      f"optim.freeze = {tuple(patterns)} leaves nothing to train"
    )
