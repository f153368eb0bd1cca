"""A run's config as it is saved: flat, compared, read back."""

import json

from etils import epath
from ml_collections import config_dict

from dpo_jax.config import fields


def flatten(config, prefix=""):
  """{"loss.beta": 0.1, …} of a nested dict."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def differences(saved, current, *decides):
  """Lines about the fields in which two configs differ.

  Args:
    saved, current: plain nested dicts.
    *decides: what of config.fields; those that decide anything else may differ.
  """
  saved = flatten(json.loads(json.dumps(saved)))
  current = flatten(json.loads(json.dumps(current)))
  return [
    f"{key} (saved {saved.get(key)!r}, now {current.get(key)!r})"
    for key in sorted(saved.keys() | current.keys())
    if saved.get(key) != current.get(key) and fields.of(key).decides in decides
  ]


# Fields of config.sample that came later, as they are where nobody asks.
LATER = {
  "template": None,
  "shots": 0,
  "shots_from": None,
  "stop": (),
  "best_of": (),
  "rank_by": None,
  "label_scale": 1.0,
  "checkpoints": False,
}


def drawn_by(sample):
  """What of config.sample, as plain values, decides draws and their rewards.

  Not what is measured of them later. Where nobody asks for a later field, it is
  left out, as it is in files of draws from before.
  """
  measured = ("best_of", "rank_by", "checkpoints")
  return {
    k: v
    for k, v in sample.items()
    if k not in measured and not (k in LATER and v == LATER[k])
  }


def upgraded(config):
  """A saved run's config, as a dict, with the fields that came later."""
  if not {"loss", "train", "model", "data", "log", "optim"} <= config.keys():
    return config
  config = {"ref_mix": None, "ref_every": None, **config}
  config.setdefault("sweep", {"together": 1})
  config.setdefault("reward", dict(_NO_GAIN))
  config["train"] = {"max_noise": 0.1, **config["train"]}
  config["data"] = {"token_cache": None, **config["data"]}
  config["log"] = {"tokens": False, "profile": False, **config["log"]}
  if "sample" in config:
    config["sample"] = {**LATER, **config["sample"]}
  if "export" in config:
    config["export"] = {"public": False, **config["export"]}
  config["optim"] = {"max_spike": None, **config["optim"]}
  if config["optim"]["name"] != "sgd":
    config["optim"] = {"moments": "float32", **config["optim"]}
  if "head_chunk" in config:
    chunk, remat = config.pop("head_chunk"), config["model"]["remat"]
    remat = "full" if remat else "none"
    config["model"] = {**config["model"], "head_chunk": chunk, "remat": remat}
  if config.get("lora") is not None and config.get("ref") == "frozen":
    config["ref"] = "base"  # as an adapter's reference is called now
  if "critic" in (config.get("rollout") or {}):
    config["rollout"] = {"centre": "none", **config["rollout"]}
  if config.get("lora") is not None:
    config["lora"] = {"zero": "b", **config["lora"]}
  return config


# Of runs before there were reward models.
_NO_GAIN = {"centred": False, "unit": False, "completions": None, "count": None}
_MOST = 8  # fields that a message names


def check_config(saved, current, where):
  """Refuses a config of another policy than the one that a run trains.

  Raises: ValueError naming the fields. How long is one of them where the
    learning rate decays over the run: its next updates would be others.
  """
  saved = upgraded(saved)
  if "reference" not in saved:  # it was not always saved
    current = {k: v for k, v in current.items() if k != "reference"}
  changed = differences(saved, current, fields.POLICY)
  if changed:
    # Other parameters to start from follow from what the user has set.
    set_here = [line for line in changed if not line.startswith("reference.")]
    changed = set_here or changed
    if len(changed) > _MOST:
      more = f"{len(changed) - _MOST} more"
      changed = [*changed[:_MOST], more]
    raise ValueError(
      f"{where} belongs to a run with another config: {'; '.join(changed)}. "
      "Use a new --workdir, or set these fields back"
    )
  schedule = current.get("optim", {}).get("schedule", "constant")
  before, now = _length(saved), _length(current)
  if schedule != "constant" and before != now:
    raise ValueError(
      f"{where} belongs to a run of {before}, now {now}: optim.schedule = "
      f"{schedule!r} decays over that length, so the updates would be others. "
      "Set it back, or use a new --workdir; with optim.schedule = 'constant' a "
      "run can be made longer"
    )


def _length(config):
  """How long a config trains, as text."""
  train = config.get("train", {})
  field = "epochs" if train.get("steps") is None else "steps"
  return f"train.{field} = {train.get(field)}"


def saved_config(workdir):
  """The config of a run folder, unlocked; fields that were None take any value.

  Raises: ValueError if there is none.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise ValueError(f"{path}: no such file; is {workdir} the folder of a run?")

  def tuples(section):  # JSON has none, and configs have no lists
    return {
      k: tuple(v) if isinstance(v, list) else v for k, v in section.items()
    }

  try:
    found = json.loads(path.read_text(), object_hook=tuples)
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(found, dict) or not found:
    raise ValueError(f"{path} is damaged: it holds no config")
  config = config_dict.ConfigDict(upgraded(found))
  if "model" in config and "lora" not in config:
    raise ValueError(
      f"{path} was written by an earlier version, whose fields are others; use "
      "that version for this folder, or train anew"
    )
  return config
