"""What a config must satisfy before anything is built."""

from dpo_jax import lookup, tree
from dpo_jax.data import audit_counts
from dpo_jax.train import settings

# Shares of data, each may be None.
_SHARES = tuple(f"audit.{name}" for name in audit_counts.CHECKS)
# Fields that may be None, and the smallest value of those that may be below 1.
_OPTIONAL = {
  *("init_from", "lora", "head_chunk", "optim.clip_norm"),
  *("model.window", "model.window_theta", "model.embed_scale"),
  *("model.attention_scale", "model.attention_softcap", "model.logit_softcap"),
  *("data.train", "data.eval", "data.max_row_length"),
  *("train.steps", "mesh.data", "workdir", "ref_store", "log.wandb"),
  *("ref_mix", "ref_every"),
  *("sample.prompts", "sample.prefix", "sample.labelled", *_SHARES),
  *("export.folder", "export.push", "init_adapter"),
}
_LOWEST = {
  **dict.fromkeys(("init_seed", "data.seed", "optim.warmup"), 0),
  **dict.fromkeys(("sample.seed", "sample.temperature"), 0),
  **dict.fromkeys((*_SHARES, "audit.show"), 0),
  **dict.fromkeys(("model.rotary_dim", "model.norm_offset"), 0),
  "optim.weight_decay": 0,
}
LABELS = ("none", "bradley_terry", "deterministic")


def values(config):
  """Refuses numbers that no field can have.

  Whole numbers are at least 1 and others above 0 but for `_LOWEST`; what is
  not in `_OPTIONAL` is not None. Losses check their own fields.
  """
  for path, value in settings.flatten(config.to_dict()).items():
    if value is None and path not in _OPTIONAL:
      raise ValueError(f"{path} = None: it needs a value")
    if isinstance(value, bool | str | tuple | None) or path.startswith("loss."):
      continue
    low = _LOWEST.get(path, 1 if isinstance(value, int) else None)
    if not (value > 0 if low is None else value >= low):
      bound = "above 0" if low is None else f"at least {low}"
      raise ValueError(f"{path} = {value} must be {bound}")
    if path in _SHARES and value > 1:
      raise ValueError(f"{path} = {value} is a share: it must be at most 1")
  if config.data.max_row_length is not None and not config.data.packed:
    raise ValueError("data.max_row_length has no effect with data.packed=False")
  if config.ref_store is not None and config.ref != "cached":
    raise ValueError(f"ref_store has no effect with ref = {config.ref!r}")
  if config.sample.top_p > 1:
    raise ValueError(f"sample.top_p = {config.sample.top_p} must be at most 1")
  lookup.lookup(LABELS, config.sample.labels, "sample.labels")
  if config.sample.labels != "none" and config.sample.draws < 2:
    raise ValueError(
      f"sample.labels = {config.sample.labels!r} compares the draws of a "
      "prompt: sample.draws must be at least 2"
    )
  prefix = config.sample.prefix
  if prefix is not None and not (
    len(prefix) == 2
    and all(type(n) is int for n in prefix)
    and 1 <= prefix[0] <= prefix[1]
  ):
    raise ValueError(
      f"sample.prefix = {prefix} must be (fewest, most) tokens, at least 1"
    )


def freeze(patterns, params, optimizer):
  """Refuses a pattern of optim.freeze that matches nothing, or everything."""
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
